"""The tokenizer of karpathy/nanochat, a pickled tiktoken encoding, <-> a byte-level BPE of the tokenizers library.

Both merge neighbouring bytes by rank after one split pattern, so the ids can be equal; `check_tokenizer` makes sure
that they are. Reading a pickle is running it: the unpickler here knows one class, a stand-in for tiktoken's, and names
and refuses whatever else a file asks for; so tiktoken need not be installed. Used by `convert.convert`.

Sources: karpathy/nanochat, nanochat/tokenizer.py; openai/tiktoken, tiktoken/core.py (the fields of the pickle).
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode


class Encoding:
    """Stands for `tiktoken.core.Encoding` while its pickle is read: keeps the fields."""

    def __setstate__(self, fields):
        self.fields = fields


class OneClassUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise ValueError(f"the pickle asks for {module}.{name}: a tokenizer.pkl of nanochat needs tiktoken only")
        return Encoding


def read_tiktoken(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """tokenizer.pkl -> (rank of each token's bytes, split pattern, ids of the special tokens)."""
    try:
        fields = OneClassUnpickler(io.BytesIO(path.read_bytes())).load().fields
        ranks, pattern, special = fields["mergeable_ranks"], fields["pat_str"], fields["special_tokens"]
        kinds = [{*map(type, values)} for values in (ranks, special, (pattern,), (*ranks.values(), *special.values()))]
        if kinds != [{bytes}, {str}, {str}, {int}]:
            raise ValueError("ranks, pattern or special tokens are of other types")
        return ranks, pattern, special
    except Exception as error:  # a damaged or dishonest pickle fails in many ways
        raise ValueError(f"{path} is no pickled tiktoken encoding: {error}") from None


def write_tiktoken(path: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> None:
    """The reverse. Written by hand around the fields: pickle names only classes that are installed."""
    fields = {"name": "rustbpe", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special}
    body = pickle.dumps(fields, protocol=3)[2:-1]  # without the protocol mark and the stop
    path.write_bytes(b"\x80\x03" + b"ctiktoken.core\nEncoding\n" + b")\x81" + body + b"b.")


def backend_from_ranks(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    """Byte ranks and a split pattern -> the same BPE for `tokenizers`, without special tokens."""
    converter = TikTokenConverter(vocab_file=ranks, pattern=pattern)
    converter.load_tiktoken_bpe = lambda ranks: ranks
    return converter.converted()


def ranks_from_backend(backend: Tokenizer) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """A byte-level BPE of `tokenizers` -> (ranks, split pattern, special tokens); ValueError for another kind."""
    made = json.loads(backend.to_str())
    special = {token["content"]: token["id"] for token in made["added_tokens"] if token["special"]}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    try:
        vocab = backend.get_vocab(with_added_tokens=False)
        ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in vocab.items()}
        pattern = made["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            "upstream knows byte-level BPE after one split pattern only, and this tokenizer differs"
        ) from None
    if made["normalizer"]:
        raise ValueError("upstream does not normalise text, and this tokenizer does: its ids would differ")
    return dict(sorted(ranks.items(), key=lambda item: item[1])), pattern, special


def reference_encoder(ranks: dict[bytes, int], pattern: str) -> Callable[[str], list[int]]:
    """tiktoken's algorithm in a few slow lines: of all neighbours that make a token, the lowest rank merges first."""

    @lru_cache(maxsize=200_000)
    def encode_piece(piece: bytes) -> list[int]:
        parts = [piece] if piece in ranks else [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    split = regex.compile(pattern)
    return lambda text: [index for piece in split.findall(text) for index in encode_piece(piece.encode())]


def sample_texts(ranks: dict[bytes, int], count: int = 300, seed: int = 0) -> Iterator[str]:
    """Texts to compare tokenizers on: every token once, tokens in random order, random Unicode, odd blanks."""
    rng, tokens = random.Random(seed), list(ranks)
    for start in range(0, len(tokens), 100):
        yield b"".join(tokens[start : start + 100]).decode(errors="replace")
    for _ in range(count):
        yield b"".join(rng.choices(tokens, k=300)).decode(errors="replace")
        points = (
            rng.choice((rng.randrange(32, 0xD800), rng.randrange(0x1F000, 0x1FAFF), 32, 10, 9)) for _ in range(200)
        )
        yield "".join(map(chr, points))
    yield "it's IT'S  we'll\r\n\n\n  12345 0,007 -3.14\t\tx=1;;  \n end   "


def check_tokenizer(tokenizer: Tokenizer, ranks: dict, pattern: str, special: dict, texts: Iterable[str] = ()) -> int:
    """-> number of ids compared, all equal; raises ValueError at the first text or special token that differs."""
    for name, index in special.items():
        if tokenizer.token_to_id(name) != index:
            raise ValueError(
                f"special token {name} has id {index} on one side and {tokenizer.token_to_id(name)} on the other"
            )
    plain, reference, compared = Tokenizer.from_str(tokenizer.to_str()), reference_encoder(ranks, pattern), 0
    plain.encode_special_tokens = True
    for source in (sample_texts(ranks), texts):
        for text in source:
            expected = reference(text)
            if plain.encode(text, add_special_tokens=False).ids != expected:
                raise ValueError(f"the two tokenizers encode {text[:60]!r} differently: the conversion would be wrong")
            compared += len(expected)
    return compared
