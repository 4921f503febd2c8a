"""Bloat and bytes per token."""

from nanochat_hf.eval import sizes
from nanochat_hf.eval.sizes import ROOT, bloat, compression


def test_bloat_counts_the_checkout_and_only_that(tmp_path):
    assert bloat(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["a", "b"]\n')
    (tmp_path / "one.py").write_text("x = 1\n")
    for hidden in (".venv", "runs"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "two.py").write_text("x = 1\n" * 99)
    found = bloat(tmp_path)
    assert found == {"characters": 42, "lines": 3, "files": 2, "tokens": 10, "dependencies": 2}
    assert bloat()["files"] > 20


def test_bytes_per_token_stand_beside_those_of_the_vocabularies_at_hand(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(sizes, "OTHERS", {"GPT-2": str(tmp_path / "gpt2"), "GPT-4": str(tmp_path / "nothing")})
    found = compression(tokenizer)
    assert set(found) == {"books", "code", "korean", "math"}
    for name, row in found.items():
        text = (ROOT / "evals" / "texts" / f"{name}.txt").read_text(encoding="utf-8")
        expected = len(text.encode()) / len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert row == {"ours": expected, "GPT-2": expected, "GPT-4": None}
