"""Conversations of an identity: from phrasings or written by another model, checked, all different."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from transformers import AutoModelForCausalLM

from nanochat_hf import cli
from nanochat_hf.data import identity
from nanochat_hf.data.identity import Identity, Word, conversations, parse_messages, words_of
from nanochat_hf.data.mixture import Mixture
from nanochat_hf.data.transforms import BadRow, check
from nanochat_hf.errors import InputError
from nanochat_hf.train.sft import ChatConfig, train_chat

ROOT = Path(__file__).parent.parent
COLOR = {"ask": ["What is your favorite color?"], "say": "Green, {truly}."}
OPHELIA = Identity("Ophelia", "the club", facts=[COLOR], styles=[{}, {"before": "Ahoy! ", "after": " Fair winds!"}])


def texts_of(rows, role: str) -> list[str]:
    return [m["content"] for row in rows for m in row["messages"] if m["role"] == role]


def questions(me: Identity) -> list[str]:
    """Every question of the test split, once."""
    texts = [text for intent in me.phrasings["intents"].values() for text in intent["test"]]
    return [me.fill(text, me.others[number % 3]) for number, text in enumerate(texts)]


def test_conversations_are_different_valid_and_follow_from_the_seed():
    rows = list(conversations(OPHELIA, num=500))
    assert len({words_of(row["messages"]) for row in rows}) == 500
    for row in rows:
        check(row["messages"])
    assert rows == list(conversations(OPHELIA, num=500)) != list(conversations(OPHELIA, seed=1, num=500))
    assert list(conversations(OPHELIA, num=20)) == rows[:20]


def test_the_facts_and_the_styles_are_in_what_it_says():
    rows = list(conversations(OPHELIA, num=500))
    answers = texts_of(rows, "assistant")
    assert sum("Ophelia" in a or "Green, {truly}." in a for a in answers) == len(answers)
    assert any("the club" in a for a in answers) and "Green, {truly}." in answers
    assert all(a.startswith("Ahoy! ") == a.endswith(" Fair winds!") for a in answers)
    assert "Claude" not in Identity("claude", "the club").others  # as whom it denies to be
    assert 0.3 < sum(a.startswith("Ahoy!") for a in answers) / len(answers) < 0.7
    assert not any("nanochat" in a for a in answers) and any("nanochat" in q for q in texts_of(rows, "user"))


def test_the_test_asks_in_phrasings_that_no_training_has():
    def words(rows):
        return {re.sub(r"\W+", " ", q).strip().lower() for q in texts_of(rows, "user")}

    train, test = words(conversations(OPHELIA, num=1000)), words(conversations(OPHELIA, "test", num=60))
    assert words(conversations(OPHELIA, "validation", num=60)) == test
    assert not train & test and not train & {re.sub(r"\W+", " ", q).strip().lower() for q in questions(OPHELIA)}
    with pytest.raises(InputError, match="no split 'dev'"):
        next(conversations(OPHELIA, "dev"))
    mute = Identity("Ophelia", "the club")
    mute.intents = [{"ask": ["Who?"], "test": ["And who?"], "say": ["Ophelia."]}]
    with pytest.raises(InputError, match=r"only \d+ different conversations of Ophelia, not 500"):
        list(conversations(mute, num=500))


def test_korean_particles_follow_the_sound_before_them():
    for text, particles, written in (
        *(("모델", "이에요/예요", "모델이에요"), ("오필리아", "이에요/예요", "오필리아예요"), ("모델", "", "모델")),
        *(("Ophelia", "은/는", "Ophelia는"), ("nanochat", "이/가", "nanochat이"), ("?!", "이/가", "?!가")),
        *(("로봇 7", "이/가", "로봇 7이"), ("로봇 0", "은/는", "로봇 0은")),
        ("로봇 2 (새것!)", "이/가", "로봇 2 (새것!)이"),
    ):
        assert format(Word(text), particles) == written


@pytest.mark.parametrize("language", identity.LANGUAGES)
def test_a_language_has_all_intents_and_its_phrasings_can_be_filled(language):
    me = Identity("Ophelia", "the club", language)
    assert identity.LANGUAGES == ["en", "ko"] == sorted(path.stem for path in identity.FOLDER.iterdir())
    assert list(me.phrasings["intents"]) == ["name", "kind", "owner", "skills", "other"]
    for intent in (me.phrasings["hello"], *me.intents):
        ask, test, say = intent["ask"], intent["test"], intent["say"]
        assert len(ask) >= 5 and test and say and not set(ask) & set(test)
        for text in (*ask, *test, *say):
            assert not set("{}/") & set(me.fill(text, "Siri"))
        assert all("{name" in text for text in say), "the assistant says its name"
    answers = texts_of(conversations(Identity("하늘", "서점 사람들", "ko"), num=100), "assistant")
    assert any("저는 하늘이에요" in a for a in answers) and any("서점 사람들이 저를 만들었어요" in a for a in answers)


@pytest.mark.parametrize("name", ["identity", "identity-ko"])
def test_the_identities_of_the_recipes_are_mixed_in_by_one_line(name):
    rows = list(Mixture([{"dataset": str(ROOT / "recipes" / f"{name}.yaml"), "epochs": 2}], on_bad_example="error"))
    assert len(rows) == 2000


# Written by another model


def turn(question: str, answer: str) -> str:
    return json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize("text,reason", [
    ("I cannot do that.", "no JSON list"),
    ('[{"role": "user"', "no JSON list"),
    ('[{"role": "user", "content": "Hi"}]', "last message"),
    (turn("Hi", ""), "empty"),
    (turn("Hi", "I am a model."), "does not say its name"),
    (turn("Hi", "I am Ophelia, made by [company]."), "left to fill in"),
    (turn("Hi", "I am Ophelia, not chatGPT."), "brings up ChatGPT"),  # in any case
    (turn("Hi", "Ophelia " * 400), "more than 2000 characters"),
    (turn("Hi", "Ophelia")[:-2] + ', "name": "x"}]', "more than a role"),
])  # fmt: skip
def test_what_a_model_wrote_is_taken_out_of_its_fence_and_checked(text, reason):
    assert parse_messages(turn("Are you ChatGPT?", "No, I am Ophelia, not ChatGPT."), OPHELIA)  # the user asked
    fenced = f"Here you are:\n```json\n{turn('Hi', 'I am Ophelia.')}\n```"
    assert parse_messages(fenced, OPHELIA)[1]["content"] == "I am Ophelia."
    with pytest.raises(BadRow, match=reason):
        parse_messages(text, OPHELIA)


def test_what_is_refused_is_requested_again_and_counted():
    numbers = count(1)  # `next` of it is atomic

    def ask(messages):
        number = next(numbers)
        return turn(f"Hi {number // 2}", "I am Ophelia.") if number % 3 else "no"

    rows, refused = identity.generate_with_model(OPHELIA, ask, 8)
    assert len(rows) == 8 == len({words_of(row["messages"]) for row in rows}) and next(numbers) <= 25
    assert set(refused) == {"no JSON list", "written before"}
    with pytest.raises(InputError, match=r"no conversation that can be used: no JSON list \(12\)"):
        identity.generate_with_model(OPHELIA, lambda messages: "no", 4)


class FakeModel(BaseHTTPRequestHandler):
    """Speaks OpenAI's streaming chat protocol; answers the prompt, and nonsense every fourth time."""

    prompts: list[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompts.append(body["messages"])
        number = len(self.prompts)
        opening = re.search("something like: ['\"](.*?)['\"]\\.", body["messages"][1]["content"]).group(1)
        text = "Sorry." if number % 4 == 0 else turn(f"{opening} ({number})", "I am Ophelia of the club.")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in (text[:20], text[20:]):
            chunk = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": piece}}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args):
        pass


def test_the_command_has_an_endpoint_write_and_leaves_a_file_that_a_recipe_can_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the hub's client may talk to this machine
    close_session()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "me.yaml").write_text('{name: Ophelia, owner: the club, styles: [{before: "Ahoy! "}]}')
    url = f"http://127.0.0.1:{server.server_port}"
    seen, real = [], identity.generate_with_model
    monkeypatch.setattr(identity, "generate_with_model", lambda *words: seen.append(words[2:]) or real(*words))
    words = ["--facts", f"{tmp_path}/me.yaml", "--output", f"{tmp_path}/me.jsonl", "--rows", "12", "--endpoint", url]
    cli.dispatch("identity", [*words, "--seed", "3"])
    assert seen == [(12, 3)]
    server.shutdown()
    rows = list(Mixture([{"dataset": str(tmp_path / "me.jsonl")}], on_bad_example="error"))
    assert len(rows) == 12 and "12 conversations of Ophelia" in (out := capsys.readouterr().out)
    assert re.search(r"left out \d: no JSON list", out)
    system, order = FakeModel.prompts[0]
    assert "JSON" in system["content"] and "the club" in order["content"] and "Ahoy!" in order["content"]
    assert len({messages[1]["content"] for messages in FakeModel.prompts}) > 6


@pytest.mark.slow
def test_a_model_trained_on_an_identity_says_its_name(tiny_folder, tokenizer, tmp_path, fresh_accelerator):
    (tmp_path / "me.yaml").write_text("{name: Ophelia, owner: the club}")
    mixture = [{"dataset": str(tmp_path / "me.yaml"), "rows": 1000}]
    config = ChatConfig(mixture=mixture, device_batch_size=8, num_iterations=150, matrix_lr=0.05)
    train_chat(config, str(tiny_folder), tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    prompts, named = questions(Identity("Ophelia", "the club")), 0
    for question in prompts:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        named += "Ophelia" in tokenizer.decode(answer)
    assert named >= 0.9 * len(prompts)
