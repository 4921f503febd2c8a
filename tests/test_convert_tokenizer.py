"""Tokenizers of karpathy/nanochat: equal ids in both directions, and a pickle that can only name tiktoken."""

import os
import pickle

import pytest
from tokenizers import normalizers

from nanochat_hf.convert.tokenizer import (
    backend_from_ranks,
    check_tokenizer,
    ranks_from_backend,
    read_tiktoken,
    reference_encoder,
    write_tiktoken,
)
from nanochat_hf.data.tokenizer import SPECIAL_TOKENS, wrap

PATTERN = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"


def hand_made_ranks() -> dict[bytes, int]:
    """All bytes, then merges: the kind of table that rustbpe trains."""
    merges = [b"th", b"he", b"the", b" the", b"in", b"ing", b"aa", b"aaa", "é".encode(), b"12", b" s", b" sing"]
    return {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merges)}


def test_the_reference_merges_the_lowest_rank_first():
    encode = reference_encoder(hand_made_ranks(), PATTERN)
    assert encode("the") == [258] and encode(" the") == [259]
    assert encode("thhe") == [256, 257]
    assert encode("aaaa") == [262, 262]  # the pairs `aa` come before `aaa`
    assert encode("aaaaa") == [262, 263]
    assert encode("1234") == [265, ord("3"), ord("4")]
    assert encode("é\n") == [264, 10]


def test_ranks_become_a_tokenizer_with_equal_ids():
    ranks = hand_made_ranks()
    tokenizer = wrap(backend_from_ranks(ranks, PATTERN))
    special = {name: 268 + i for i, name in enumerate(SPECIAL_TOKENS)}
    texts = ["in the singing aaaaaaa", "naïve café 1234567", "", "\r\n \t"]
    assert check_tokenizer(tokenizer.backend_tokenizer, ranks, PATTERN, special, texts) > 10_000
    assert tokenizer.decode(tokenizer("the café", add_special_tokens=False)["input_ids"]) == "the café"


def test_a_trained_tokenizer_goes_to_tiktoken_and_back(tokenizer, tmp_path):
    ranks, pattern, special = ranks_from_backend(tokenizer.backend_tokenizer)
    assert len(ranks) + len(special) == len(tokenizer) and special["<|output_end|>"] == len(tokenizer) - 1
    assert check_tokenizer(tokenizer.backend_tokenizer, ranks, pattern, special) > 10_000
    write_tiktoken(tmp_path / "tokenizer.pkl", ranks, pattern, special)
    assert read_tiktoken(tmp_path / "tokenizer.pkl") == (ranks, pattern, special)
    again = wrap(backend_from_ranks(ranks, pattern))
    text = "What is the capital of Verdania? 12 + 345 = 357\n\n日本語 🙂"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_written_pickle_is_what_tiktoken_itself_reads(tokenizer, tmp_path, monkeypatch):
    import sys
    import types

    class Encoding:  # as tiktoken.core.Encoding, which takes its fields back in __setstate__
        def __setstate__(self, fields):
            self.fields = fields

    core = types.ModuleType("tiktoken.core")
    core.Encoding = Encoding
    monkeypatch.setitem(sys.modules, "tiktoken", types.ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, "tiktoken.core", core)
    ranks, pattern, special = ranks_from_backend(tokenizer.backend_tokenizer)
    write_tiktoken(tmp_path / "tokenizer.pkl", ranks, pattern, special)
    loaded = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert type(loaded) is Encoding and loaded.fields["mergeable_ranks"] == ranks


def test_a_difference_is_found_and_shown():
    ranks = hand_made_ranks()
    tokenizer = wrap(backend_from_ranks(ranks, PATTERN)).backend_tokenizer
    other = dict(ranks)
    other[b"th"], other[b"he"] = other[b"he"], other[b"th"]
    with pytest.raises(ValueError, match=r"encode .* differently"):
        check_tokenizer(tokenizer, other, PATTERN, {})
    with pytest.raises(ValueError, match=r"special token <\|bos\|> has id 7"):
        check_tokenizer(tokenizer, ranks, PATTERN, {"<|bos|>": 7})


def test_a_pickle_that_wants_more_is_refused_by_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("echo this must not run > " + str(tmp_path / "ran"),)

    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"(posix|nt).system"):
        read_tiktoken(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x03ctiktoken.core\nEncoding\n)R}b.",  # no fields
        pickle.dumps({"mergeable_ranks": {}}),
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",  # a frame longer than the file
    ],
)
def test_what_is_no_tiktoken_encoding_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no pickled tiktoken encoding"):
        read_tiktoken(path)


def test_fields_of_other_types_are_refused(tmp_path):
    path = tmp_path / "tokenizer.pkl"
    for ranks, pattern in (({"a": 0}, PATTERN), ({b"a": "0"}, PATTERN), ({b"a": 0}, b"x"), ([b"a"], PATTERN)):
        write_tiktoken(path, ranks, pattern, {"<|bos|>": 1})
        with pytest.raises(ValueError, match="no pickled tiktoken encoding"):
            read_tiktoken(path)


def test_a_tokenizer_that_upstream_cannot_express_is_refused(tokenizer):
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="byte-level BPE"):
        ranks_from_backend(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    normalizing = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    normalizing.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="does not normalize"):
        ranks_from_backend(normalizing)
