"""The server's page in headless Chromium, with a stand-in for the server inside the page.

`put(delta)` and `end()` in the page send pieces of an answer; `sent` are the bodies that the page posted.
"""

import json
from pathlib import Path

import pytest
from browser import browser, picture  # noqa: F401

pytestmark = pytest.mark.slow
HTML = Path(__file__).parent.parent / "nanochat_hf" / "serve" / "ui.html"
SERVER = """
window.sent = [];
window.failing = null;  // status of the next reply
window.fetch = async (url, options) => {
  const examples = ["One?", "Two?", "Three?", "4?"];
  if (url === "/v1/models") return Response.json({data: [{id: "cpu-demo/rl", examples}]});
  sent.push(JSON.parse(options.body));
  if (failing) return Response.json({error: {message: "the prompt is too long"}}, {status: failing});
  return new Response(new ReadableStream({start(stream) {
    const write = value => stream.enqueue(new TextEncoder().encode("data: " + JSON.stringify(value) + "\\n\\n"));
    window.put = (delta, more = {}) => write({choices: [{delta, ...more}]});
    window.fail = message => write({error: {message}});
    window.end = () => stream.close();
    options.signal.onabort = () => stream.error(new DOMException("", "AbortError"));
  }}));
};
"""
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "korean": {"viewport": {"width": 390, "height": 844}, "locale": "ko-KR"},
}
MARKDOWN = """# Title

**bold**, *slanted*, ~~gone~~ and `a < b`; 2*3*4 = 24, [a link](https://a.b/c?d=1&e=2), https://example.org.

```python
print("**no**")
```

- one
- two
  1. nested

> quoted

| Country | Capital |
|---|---|
| Netherlands | Amsterdam |
"""


class Tab:
    """One page of a browser context, which holds the storage."""

    def __init__(self, context):
        self.errors = []
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto("http://page.test/")

    def texts(self, kind):
        return [box.inner_text() for box in self.page.query_selector_all(kind)]

    def ask(self, text, *answer):
        """Send a message and, if there are any, the texts of its answer."""
        before = self.page.evaluate("sent.length")
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        self.page.wait_for_function(f"sent.length > {before}")
        if answer:
            self.answer(*answer)

    def answer(self, *texts):
        self.page.wait_for_function("!!window.put")
        for text in texts:
            self.page.evaluate("text => put({content: text})", text)
        self.page.evaluate("() => { end(); window.put = null }")
        self.page.wait_for_function("document.querySelector('#talk').className === ''")

    def sent(self):
        """The messages of the last request, as "u question" and "a answer"."""
        messages = self.page.evaluate("sent.at(-1).messages")
        return [f"{message['role'][0]} {message['content']}" for message in messages]


@pytest.fixture
def visit(browser):  # noqa: F811
    """visit(screen) -> Tab; visit.again() is another tab with the same storage."""
    contexts = []

    def again():
        return Tab(contexts[-1])

    def visit(screen="desktop"):
        context = browser.new_context(**SCREENS[screen], bypass_csp=True)  # playwright evaluates its conditions
        context.route("**/*", lambda route: route.fulfill(body=HTML.read_text(), content_type="text/html"))
        context.add_init_script(SERVER)
        contexts.append(context)
        return again()

    visit.again = again
    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("screen", SCREENS)
def test_greeting_markdown_and_tables_fit_every_screen(visit, screen):
    tab = visit(screen)
    tab.page.wait_for_function("document.querySelector('.examples')?.textContent.includes('Three?')")
    assert tab.texts(".examples button") == ["One?", "Two?", "Three?", "4?"]
    send = tab.texts("#send")
    tab.page.click(".examples button")
    tab.page.wait_for_function("sent.length")
    assert tab.page.evaluate("getComputedStyle(document.querySelector('.bot'), '::before').content") == '"●●●"'
    assert tab.texts("#send") != send and tab.sent() == ["u One?"]
    tab.answer(*[MARKDOWN[i : i + 9] for i in range(0, len(MARKDOWN), 9)])
    shown = {"h1": "Title", "strong": "bold", "em": "slanted", "del": "gone", "p code": "a < b"}
    shown |= {"pre code": 'print("**no**")', "ul > li > p": "one", "ol li": "nested", "blockquote": "quoted"}
    for selector, text in {**shown, "th": "Country", "td": "Netherlands"}.items():
        assert tab.texts(f".bot {selector}")[0] == text
    links = [link.get_attribute("href") for link in tab.page.query_selector_all(".bot a")]
    assert links == ["https://a.b/c?d=1&e=2", "https://example.org"] and "2*3*4 = 24" in tab.texts(".bot")[0]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["viewport"]["width"]
    assert tab.page.evaluate("document.querySelector('td').offsetHeight") < 60  # a word is not broken
    colors = tab.page.evaluate("getComputedStyle(document.querySelector('.user')).color")
    assert ("255" in colors) == (screen == "dark")
    for button in tab.page.query_selector_all("button"):
        assert (button.get_attribute("aria-label") or button.text_content()).strip()
    assert tab.errors == []
    picture(tab.page, f"page-{screen}")


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
        "[x](javascript:window.hacked=3) ![y](http://evil.test/z.png) [z](data:text/html,<script>1</script>)",
        "`<b>` ```\n<iframe src=//evil.test>\n", "| <b>a</b> | b |\n|---|---|\n| <i>c</i> | d |", "&lt;b&gt; &amp;",
        "[a](https://a.b/\" onclick=\"window.hacked=4) <https://x\"onmouseover=alert(1)>",
        "# <svg onload=window.hacked=5>",
        ">" * 3000 + "x", "- " * 3000 + "x", "**" * 3000, "`" * 2000 + "x", "[" * 3000, "\n" * 5000, "*a " * 2000,
    ],
)  # fmt: skip
def test_hostile_markdown_is_text_and_takes_no_time(visit, text):
    tab = visit()
    tab.ask(text if len(text) < 1000 else "long", "ok ", text)
    assert tab.page.evaluate("window.hacked") is None and tab.errors == []
    tags = tab.page.evaluate("[...document.querySelectorAll('.bot *, .user *')].map(x => x.localName)")
    assert not {"script", "img", "iframe", "svg", "b", "i"} & set(tags)
    attributes = tab.page.evaluate("[...document.querySelectorAll('.bot *')].flatMap(x => x.getAttributeNames())")
    assert set(attributes) <= {"href", "target", "rel", "class", "type", "start"}
    for link in tab.page.query_selector_all(".bot a"):
        assert link.get_attribute("href").startswith("http")
    tab.page.reload()  # from the storage
    assert tab.page.evaluate("window.hacked") is None and tab.errors == []


def test_new_stop_and_enter_while_an_answer_comes(visit):
    tab = visit()
    tab.ask("first")
    tab.page.wait_for_function("!!window.put")
    tab.page.evaluate("put({content: 'old'})")
    tab.page.fill("#text", "typed")
    tab.page.press("#text", "Enter")  # does not stop it
    tab.page.evaluate("put({content: ' answer'})")
    tab.page.wait_for_function("document.querySelector('.bot').textContent === 'old answer'")
    assert tab.page.input_value("#text") == "typed"
    tab.page.click("#new")
    tab.ask("second", "new answer")
    assert tab.texts(".bot") == ["new answer"] and tab.sent() == ["u second"]
    tab.ask("third")
    tab.page.wait_for_function("!!window.put")
    tab.page.evaluate("put({content: 'half'})")
    tab.page.wait_for_function("document.querySelectorAll('.bot')[1].textContent === 'half'")
    tab.page.click("#send")  # it says Stop
    tab.page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    tab.ask("fourth", "x")
    assert tab.sent() == ["u second", "a new answer", "u third", "a half", "u fourth"]


def test_a_reader_who_scrolled_up_stays_there(visit):
    tab = visit()
    tab.ask("long")
    tab.page.wait_for_function("!!window.put")
    top = "document.querySelector('#talk').scrollTop"
    tab.page.evaluate("put({content: 'line\\n\\n'.repeat(60)})")
    tab.page.wait_for_function(f"{top} > 1000")  # it follows
    tab.page.mouse.move(600, 400)
    tab.page.mouse.wheel(0, -40)
    tab.page.wait_for_timeout(300)
    here = tab.page.evaluate(top)
    tab.answer(*["more\n\n" * 5] * 5)
    assert tab.page.evaluate(top) == here


def test_copy_edit_and_regenerate(visit):
    tab = visit()
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.evaluate("""() => { window.copied = []; Object.defineProperty(navigator, "clipboard",
        {value: {writeText: async text => copied.push(text)}, configurable: true}) }""")
    tab.ask("one", "a **b**\n```\ncode\n```")
    tab.page.click(".code button")
    tab.page.click(".actions:not(.mine) button:text('Copy')")
    tab.page.click(".actions.mine button:text('Copy')")
    assert tab.page.evaluate("copied") == ["code", "a **b**\n```\ncode\n```", "one"]
    tab.ask("two", "second")
    assert tab.page.locator("button.last:visible").count() == 1  # only of the last answer
    tab.page.click("button.last >> visible=true")
    tab.page.wait_for_function("sent.length === 3")
    tab.answer("better")
    assert tab.sent()[-1] == "u two" and len(tab.sent()) == 3 and tab.texts(".bot")[-1] == "better"
    tab.page.click(".actions.mine button:text('Edit')")
    assert tab.page.input_value("#text") == "one"
    tab.page.press("#text", "Escape")
    assert tab.page.input_value("#text") == "" and len(tab.texts(".user")) == 2
    tab.page.click(".actions.mine button:text('Edit')")
    tab.ask("changed", "third")
    assert tab.sent() == ["u changed"] and tab.texts(".user") == ["changed"] and tab.texts(".bot") == ["third"]


def test_a_refused_question_can_be_tried_again_and_replaces_nothing(visit):
    tab = visit()
    tab.ask("one", "first")
    tab.page.evaluate("failing = 429")
    tab.ask("two")
    tab.page.wait_for_selector(".error")
    assert "Many people are asking right now" in tab.texts(".error")[0] and "429" not in tab.texts(".error")[0]
    tab.page.evaluate("failing = 400")
    tab.page.click(".error button")
    tab.page.wait_for_function("document.querySelector('.error')?.textContent.includes('too long')")
    tab.page.evaluate("failing = null")
    tab.page.click(".error button")
    tab.answer("second")
    assert tab.sent() == ["u one", "a first", "u two"] and tab.texts(".error") == []
    tab.page.evaluate("failing = 503")
    tab.page.click("button.last >> visible=true")
    tab.page.wait_for_selector(".error")
    assert tab.texts(".bot") == ["first", "second"]  # the old answer is still there
    tab.page.evaluate("failing = null")
    # An error that ends a stream.
    for words, remembered in (([], []), (["ha", "lf"], ["u last", "a x", "u broken", "a half"])):
        tab.ask("broken")
        tab.page.wait_for_function("!!window.put")
        for word in words:
            tab.page.evaluate("text => put({content: text})", word)
        tab.page.evaluate("fail('the model stopped')")
        tab.page.wait_for_function("document.querySelector('.error')?.textContent.includes('the model stopped')")
        tab.answer()
        tab.ask("last", "x")
        assert tab.sent()[4:] == [*remembered, "u last"]


def test_commands(visit):
    tab = visit()

    def command(line):
        tab.page.fill("#text", line)
        tab.page.press("#text", "Enter")
        return (tab.texts(".note") or [""])[-1]

    assert "/topk N" in command("/help") and "temperature: the server" in command("/temperature")
    assert command("/temperature 0.5") == "temperature: 0.5" and command("/topk 7") == "topk: 7"
    for line in ("/temperature 9", "/temperature x", "/temperature -1", "/topk 1.5", "/topk -1"):
        assert "needs a number" in command(line)
    assert "No command /nothing" in command("/nothing")
    tab.ask("hi", "ho")
    body = tab.page.evaluate("sent.at(-1)")
    assert (body["temperature"], body["top_k"]) == (0.5, 7) and tab.page.evaluate("sent.length") == 1
    command("/clear")
    assert tab.texts(".user") == [] and len(tab.texts(".examples button")) == 4


def test_conversations_stay_in_the_browser_and_can_be_opened_and_deleted(visit):
    tab = visit()
    tab.ask("What is 12 * 34?")
    tab.page.wait_for_function("!!window.put")
    for delta in ({"tool": {"call": "12*"}}, {"tool": {"call": "34"}}, {"tool": {"result": "408"}}):
        tab.page.evaluate("delta => put({content: '', ...delta})", delta)
    tab.answer("It is 408.")
    assert tab.texts(".bot summary") == ["12*34 = 408"]  # closed, it shows the result
    tab.page.click("#new")
    tab.ask("Hello", "Hi.")
    tab.page.reload()
    assert tab.texts(".user") == ["Hello"] and tab.texts(".bot") == ["Hi."]
    other = visit.again()  # another tab begins anew, and sees the list
    assert other.texts(".user") == []
    other.page.click("#chats")
    assert other.texts("#list .title") == ["Hello", "What is 12 * 34?"]
    picture(other.page, "page-list")
    other.page.click("#list .title:text('12 * 34')")
    assert other.texts(".bot summary") == ["12*34 = 408"]
    other.ask("And now?", "x")
    assert other.page.evaluate("sent.at(-1).messages[1].tool_steps") == [{"call": "12*34", "result": "408"}]
    other.page.click("#chats")
    other.page.click("#list div:has-text('Hello') button[aria-label=Delete]")
    assert other.texts("#list .title") == ["What is 12 * 34?"]
    stored = other.page.evaluate("Object.values(localStorage)")
    assert [len(json.loads(text)["messages"]) for text in stored] == [4]


def test_the_text_box_grows_and_a_limit_is_said(visit):
    tab = visit()
    height = "document.querySelector('#text').offsetHeight"
    low = tab.page.evaluate(height)
    tab.page.fill("#text", "a\nb\nc\nd")
    assert low + 60 < tab.page.evaluate(height) < 400
    tab.page.fill("#text", "a\n" * 200)
    assert tab.page.evaluate(height) < 400
    tab.ask("x")
    tab.page.wait_for_function("!!window.put")
    assert tab.page.evaluate(height) == low
    tab.page.evaluate("put({content: 'cut'}, {finish_reason: 'length'})")
    tab.answer()
    assert tab.texts(".note") == ["The answer reached its limit of tokens."]
