"""The running Space: its page in headless Chromium (skipped where playwright or Chromium is absent), and its API."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import browser, picture  # noqa: F401
from servers import free_port, start

pytestmark = pytest.mark.slow
APP = Path(__file__).parent.parent / "spaces" / "chat" / "app.py"
SLOW_APP = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("space_app", sys.argv[1])
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
put, answer = app.TokenStreamer.put, app.local_answer
app.TokenStreamer.put = lambda self, ids: (time.sleep(0.06), put(self, ids))  # time to press a button
app.local_answer = lambda messages, temperature, *rest: answer(messages, 0.0, *rest)
app.demo.launch(**app.LAUNCH, server_port=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def space(chat_folder):
    port = free_port()
    words = [sys.executable, "-c", SLOW_APP, str(APP), str(port)]
    process, url = start(words, port, environment={"MODEL_ID": str(chat_folder), "MAX_QUEUE": "3"})
    yield url
    process.terminate()
    process.wait(20)


class Tab:
    """One visitor."""

    def __init__(self, chromium, url, **options):
        self.page = chromium.new_context(**options).new_page()
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_selector("textarea", timeout=60_000)
        self.page.wait_for_timeout(500)

    def send(self, text):
        box = self.page.locator("textarea").first
        box.fill(text)
        box.press("Enter")

    def texts(self, who="bot"):
        return [element.inner_text() for element in self.page.query_selector_all(f'[data-testid="{who}"]')]

    def press(self, label):
        self.page.locator(f'button[aria-label*="{label}" i]').last.click()

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.texts("user"), self.texts())
            self.page.wait_for_timeout(50)


def test_a_question_streams_its_answer_and_the_tool_step_opens(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("Hello")
    lengths = set()
    tab.until(lambda: (lengths.add(len("".join(tab.texts()))), "nothing at all." in "".join(tab.texts()))[1])
    assert len(lengths) > 5 and "🙂" in "".join(tab.texts())  # it came bit by bit
    tab.send("What is 12 * 34?")
    tab.until(lambda: "It is 408." in tab.texts())
    step = tab.page.locator(".thought-group .title")
    assert "12*34 = 408" in step.inner_text()  # closed
    step.click()
    tab.until(lambda: tab.page.get_by_text("408", exact=True).count() > 0)
    tab.page.wait_for_timeout(1000)  # it unfolds
    picture(tab.page, "space-tool")
    tab.page.reload()
    tab.until(lambda: "It is 408." in tab.texts() and tab.texts("user") == ["Hello", "What is 12 * 34?"])


def test_the_text_box_has_focus_and_hint_after_an_answer_and_buttons_have_names(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("x y" * 1000)  # is refused beside the box
    tab.until(lambda: "tokens; the model reads at most 255." in tab.page.inner_text("body"))
    assert tab.texts("user") == []
    for question, answer in (("What is 5 + 6?", "It is 11."), ("What is 12 * 34?", "It is 408.")):
        tab.send(question)
        tab.until(lambda answer=answer: answer in tab.texts())
        tab.until(lambda: tab.page.evaluate("document.activeElement.tagName") == "TEXTAREA")
        assert tab.page.locator("textarea").first.get_attribute("placeholder") == "Write a message"
    tab.until(lambda: tab.page.locator("[data-testid=submit-button]").get_attribute("aria-label") == "Send")
    for button in tab.page.query_selector_all("button"):
        assert (button.get_attribute("aria-label") or button.inner_text()).strip(), button.evaluate("b => b.outerHTML")
    width = tab.page.evaluate("document.querySelector('.bubble-wrap').clientWidth / 16")
    assert 45 < width < 55  # rem


def test_stop_keeps_what_was_said_and_retry_asks_again(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("Hello")
    tab.until(lambda: len("".join(tab.texts())) > 8)
    tab.page.locator("button.stop-button").click()
    tab.page.wait_for_timeout(1500)
    stopped = "".join(tab.texts())
    tab.page.wait_for_timeout(1000)
    assert "".join(tab.texts()) == stopped and "at all" not in stopped
    picture(tab.page, "space-stopped")
    tab.press("Retry")
    tab.until(lambda: "nothing at all." in "".join(tab.texts()))


def test_tags_and_entities_are_shown_as_text_and_scripts_do_not_run(space, browser):  # noqa: F811
    text = "<script>hacked=1</script><img src=x onerror='hacked=2'> &amp;lt; &lt; &copy; a < b ``` <b>x</b>"
    tab = Tab(browser, space)
    tab.send(text)
    tab.until(lambda: tab.texts("user") != [])
    tab.page.wait_for_timeout(1000)
    assert [shown.replace("\u2060", "") for shown in tab.texts("user")] == [text]
    assert tab.page.evaluate("window.hacked") is None and not tab.page.query_selector('[data-testid="user"] b')


def test_a_phone_in_korean_at_night(space, browser):  # noqa: F811
    screen = {"width": 390, "height": 844}
    tab = Tab(browser, space, locale="ko-KR", viewport=screen, color_scheme="dark", is_mobile=True, has_touch=True)
    tab.until(lambda: "메시지를 입력하세요" in (tab.page.locator("textarea").first.get_attribute("placeholder") or ""))
    tab.page.get_by_text("설정").click()
    tab.until(lambda: "시스템 메시지" in tab.page.inner_text("body"))
    picture(tab.page, "space-phone-settings")
    tab.send("What is 12 * 34?")
    tab.until(lambda: "It is 408." in tab.texts())
    for name in ("보내기", "되돌리기"):  # of Gradio's own names some are English
        tab.until(lambda name=name: tab.page.locator(f"[aria-label='{name}']").count() >= 1)
    tab.page.evaluate("""() => { document.querySelector('.message-content .md').innerHTML = '<table><tr>'
        + '<td>Netherlands</td>'.repeat(9) + '</tr></table>' }""")
    assert tab.page.evaluate("document.querySelector('td').offsetHeight") < 60  # a word is not broken
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out sideways
    picture(tab.page, "space-phone")


def test_the_api_streams_and_a_full_queue_is_explained_in_the_visitors_language(space, browser):  # noqa: F811
    from gradio_client import Client

    tab, client = Tab(browser, space, locale="ko-KR"), Client(space, verbose=False)
    arguments = ("", 0.0, 0, 120)
    assert client.predict("", api_name="/chat") == client.predict(None, api_name="/chat")  # the rest has defaults
    job = client.submit("What is 12 * 34?", *arguments, api_name="/chat")
    assert job.result()[-1]["content"] == "It is 408." and len(job.outputs()) > 5
    jobs = [client.submit("Hello", *arguments, api_name="/chat") for _ in range(8)]  # one runs, three may wait
    tab.send("Hello")
    tab.until(lambda: "지금 질문하는 사람이 많습니다" in tab.page.inner_text("body"))
    failures = [str(error) for job in jobs if (error := job.exception())]
    assert 1 <= len(failures) < 8 and all("queue is full" in text.lower() for text in failures), failures


def test_it_talks_to_an_endpoint_and_says_when_it_is_gone(talker_folder):
    from gradio_client import Client

    script = Path(__file__).parent.parent / "scripts" / "chat_web.py"
    port = free_port()
    words = [sys.executable, str(script), "--run-dir", str(talker_folder.parent), "--temperature", "0"]
    server, endpoint = start([*words, "--port", str(port)], port, "/health")
    port = free_port()
    words = [sys.executable, "-c", SLOW_APP, str(APP), str(port)]
    process, url = start(words, port, environment={"ENDPOINT_URL": endpoint, "HF_HUB_OFFLINE": "0"})
    try:
        client = Client(url, verbose=False)
        step, text = client.predict("What is 12 * 34?", "", 0.0, 0, 120, api_name="/chat")
        assert "408" in step["content"] and text["content"] == "It is 408."
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, -signal.SIGINT, 130)
        (message,) = client.predict("Hello", "", 0.0, 0, 120, api_name="/chat")
        assert "does not answer" in message["content"]
    finally:
        server.kill()
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("name,words", [("/nowhere/at/all", "no model in"), ("", "set MODEL_ID")])
def test_without_a_model_the_app_ends_with_one_line(name, words, tmp_path):
    shutil.copytree(APP.parent, tmp_path / "chat")
    (tmp_path / "chat" / "README.md").write_text("---\ntitle: x\n---\n")
    command = [sys.executable, str(tmp_path / "chat" / "app.py")]
    done = subprocess.run(command, env={**os.environ, "MODEL_ID": name}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ") and words in done.stderr
