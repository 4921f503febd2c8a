"""CORE's data: the official bundle is fetched whole or not at all, and the four tasks that it alone has."""

import hashlib
import io
import json
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_evals_tasks import function, manager


@pytest.fixture
def bundle_server(tmp_path):
    """A stand-in for the bundle's storage: .packed is the zip's bytes, .answer changes what is sent of it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        archive.writestr("eval_bundle/eval_data/commonsense_reasoning/copa.jsonl", random.randbytes(3 << 20).hex())
    packed = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            headers, body = server.answer(packed)
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.packed = 0, packed
    server.answer = lambda body: ({"Content-Length": len(body), "ETag": f'"{hashlib.md5(body).hexdigest()}"'}, body)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"
    yield server
    server.shutdown()


@pytest.fixture
def core_bundle(bundle_server, tmp_path, monkeypatch):
    """The function of that name, with an empty cache and the stand-in as the place to download from."""
    found = function("core.core_bundle")
    monkeypatch.delenv("NANOCHAT_CORE_BUNDLE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(found.__globals__, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(found.__globals__, "BUNDLE_URL", bundle_server.url)
    return found


def test_the_bundle_is_fetched_once_with_progress_and_its_checksum_kept(core_bundle, bundle_server, tmp_path, capsys):
    folder = core_bundle()
    assert folder == tmp_path / "cache" / "eval_bundle" and core_bundle() == folder
    assert bundle_server.requests == 1
    assert (folder / "core.yaml").is_file()
    assert len((folder / "eval_data/commonsense_reasoning/copa.jsonl").read_text()) == 6 << 20
    assert (folder / "SHA256").read_text().strip() == hashlib.sha256(bundle_server.packed).hexdigest()
    shown = capsys.readouterr().err
    assert "CORE bundle: 100%" in shown and "B/s" in shown


@pytest.mark.parametrize("harm", ["cut", "checksum", "no zip", "refused"])
def test_a_damaged_download_is_one_clear_line_and_leaves_nothing(core_bundle, bundle_server, tmp_path, harm):
    whole = bundle_server.answer
    bundle_server.answer = {
        "cut": lambda body: (whole(body)[0], body[: len(body) // 2]),
        "checksum": lambda body: (whole(body[:-1] + b"x")[0], body),
        "no zip": lambda body: whole(b"<html>try later</html>"),
        "refused": whole,
    }[harm]
    if harm == "refused":
        bundle_server.shutdown()
        bundle_server.server_close()
    with pytest.raises(
        ValueError, match="cannot download" if harm == "refused" else "damaged|cannot download"
    ) as error:
        core_bundle()
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["eval_bundle.lock"]


# Rows as the official bundle has them.
HELLASWAG = {
    "query": "Roof shingle removal: A man is sitting on a roof. he",
    "choices": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a cube.",
        "starts.",
    ],
    "gold": 3,
}
SQUAD = {
    "context": "Context: The Normans were the people who in the 10th and 11th centuries gave their name to Normandy.\n"
    "Question: In what centuries?\nAnswer: ",
    "continuation": "10th and 11th",
    "answer": "10th and 11th",
    "aliases": ["10th and 11th"],
}
COQA = {
    "context": "Story: Once upon a time, in a barn near a farm house, there lived a little white kitten.\n\n"
    "Preceding questions:\nQuestion: Where did she live?\nAnswer: in a barn\n\nFinal question:\n"
    "Question: What color was the kitten?\nAnswer:",
    "continuation": "white",
}


@pytest.mark.parametrize(
    "label,row,shots,expected",
    [
        ("hellaswag_zeroshot", HELLASWAG, 0, [f"{HELLASWAG['query']} {choice}" for choice in HELLASWAG["choices"]]),
        (
            "hellaswag",
            HELLASWAG,
            1,
            [f"{HELLASWAG['query']} starts.\n\n{HELLASWAG['query']} {choice}" for choice in HELLASWAG["choices"]],
        ),
        ("coqa", COQA, 0, [COQA["context"], f"{COQA['context']} white"]),
        (
            "squad",
            SQUAD,
            1,
            [f"{SQUAD['context']}10th and 11th\n\n{SQUAD['context'][:-1]}{end}" for end in ("", " 10th and 11th")],
        ),
    ],
)
def test_the_prompts_of_the_four_large_tasks(tmp_path, label, row, shots, expected):
    task = manager(core_bundle=str(tmp_path)).load([f"nanochat_core_{label}"])["tasks"][f"nanochat_core_{label}"]
    assert task.prompts(row, [row] * shots) == expected
    assert task.config.num_fewshot == {"hellaswag": 10, "squad": 10}.get(label, 0)


@pytest.mark.parametrize("label,row", [("hellaswag", HELLASWAG), ("squad", SQUAD), ("coqa", COQA)])
def test_the_scored_tokens_of_the_four_large_tasks_are_the_answers(tmp_path, tokenizer, tiny_model, label, row):
    task = manager(core_bundle=str(tmp_path)).load([f"nanochat_core_{label}"])["tasks"][f"nanochat_core_{label}"]
    (tmp_path / "core.yaml").write_text("")
    file = tmp_path / "eval_data" / task.config.dataset_path
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(12)))
    task.use(tokenizer, tiny_model.config)
    task.build_all_requests(limit=1)
    said = [tokenizer.decode(request.continuation).strip() for request in task.instances]
    if label == "hellaswag":
        assert [text in choice for text, choice in zip(said, row["choices"])] == [True] * 4
    else:
        assert said == [row["continuation"]]
