"""Byte-pair merges from text, fast on few cores: count words in Arrow, merge in numpy.

    merges = learn_merges(count_words(texts, pattern), num_merges)        # [(b" t", b"he"), ...] in order

The merges are those of `tokenizers.trainers.BpeTrainer` on the same text, ties included (a test compares them), which
spends most of its time splitting text by the pattern, again and again the same words. Here text is first cut at blanks
that the pattern never joins across, equal chunks are counted in C++, and only distinct chunks meet the pattern.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

BATCH_CHARS = 1 << 24
DEAD, EDGE = -2, -1  # symbols of a position that was merged away, and of the gap between two words


def byte_alphabet() -> list[str]:
    """The 256 letters that byte-level tokenizers write bytes as (GPT-2's table), in the order of the bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


# A chunk begins at a blank that a visible character follows. No match of the pattern goes on over such a blank, none
# looks behind, and what precedes it is matched the same when the text ends there. So chunks can be split one by one.
CHUNK = regex.compile(r" (?=\S)")
HELD = "\x01"  # stands for a blank that begins no chunk, while text is cut at the others
ODD_BLANK = (
    r" (?:[\s\v\x{85}\x{1c}-\x{1f}\p{Z}]|$)"  # (RE2) other blanks that begin no chunk: before a tab, at the end
)


def count_words(texts: Iterable[str], pattern: str, num_threads: int = 4) -> Counter:
    """How often each word, as `pattern` splits text, occurs in the texts. The pattern must have `CHUNK`'s property."""
    tables: list[pa.Table] = []
    with ThreadPoolExecutor(num_threads) as threads:
        running: deque[Future] = deque()
        for batch in batches_of(texts):
            running.append(threads.submit(count_chunks, batch))
            if len(running) > num_threads:  # bounds what is in memory, as does summing up now and then
                tables.append(running.popleft().result())
            if len(tables) == 16:
                tables = [summed(tables)]
        tables += [future.result() for future in running]
    words: Counter = Counter()
    if tables:
        split = regex.compile(pattern).findall
        chunks = summed(tables)
        for chunk, count in zip(chunks["chunk"].to_pylist(), chunks["count"].to_pylist()):
            # Most chunks are a word of letters with its blank, which needs no pattern.
            for word in [chunk] if chunk[:1] == " " and chunk[1:].isalpha() else split(chunk):
                words[word] += count
    return words


def summed(tables: list[pa.Table]) -> pa.Table:
    """One row a chunk, with its total where that is not 0."""
    table = pa.concat_tables(tables).combine_chunks()
    chunks = table["chunk"].combine_chunks().dictionary_encode()  # several times as fast as group_by
    totals = np.bincount(chunks.indices, table["count"]).astype(np.int64)  # sums of floats: exact below 2^53
    return pa.table({"chunk": chunks.dictionary, "count": totals}).filter(pa.array(totals != 0))


def batches_of(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_chunks(texts: list[str]) -> pa.Table:
    """Columns chunk and count (a chunk may stand in several rows)."""
    array = pa.array(texts, pa.large_string())
    odd = pc.match_substring(array, HELD)
    # Of several blanks only the last can begin a chunk: hold the others. Three replacements do it for any number.
    for several, held in (("  ", HELD + " "), (" " + HELD, HELD * 2), ("  ", HELD + " ")):
        array = pc.replace_substring(array, several, held)
    odd = pc.or_(odd, pc.match_substring_regex(array, ODD_BLANK))
    # Now the chunks of the usual text, which has no other blanks, are counted without their own ...
    pieces = pc.value_counts(pc.split_pattern(array.filter(pc.invert(odd)), " ").flatten())
    empty, blank = pa.scalar("", pa.large_string()), pa.scalar(" ", pa.large_string())
    joined = pc.replace_substring(pc.binary_join_element_wise(empty, pieces.field(0), blank), HELD, " ")
    usual = pa.table({"chunk": joined, "count": pieces.field(1)})
    # ... except that a text's first chunk has none. Odd text is cut one by one.
    rest: Counter = Counter()
    for text, is_odd in zip(texts, odd.to_pylist()):
        first, *others = CHUNK.split(text, maxsplit=0 if is_odd else 1)
        rest[first] += 1
        if is_odd:
            rest.update(" " + other for other in others)
        else:
            rest[" " + first] -= 1
    others = pa.table({"chunk": pa.array(rest, pa.large_string()), "count": pa.array(rest.values(), pa.int64())})
    return pa.concat_tables([usual, others])


def learn_merges(words: dict[str, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """At most `num_merges` merges that each make a new token, most frequent pair first; fewer when no pair is left.

    All distinct words lie in one array of symbols, linked to their neighbours, so that one merge is a few numpy calls
    on the places where its pair stands. Equal counts are decided as `tokenizers` does: the pair of smaller ids first,
    where ids follow the order of the byte letters and then of the merges.
    """
    order = sorted(range(256), key=byte_alphabet().__getitem__)
    token_of_id = [bytes([byte]) for byte in order]
    id_of_token = {token: number for number, token in enumerate(token_of_id)}
    id_of_byte = np.argsort(order).astype(np.int32)

    encoded = [word.encode() for word in words]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    gaps = np.concatenate([[0], np.cumsum(lengths + 1)])  # a gap before every word and one at the end
    symbol = np.full(gaps[-1] + 1, EDGE, np.int32)
    inside = np.ones(len(symbol), bool)
    inside[gaps] = False
    symbol[inside] = id_of_byte[np.frombuffer(b"".join(encoded), np.uint8)]
    weight = np.zeros(len(symbol), np.int64)
    weight[inside] = np.repeat(np.fromiter(words.values(), np.int64, len(encoded)), lengths)
    following = np.arange(1, len(symbol) + 1, dtype=np.int32)
    previous = np.arange(-1, len(symbol) - 1, dtype=np.int32)
    flag = np.zeros(len(symbol), bool)

    counts: dict[int, int] = {}  # pair (left id << 32 | right id) -> how often it stands in the text
    places: dict[int, list[np.ndarray]] = {}  # pair -> where its left symbol stands, or once stood
    heap: list[tuple[int, int]] = []  # (-count, pair); counts may be out of date

    def groups(pairs: np.ndarray, where: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each distinct pair with its summed weight and its places."""
        by_pair = pairs.argsort(kind="stable")
        pairs, where = pairs[by_pair], where[by_pair]
        is_start = np.ones(len(pairs), bool)
        np.not_equal(pairs[1:], pairs[:-1], out=is_start[1:])
        starts = is_start.nonzero()[0]
        totals = np.add.reduceat(weight[where], starts) if len(starts) else starts
        edges = [*starts.tolist(), len(pairs)]
        for i, (pair, total) in enumerate(zip(pairs[starts].tolist(), totals.tolist())):
            yield pair, total, where[edges[i] : edges[i + 1]]

    def add(pairs: np.ndarray, where: np.ndarray) -> None:
        for pair, total, here in groups(pairs, where):
            counts[pair] = counts.get(pair, 0) + total
            places.setdefault(pair, []).append(here)
            heapq.heappush(heap, (-counts[pair], pair))

    def remove(pairs: np.ndarray, where: np.ndarray) -> None:
        for pair, total, _ in groups(pairs, where):
            counts[pair] -= total

    def pair_at(where: np.ndarray) -> np.ndarray:
        return symbol[where].astype(np.int64) << 32 | symbol[following[where]]

    at = np.flatnonzero((symbol[:-1] >= 0) & (symbol[1:] >= 0))
    add(pair_at(at), at)
    merges = []
    while heap and len(id_of_token) < 256 + num_merges:
        count, pair = heapq.heappop(heap)
        if counts.get(pair, 0) != -count:
            if counts.get(pair, 0) > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if count == 0:
            break
        left, right = pair >> 32, pair & 0xFFFFFFFF
        at = np.concatenate(places.pop(pair))
        at = at[(symbol[at] == left) & (symbol[following[at]] == right)]
        if left == right:  # of a run aaa only every other pair can be merged
            at.sort()
            index = np.arange(len(at))
            begins = np.concatenate([[True], following[at[:-1]] != at[1:]])
            at = at[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]
        merges.append((token_of_id[left], token_of_id[right]))
        token = token_of_id[left] + token_of_id[right]
        if token not in id_of_token:  # the same bytes may have come from another pair
            id_of_token[token] = len(token_of_id)
            token_of_id.append(token)

        second = following[at]
        before, after = previous[at], following[second]
        flag[second] = True  # in abab the pair ba belongs to both merges: count it with the first
        lost = before[(symbol[before] >= 0) & ~flag[before]]
        flag[second] = False
        lost = np.concatenate([lost, second[symbol[after] >= 0]])
        remove(pair_at(lost), lost)
        counts.pop(pair, None)

        symbol[at], symbol[second] = id_of_token[token], DEAD
        following[at], previous[after] = after, at
        before = previous[at]
        flag[at] = True
        won = before[(symbol[before] >= 0) & ~flag[before]]
        flag[at] = False
        won = np.concatenate([won, at[symbol[after] >= 0]])
        add(pair_at(won), won)
    return merges
