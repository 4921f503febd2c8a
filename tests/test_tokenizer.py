"""The tokenizer: any text survives it byte for byte, no text becomes a special token, and merges are those of BPE."""

import copy
import json
import unicodedata
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import islice, pairwise

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from nanochat_hf.data import documents
from nanochat_hf.data import tokenizer as module
from nanochat_hf.data.documents import text_fingerprint
from nanochat_hf.data.tokenizer import SPECIAL_TOKENS, TokenizerConfig, encode_documents, load_tokenizer, train_bpe
from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError
from nanochat_hf.run import load_json

TEXTS = ["The cat sat on the mat, and the hat was 1234 feet away.\n\nIt didn't care.", "안녕하세요 세계, 안녕!"]
TEXTS.append("naïve café 🙂")
odd = ["<|", "|>", "bos", " ", "\n", "7", "한글", "👩‍👩‍👧", "e\u0301", "\x00", "'s"]
parts = st.sampled_from([*SPECIAL_TOKENS, *odd])
any_text = st.lists(st.one_of(parts, st.text())).map("".join)


@given(any_text)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_comes_back_byte_for_byte_and_holds_no_special_token_but_the_first(tokenizer, text):
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids[1:]).encode() == text.encode()
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:].tolist()) & set(tokenizer.all_special_ids)
    assert np.array(module.token_byte_lengths(tokenizer))[ids].sum() == len(text.encode())
    assert tokenizer("<|assistant_end|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]

    stripped = module.strip_special_tokens(text)
    assert not any(token in stripped for token in SPECIAL_TOKENS)
    assert stripped == text or any(token in text for token in SPECIAL_TOKENS)
    assert module.strip_special_tokens("a<|bos|>b") == "a<| bos |>b"
    for nested in ("<|bo<|bos|>s|>", "<|<|bos|>bos|>"):
        assert "<|bos|>" not in module.strip_special_tokens(nested)


def test_special_tokens_stand_last_and_in_order(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - 9, len(tokenizer)))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS) and tokenizer.padding_side == "left"
    marks = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert marks == ("<|bos|>", "<|assistant_end|>", "<|bos|>")
    lengths = np.array(module.token_byte_lengths(tokenizer))
    assert (lengths == 1).sum() == 256 and (lengths[-9:] == 0).all() and (lengths[:-9] > 0).all()


def test_a_saved_tokenizer_loads_with_the_auto_class_and_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n".join(TEXTS)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert [i for i, token in enumerate(again(text)["input_ids"]) if token == again.bos_token_id] == [0]
    assert again.chat_template == tokenizer.chat_template
    assert again.response_template == module.RESPONSE_TEMPLATE
    assert (again.padding_side, again.pad_token_id, len(again)) == ("left", tokenizer.pad_token_id, len(tokenizer))
    assert all((a == b).all() for a, b in zip(encode_documents(again, TEXTS), encode_documents(tokenizer, TEXTS)))
    again.bos_token = None
    with pytest.raises(InputError, match="no bos token"):
        encode_documents(again, TEXTS)


def test_the_split_pattern_is_that_of_upstream_with_digits_in_groups():
    def split(text, **options):
        parts = module.new_backend(**options).pre_tokenizer.pre_tokenize_str(text)
        return [text[a:b] for _, (a, b) in parts]

    assert split("I'll don'T  be 2024!!\n\n x\t\ty") == [
        *("I", "'ll", " don", "'T", " ", " be", " ", "20", "24", "!!\n\n", " x", "\t", "\ty")
    ]
    assert split("12345", digit_group=1) == list("12345") and split("12345") == ["12", "34", "5"]


def reference_merges(texts: list[str], num_merges: int) -> list[list[str]]:
    """BPE as it is defined: again and again the most frequent pair of neighbors; of equal ones, the smallest ids."""
    letters, pattern = module.byte_alphabet(), module.SPLIT_PATTERN.replace("GROUP", "2")
    words = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [([letters[byte] for byte in word.encode()], count) for word, count in words.items()]
    ids, merges = {letter: number for number, letter in enumerate(sorted(letters))}, []
    while len(ids) < 256 + num_merges:
        counts = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(list(best))
        ids.setdefault("".join(best), len(ids))
        for symbols, _ in words:
            at = 0
            while at < len(symbols) - 1:
                if tuple(symbols[at : at + 2]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
    return merges


@pytest.mark.filterwarnings("ignore:the text gives only")
def test_merges_are_those_of_the_definition():
    real = [*islice(primer.documents(), 60), "한국어 문장 " * 3, "  x\n\n y", "1234 56"]
    for texts, size in ((real, 265 + 150), (["aaaa aaa", "abab abba  ba", "aa"], 265 + 12), (["abc"] * 2, 300)):
        tokenizer = train_bpe(texts, size)
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert merges == reference_merges(texts, size - 265) and len(tokenizer) == 265 + len(merges)
    assert sorted(module.byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert "".join(module.byte_alphabet()[:128]) == shown.pre_tokenize_str("".join(map(chr, range(128))))[0][0]


@pytest.mark.filterwarnings("ignore:the text gives only")
def test_training_is_deterministic_and_composes_letters_on_request():
    decomposed = unicodedata.normalize("NFD", "한글 café")
    plain, composed = train_bpe(TEXTS, 300), train_bpe(iter(TEXTS), 300, normalization="nfc")
    assert plain.get_vocab() == train_bpe(iter(TEXTS), 300).get_vocab()
    a, b = encode_documents(composed, [decomposed, "한글 café"])
    assert a.tolist() == b.tolist() and composed.decode(a[1:]) == "한글 café"
    assert plain.decode(encode_documents(plain, [decomposed])[0][1:]) == decomposed


def test_an_older_chat_template_of_ours_is_renewed_and_another_stays(tokenizer, tmp_path, monkeypatch):
    older, other = "{# older #}", "{# somebody's own #}{{ messages[0].content }}"
    monkeypatch.setattr(module, "OLD_TEMPLATES", (sha256(older.encode()).hexdigest()[:16],))
    for template, expected in ((older, tokenizer.chat_template), (other, other), (None, None)):
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        if template:
            (tmp_path / "chat_template.jinja").write_text(template)
        loaded = load_tokenizer(tmp_path)
        assert loaded.chat_template == expected
        same = module.tokenizer_fingerprint(loaded) == module.tokenizer_fingerprint(tokenizer)
        assert same is (expected == tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path)
    config = load_json(tmp_path / "tokenizer_config.json")
    for response_template, expected in (({"fields": {}}, module.RESPONSE_TEMPLATE), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": response_template}))
        assert getattr(load_tokenizer(tmp_path), "response_template", None) == expected


@pytest.mark.parametrize("size,dtype", [(512, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_every_id_fits_into_its_dtype(size, dtype):
    assert module.token_dtype(range(size)) is dtype and np.iinfo(dtype).max >= size - 1


def test_the_assistants_tokens_are_read_off_the_ids(tokenizer):
    ids = dict(zip("^u)a(p>o<", tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))))
    row = "^u..)a..p.>o..<..(u.)a(a.p.>o."  # the last result is cut off
    mask = "".join(str(one) for one in module.assistant_mask(tokenizer, [ids.get(c, 0) for c in row]))
    assert [c for c, one in zip(row, mask) if one == "1"] == list("..p.>..((.p.>")


def test_the_stage_writes_a_folder_with_its_figures(tmp_path, monkeypatch):
    opened, real = [], documents.open_documents
    monkeypatch.setattr(documents, "open_documents", lambda *a, **keys: opened.append(keys) or real(*a, **keys))
    texts = [f"Document {i} tells that the number {i * i} follows {i * i - 1}." for i in range(320)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizerConfig(dataset=str(tmp_path / "d.jsonl"), vocab_size=300, max_chars=9010, doc_cap=40)
    module.train_tokenizer(config, tmp_path / "tokenizer")
    tokenizer, metrics = load_tokenizer(tmp_path / "tokenizer"), load_json(tmp_path / "tokenizer" / "metrics.json")
    assert metrics["inputs"] == {"data": text_fingerprint(config.dataset)}
    assert metrics["finished"] and metrics["vocab_size"] == len(tokenizer) == 300
    assert metrics["train_chars"] == 9010  # the last document is cut
    exact = replace(config, max_chars=9000, seed=3, skip_bad_files=True)
    module.train_tokenizer(exact, tmp_path / "exact")
    assert load_json(tmp_path / "exact" / "metrics.json")["train_chars"] == 9000
    assert opened[::2] == opened[1::2] == [{"seed": s, "skip_bad_files": bool(s)} for s in (0, 3)]  # of both splits
    validation, whole = [text[:40] for text in texts[301:]], replace(config, max_chars=10**6)
    monkeypatch.setattr(module, "VALIDATION_CHARS", 40)
    module.train_tokenizer(whole, tmp_path / "whole")
    numbers, of = load_json(tmp_path / "whole" / "metrics.json"), load_tokenizer(tmp_path / "whole")
    assert numbers["train_chars"] == 301 * 40  # of the lines that begin in 15 of 16 parts of the file
    assert numbers["bytes_per_token"] == module.bytes_per_token(of, validation[:1])
    assert metrics["bytes_per_token"] == pytest.approx(module.bytes_per_token(tokenizer, validation), rel=0.05)
    with pytest.raises(InputError):  # a stage that fails leaves nothing that looks finished
        module.train_tokenizer(TokenizerConfig(dataset=str(tmp_path / "none.jsonl")), tmp_path / "other")
    assert not (tmp_path / "other" / "metrics.json").exists()


def test_documents_are_whole_and_without_padding_whatever_the_tokenizer_was_used_for(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=64)
    for ids, expected in zip(encode_documents(other, TEXTS), encode_documents(tokenizer, TEXTS), strict=True):
        assert ids.tolist() == expected.tolist() and tokenizer.decode(ids[1:]) in TEXTS


def test_bytes_per_token_counts_no_bos(tokenizer):
    texts = ["가나다 abc", "x" * 50]
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert module.bytes_per_token(tokenizer, texts) == (13 + 50) / num_tokens
    with pytest.raises(InputError, match="no text to measure"):
        module.bytes_per_token(tokenizer, [])


def test_a_text_that_is_too_short_for_a_vocabulary_is_told():
    with pytest.warns(UserWarning, match=r"the text gives only \d+ tokens, not 400"):
        train_bpe(iter(["abc"]), vocab_size=400)
