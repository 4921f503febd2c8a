"""The tokenizer of karpathy/nanochat, a pickled tiktoken encoding, <-> a byte-level BPE of the tokenizers library.

Both merge neighboring bytes by rank after one split pattern, so the ids can be equal; `check_tokenizer` makes sure
that they are. Reading a pickle runs it: the unpickler here resolves one class, a substitute for tiktoken's, and
refuses by name whatever else a file asks for. So tiktoken need not be installed.

Sources: karpathy/nanochat, nanochat/tokenizer.py; openai/tiktoken, tiktoken/core.py (the fields of the pickle).
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import regex
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode


class Encoding:
    """Substitute for `tiktoken.core.Encoding` while its pickle is read: keeps the fields."""

    def __setstate__(self, fields):
        self.fields = fields


class OneClassUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise ValueError(f"the pickle asks for {module}.{name}: a tokenizer.pkl of nanochat needs tiktoken only")
        return Encoding


def read_tiktoken(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Reads tokenizer.pkl. Returns: (rank of each token's bytes, split pattern, ids of the special tokens)."""
    try:
        fields = OneClassUnpickler(io.BytesIO(path.read_bytes())).load().fields
        ranks, pattern, special = fields["mergeable_ranks"], fields["pat_str"], fields["special_tokens"]
        types = [{*map(type, values)} for values in (ranks, special, (pattern,), (*ranks.values(), *special.values()))]
        if types != [{bytes}, {str}, {str}, {int}]:
            raise ValueError("ranks, pattern or special tokens are of other types")
        return ranks, pattern, special
    except Exception as error:  # a damaged or dishonest pickle fails in many ways
        raise ValueError(f"{path} is no pickled tiktoken encoding: {error}") from None


def write_tiktoken(path: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> None:
    """Writes tokenizer.pkl. The class is written by hand around the fields: pickle names only installed classes."""
    fields = {"name": "rustbpe", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special}
    body = pickle.dumps(fields, protocol=3)[2:-1]  # without the protocol mark and the stop
    path.write_bytes(b"\x80\x03" + b"ctiktoken.core\nEncoding\n" + b")\x81" + body + b"b.")


def backend_from_ranks(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    """Returns the BPE of these byte ranks for `tokenizers`, without special tokens."""
    converter = TikTokenConverter(vocab_file=ranks, pattern=pattern)
    converter.load_tiktoken_bpe = lambda ranks: ranks
    return converter.converted()


def ranks_from_backend(backend: Tokenizer) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Returns (ranks, split pattern, special tokens) of a byte-level BPE; ValueError for another kind."""
    state, byte_of = json.loads(backend.to_str()), {letter: byte for byte, letter in bytes_to_unicode().items()}
    try:
        vocab = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in vocab}
        pattern = state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    except (KeyError, TypeError, IndexError):
        raise ValueError("upstream has byte-level BPE after one split pattern, and this tokenizer differs") from None
    if state["normalizer"]:
        raise ValueError("upstream does not normalize text, and this tokenizer does: its ids would differ")
    return ranks, pattern, {token["content"]: token["id"] for token in state["added_tokens"] if token["special"]}


def reference_encoder(ranks: dict[bytes, int], pattern: str) -> Callable[[str], list[int]]:
    """tiktoken's algorithm in a few slow lines: of all neighbors that make a token, the lowest rank merges first."""

    @lru_cache(maxsize=200_000)
    def encode_word(word: bytes) -> list[int]:
        parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    split = regex.compile(pattern)
    return lambda text: [index for word in split.findall(text) for index in encode_word(word.encode())]


def sample_texts(ranks: dict[bytes, int], count: int = 300, seed: int = 0) -> Iterator[str]:
    """Texts to compare tokenizers on: every token once, tokens in random order, random Unicode, odd blanks."""
    rng, tokens = random.Random(seed), list(ranks)
    for start in range(0, len(tokens), 100):
        yield b"".join(tokens[start : start + 100]).decode(errors="replace")
    for _ in range(count):
        yield b"".join(rng.choices(tokens, k=300)).decode(errors="replace")
        odd = (rng.choice((rng.randrange(32, 0xD800), rng.randrange(0x1F000, 0x1FAFF), 32, 10, 9)) for _ in range(200))
        yield "".join(map(chr, odd))
    yield "it's IT'S  we'll\r\n\n\n  12345 0,007 -3.14\t\tx=1;;  \n end   "


def check_tokenizer(tokenizer: Tokenizer, ranks: dict, pattern: str, special: dict, texts: Iterable[str] = ()) -> int:
    """Returns the number of ids compared, all equal; ValueError at the first text or special token that differs."""
    for name, index in special.items():
        if (other := tokenizer.token_to_id(name)) != index:
            raise ValueError(f"special token {name} has id {index} on one side and {other} on the other")
    plain, reference, compared = Tokenizer.from_str(tokenizer.to_str()), reference_encoder(ranks, pattern), 0
    plain.encode_special_tokens = True
    for text in chain(sample_texts(ranks), texts):
        expected = reference(text)
        if plain.encode(text, add_special_tokens=False).ids != expected:
            raise ValueError(f"the two tokenizers encode {text[:60]!r} differently: the conversion would be wrong")
        compared += len(expected)
    return compared
