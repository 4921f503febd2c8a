"""`nanochat data prepare`: text of any source -> filtered, de-duplicated, shuffled parquet shards and their data card.

Workers filter parts of the text and keep a few hashes per document. One process finds the duplicates in the hashes.
Then workers gather the shards in shuffled order. All this happens in a hidden folder beside the output, where a file
gets its name when it is complete. What is in a file depends on text and settings alone. So an interrupted run
resumes, and the number of workers changes nothing.

Near duplicates: MinHash LSH of 5-word shingles, 14 bands of 8 hashes as for FineWeb (arXiv 2406.17557). Test rows: 13
words in a row, as for GPT-3 (arXiv 2005.14165). Neither depends on case or punctuation.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, lru_cache
from hashlib import blake2b
from importlib import metadata
from itertools import chain
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from jinja2 import Template
from numpy.lib.stride_tricks import sliding_window_view
from typing_extensions import TypedDict

from ..errors import InputError
from ..run import load_json, nearest, save_json, save_text, track, writing
from .documents import DatasetSplit, File, Parquet, content_hash, list_files, local_path, log
from .splits import SUFFIXES, UNREAD, has_suffix, listed, split_of, text_files, unread_files

KINDS = *((suffix,) for suffix in SUFFIXES), (".txt", ".md")  # of files; the first that a folder has is read
PART_BYTES = 1 << 24  # of text that a worker filters at once
SHARD_CHARS = 10**8
ROW_GROUP = 1024  # documents
NGRAM, SHINGLE, NUM_BANDS, BAND = 13, 5, 14, 8
# Thai to Burmese, Khmer, Japanese, Chinese: scripts without spaces, in which every character is a word
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[^\W_{UNSPACED}]+|[{UNSPACED}]")
POWERS = np.cumprod(np.full(NGRAM, 0x9E3779B97F4A7C15, np.uint64))  # of a polynomial hash modulo 2**64
BANDS = [f"band_{number}" for number in range(NUM_BANDS)]
FILTERS = ("without words", "too short", "too long", "other language", "contaminated")


class Source(TypedDict):
    name: str
    commit: str | None


class Begun(TypedDict):
    """run.json in the hidden folder."""

    sources: list[Source]
    settings: dict[str, Any]


class Finished(Begun):
    """stats.json in the output."""

    counts: dict[str, list[int]]


def prepare(sources: list[str], settings: dict, output: Path, workers: int, eval_rows: Callable[[], Iterable]) -> dict:
    """Write the shards, README.md and stats.json into `output`; returns the counts. The same call resumes.

    `settings` are those of the command; `eval_rows` gives the (task, row) pairs to decontaminate against, (task, None)
    for a task without rows. Raises InputError: a source that is missing, empty or unreadable, an output folder of
    something else, a full disk, too few documents left. Raises ModuleNotFoundError without the extra `data`.
    """
    output = output.resolve()  # a link to a folder cannot be replaced
    work = output.parent / f".{output.name}.prepare"
    finished = load_json(output / "stats.json", f"delete {output}", Finished)
    begun = load_json(work / "run.json", f"delete {work}", Begun)
    if not begun and work.is_dir() and any(not name.startswith(".") for name in os.listdir(work)):
        raise InputError(f"{work} is in the way, and no unfinished work of this command: move it away")
    if not finished and output.exists() and (output.is_mount() or any(output.iterdir())):
        why = "a disk of its own: choose a folder on it" if output.is_mount() else "not empty: choose another --output"
        raise InputError(f"{output} is {why}")
    versions = {name: metadata.version(name) for name in ("datasketch", "numpy", "py3langid", "pyarrow")}
    for language in settings["languages"] or ():
        if language not in identifier().labels:
            raise InputError(f"--languages: no language {language!r}; {nearest(language, identifier().labels)}")
    files, records = find_sources(sources, (finished or begun or {}).get("sources", []))
    if around := next((name for name in sources if output.is_relative_to(local_path(name).resolve())), None):
        raise InputError(f"{output} lies in the source {around}: choose another --output, outside of it")
    places = {key: settings.get(key) for key in ("core_bundle", "chat_data")}
    folders = {key: Path(place).resolve().name for key, place in places.items() if place}  # the card may be published
    record = {"settings": settings | folders, "sources": records, "versions": versions}
    record = json.loads(json.dumps(record))  # as a finished or an unfinished one is read
    for key in ("settings", "sources", "versions")[: 2 if finished else 3]:
        if (old := finished or begun or record).get(key) != record[key]:
            where = output if finished else f"the unfinished {work}"
            raise InputError(f"{where} has other {key} ({old.get(key)}): delete it, or choose another --output")
    if finished:
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at the very end
        return finished["counts"]
    with writing(output):
        work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock", timeout=0):
            return write_dataset(record, files, output, work, workers, eval_rows)
    except Timeout:
        raise InputError(f"another process prepares {output}: wait for it, or choose another --output") from None
    except BrokenProcessPool:
        raise InputError("a worker was killed, perhaps for its memory: run again with fewer --workers") from None


def write_dataset(record: dict, files: Iterable, output: Path, work: Path, workers: int, eval_rows: Callable) -> dict:
    """The passes over the text, and the rename of the result; returns the counts."""
    start, resumed, out, parts = time.time(), any(work.glob("part_*")), work / "out", []
    settings = record["settings"]
    for cached in (opened, tests_of):  # of another run of this process
        cached.cache_clear()
    try:
        save_json(work / "run.json", record)
        tests = index_tests(work, eval_rows) if settings["decontaminate"] else {}
        groups = parts_of(files, settings["skip_bad_files"])
        jobs = ((work / f"part_{number:06d}.arrow", units, settings) for number, units in enumerate(groups))
        run_jobs(filter_part, (parts.append(job[0]) or job for job in jobs), workers, "filter")
        facts = [json.loads(part_table(path).schema.metadata[b"facts"]) for path in parts]
        sums = defaultdict(lambda: np.zeros(3, int))
        for name, numbers in chain.from_iterable(f["counts"].items() for f in facts):
            sums[name] += numbers
        counts = {name: sums[name].tolist() for name in ("read", *FILTERS)}
        shards = choose_shards(parts, settings, counts)
    except InputError:
        if not any(source["commit"] for source in record["sources"]):  # else a download may have broken off
            shutil.rmtree(work)  # refused input leaves nothing
        raise
    tests = {task: [*numbers, int(sums[task][0])] for task, numbers in tests.items()}
    stats = record | {"counts": counts, "tests": tests, "unread": [line for f in facts for line in f["unread"]]}
    out.mkdir(exist_ok=True)
    run_jobs(write_shard, [(out / name, parts, ids) for name, ids in shards.items()], workers, "write")
    template = Template(Path(__file__).with_name("data_card.jinja").read_text(encoding="utf-8"))
    save_text(out / "README.md", template.render(**stats, **settings, name=output.name) + "\n")
    seconds = time.time() - start
    timing = {"seconds": seconds, "megabytes_per_second": counts["read"][2] / 1e6 / seconds}
    save_json(out / "stats.json", stats | {"timing": timing | {"workers": workers, "resumed": resumed}})
    with writing(output):
        os.rename(out, output)
    shutil.rmtree(work)
    return counts


def run_jobs(function: Callable, jobs: Iterable[tuple], workers: int, name: str) -> None:
    """Call the function with the arguments of each job, in so many processes."""
    if workers == 1:
        for job in jobs:
            function(*job)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the workers inherit it: Ctrl-C is for this process
        for _ in range(workers):
            pool.submit(int)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        futures = [pool.submit(function, *job) for job in jobs]
        for future in track(futures, name, len(futures), "parts"):
            future.result()
    except BaseException:  # what a worker writes gets its name when it is complete
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Text(File):
    """A text file, which is one document."""

    def units(self, ranks: int) -> list[tuple[int, int]]:
        return [(0, self.path.stat().st_size)]

    def read(self, unit: tuple[int, int]) -> list[str]:
        try:
            return [self.path.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            self.bad(str(error))
            return []


def find_sources(sources: list[str], before: list[dict]) -> tuple[Iterator[Path], list[dict]]:
    """The files of all sources, downloaded as they are taken; and what each source is: its commit or content.

    `before` is that list of the run to resume, which keeps the commits. Files named after a validation or test split
    are left out, except of a folder of .txt and .md files. Logs what is not read. Raises InputError for a source
    without text.
    """
    groups, records, commits = [], [], {old["name"]: old["commit"] for old in before}
    for source in sources:
        if source == "primer":
            raise InputError("primer is the demo's own text: give a folder, a file or a Hub id")
        everything, texts, locate, commit = list_files(source, commits.get(source), *KINDS)
        if not local_path(source).is_file() and not has_suffix(texts[0], *KINDS[-1]):
            train, validation, _ = text_files(source, texts, unread_files(everything, texts))
            texts = [name for name in sorted({*train, *validation}) if split_of(name) in (None, "train")]
        if unread := [name for name in {*everything} - {*texts} if has_suffix(name, ".txt", *UNREAD)]:
            log(f"source {source}: not read: {listed(unread)}")
        content = None if commit else content_hash(texts, [], locate)
        name = source if commit else local_path(source).resolve().name  # the card may be published
        records.append({"name": name, "commit": commit, "files": len(texts), "content": content})
        groups.append((texts, locate))
    return (locate(name) for texts, locate in groups for name in texts), records


@lru_cache(maxsize=2)
def opened(path: Path, skip: bool) -> File:
    if has_suffix(path.name, *KINDS[-1]):
        return Text(SimpleNamespace(locate=Path, skip_bad_files=skip), str(path))
    dataset = DatasetSplit(str(path), "train", skip)
    dataset.single = False  # no share of it is for validation
    return dataset.files[0]


def read_unit(path: Path, unit: tuple | None, skip: bool) -> list[str | None]:
    """The texts; None: of a file without units, which warns again if it cannot be read."""
    return opened(path, skip).read(unit) if unit else opened.__wrapped__(path, skip).units(1)


def parts_of(files: Iterable[Path], skip: bool) -> Iterator[list[tuple]]:
    """(path, unit) of all files in order, in groups of about PART_BYTES; (path, None) of a file without units."""
    group, size = [], 0
    for path in files:
        file = opened(path, skip)
        for unit in file.units(1) or [None]:
            group.append((path, unit))
            if unit:
                is_parquet = isinstance(file, Parquet)
                size += file.footer.row_group(unit[0]).total_byte_size if is_parquet else unit[1] - unit[0]
            if size >= PART_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def filter_part(target: Path, units: list[tuple], settings: dict) -> None:
    """Write the documents of the units that pass the filters, with their hashes and the counts, as an Arrow file."""
    if target.exists():
        return
    counts, skip = defaultdict(lambda: np.zeros(3, int)), settings["skip_bad_files"]
    rows = {name: [] for name in ("text", "chars", "bytes", "exact", *BANDS)}
    with warnings.catch_warnings(record=True) as unread:
        warnings.simplefilter("always")
        for text in (text or "" for path, unit in units for text in read_unit(path, unit, skip)):
            data, words = text.encode(), word_hashes(text)
            reasons = reasons_to_drop(text, words, settings, target.parent)
            for name in ("read", *reasons):
                counts[name] += (1, len(text), len(data))
            if not reasons:
                digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
                for column, value in zip(rows.values(), (text, len(text), len(data), digest, *band_keys(words))):
                    column.append(value)
    facts = {"counts": {name: numbers.tolist() for name, numbers in counts.items()}}
    facts["unread"] = [str(note.message) for note in unread]
    kinds = [(name, pa.uint64() if name != "text" else pa.large_string()) for name in rows]
    aside = target.with_suffix(f".{os.getpid()}")
    with pa.ipc.new_file(aside, schema := pa.schema(kinds, {"facts": json.dumps(facts)})) as file:
        file.write_table(pa.table(rows, schema))
    os.replace(aside, target)


def reasons_to_drop(text: str, words: np.ndarray, settings: dict, work: Path) -> list[str]:
    """One of FILTERS or nothing; of a contaminated text also the task of the test row."""
    if not len(words):
        return ["without words"]
    if len(text) < settings["min_chars"]:
        return ["too short"]
    if settings["max_chars"] and len(text) > settings["max_chars"]:
        return ["too long"]
    middle = max(len(text) // 2 - 250, 0)  # a text may begin with a title, names and quotations
    if settings["languages"] and identifier().classify(text[middle : middle + 500])[0] not in settings["languages"]:
        return ["other language"]
    if settings["decontaminate"]:
        hashes, owners, tasks, seen = tests_of(work)
        runs = shingles(words, NGRAM)
        runs = runs[seen[runs >> np.uint64(40)]]
        at = np.minimum(np.searchsorted(hashes, runs), len(hashes) - 1)
        if len(hits := at[hashes[at] == runs]):
            return ["contaminated", tasks[owners[hits[0]]]]
    return []


@cache
def identifier():
    from py3langid.langid import LanguageIdentifier

    return LanguageIdentifier.from_model_file("data/model.npz.xz")  # in its package


def word_hashes(text: str) -> np.ndarray:
    """A number for each lower-cased word, shape (words,), uint64."""
    return np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())], np.uint64)


def shingles(words: np.ndarray, size: int) -> np.ndarray:
    """A hash of each `size` words in a row."""
    return sliding_window_view(words, size) @ POWERS[:size] if len(words) >= size else words[:0]


@cache
def empty_sketch():
    from datasketch import MinHash

    return MinHash(NUM_BANDS * BAND, hashfunc=lambda value: value, seed=1)


def band_keys(words: np.ndarray) -> list[int]:
    """A hash for each band of the document's MinHash; near duplicates have one in common."""
    sketch, runs = empty_sketch().copy(), shingles(words, min(SHINGLE, len(words))) >> np.uint64(32)
    for first in range(0, len(runs), 1 << 14):  # the library takes half a kilobyte for each
        sketch.update_batch(runs[first : first + (1 << 14)].tolist())
    return (sketch.hashvalues.astype(np.uint64).reshape(NUM_BANDS, BAND) @ POWERS[:BAND]).tolist()


def index_tests(work: Path, eval_rows: Callable[[], Iterable[tuple[str, dict | None]]]) -> dict[str, list[int]]:
    """Write the hashes of all 13 words in a row of the test rows; returns per task [rows, rows too short for that]."""
    if (tests := load_json(work / "tests.json")) is None:
        tests, hashes = {}, {}
        for task, row in eval_rows():
            numbers = tests.setdefault(task, [0, 0])
            runs = [shingles(word_hashes(text), NGRAM) for text in variants(row or {})]
            hashes.setdefault(task, []).append(np.unique(np.concatenate(runs)))
            tests[task] = [numbers[0] + (row is not None), numbers[1] + (row is not None and not any(map(len, runs)))]
        hashes = [np.unique(np.concatenate(runs)) for runs in hashes.values()]
        unique, first = np.unique(np.concatenate([*hashes, POWERS[:1]]), return_index=True)  # never empty
        np.save(work / "hashes.npy", unique)
        np.save(work / "owners.npy", np.repeat(np.arange(len(hashes) + 1), [*map(len, hashes), 1])[first])
        save_json(work / "tests.json", tests)
    return tests


@cache
def tests_of(work: Path) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """The hashes in order, the number of the task of each; the tasks; which first 24 bits of a hash occur."""
    hashes, owners = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("hashes", "owners"))
    seen = np.zeros(1 << 24, bool)
    seen[hashes >> np.uint64(40)] = True
    return hashes, owners, list(load_json(work / "tests.json")), seen


def variants(row: dict) -> set[str]:
    """All texts of a row joined, once with each of the first 16 texts of its lists: a question with each choice."""

    def texts(value, number: int) -> list[str]:
        if isinstance(value, str):
            return [value]
        items = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if isinstance(value, list) and all(isinstance(item, str) for item in items):
            items = items[number : number + 1]
        return [text for item in items for text in texts(item, number)]

    return {" ".join(texts(row, number)) for number in range(16)}


def part_table(path: Path) -> pa.Table:
    """A part, mapped from the disk."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def column(parts: list[Path], name: str) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *(part_table(path).column(name).to_numpy() for path in parts)])


def first_equal(values: np.ndarray) -> np.ndarray:
    """The place of the first value that is equal, for each."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def choose_shards(parts: list[Path], settings: dict, counts: dict) -> dict[str, np.ndarray]:
    """File name -> numbers of its documents in order; adds duplicates and splits to `counts`.

    Of near duplicates the first is kept. A document of validation has none in training, whether they are dropped or
    not. Raises InputError if too few documents are left. Takes about 60 bytes per document.
    """
    from scipy.sparse import coo_array  # scipy is a requirement of datasketch
    from scipy.sparse.csgraph import connected_components

    exact = first_equal(column(parts, "exact"))
    place, pairs, dedup = np.arange(len(exact)), [np.zeros((0, 2), int)], settings["dedup"] or []
    for name in BANDS:  # one in memory at a time
        first = first_equal(column(parts, name))
        pairs.append(np.stack([place, first], axis=1)[first != place])
    one, other = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(place), len(place)))
    near = first_equal(connected_components(graph, directed=False)[1])
    is_exact, is_near = ("exact" in dedup) & (exact != place), ("near" in dedup) & (near != place)
    order = np.random.default_rng(settings["seed"]).permutation(place[~is_exact & ~is_near])
    alone = np.bincount(near[order], minlength=1)[near[order]] == 1
    num_validation = max(1, round(settings["validation"] * len(order)))
    validation = order[alone][:num_validation]
    train = order[~np.isin(order, validation)]
    sizes = np.stack([np.ones(len(place)), column(parts, "chars"), column(parts, "bytes")], axis=1).astype(int)
    groups = {"duplicate": is_exact, "near duplicate": is_near & ~is_exact, "train": train, "validation": validation}
    counts |= {name: sizes[rows].sum(axis=0).tolist() for name, rows in groups.items()}
    if len(validation) < num_validation or not len(train):
        steps = ", ".join(f"{name} {numbers[0]}" for name, numbers in counts.items() if numbers[0] or name == "read")
        raise InputError(f"{len(order)} documents are left, too few for two splits ({steps}): lower the filters")
    ends = np.cumsum(sizes[train, 1])
    shard = ends * max(1, round(ends[-1] / SHARD_CHARS)) // (ends[-1] + 1)
    shards = np.split(train, np.flatnonzero(np.diff(shard)) + 1)
    names = [f"train-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    return dict(zip(names, shards)) | {"validation-00000-of-00001.parquet": validation}


def write_shard(target: Path, parts: list[Path], ids: np.ndarray) -> None:
    """Gather documents by their numbers, part by part, and write them in the order of `ids`."""
    if target.exists():
        return
    order, pieces, start = np.argsort(ids), [], 0
    for table in map(part_table, parts):
        first, end = np.searchsorted(ids, [start, start + len(table)], sorter=order)
        pieces.append(table.column("text").take(pa.array(ids[order[first:end]] - start)).combine_chunks())
        start += len(table)
    texts = pa.concat_arrays(pieces).take(pa.array(np.argsort(order))).cast(pa.string())
    aside = target.parent.with_name(f"{target.name}.{os.getpid()}")  # a kill leaves it outside of the result
    options = {"use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": texts}), aside, ROW_GROUP, compression="zstd", **options)
    os.replace(aside, target)
