"""Weights to people: fast generation, HTTP server, terminal chat; here the parts of a completion that they pass on."""

import itertools
from collections.abc import Iterable


class StreamChunk(str):
    """A part of a completion. `kind` is "text", "call" (an expression for the tool) or "result" (the tool's reply)."""

    kind: str

    def __new__(cls, text: str, kind: str = "text"):
        chunk = super().__new__(cls, text)
        chunk.kind = kind
        return chunk


def join_chunks(chunks: Iterable[StreamChunk]) -> list[tuple[str, str]]:
    """(kind, text) of the chunks in order, neighbors of one kind joined."""
    return [(kind, "".join(group)) for kind, group in itertools.groupby(chunks, lambda chunk: chunk.kind)]


def text_of(chunks: Iterable[StreamChunk]) -> str:
    """The text of a completion, without calls and their results."""
    return "".join(chunk for chunk in chunks if chunk.kind == "text")
