"""CORE as karpathy/nanochat defines it, and bits per byte: the lm-eval classes behind `core_*.yaml` and `bpb.yaml`.

The lm-eval CLI runs them, too, for any causal LM of the Hub:

    lm_eval run --model hf --model_args pretrained=DIR,dtype=float32,trust_remote_code=True --tasks nanochat_core \
        --include_path evals --metadata core_bundle=DIR --limit 100

CORE (DCLM, arXiv 2406.11794) differs from lm-eval's own multiple choice in three ways, so it has its own task class.
The few-shot examples depend on the row number. The scored tokens are found in token space, as what the choices do not
share. And the mean, not the sum, of their losses decides. So the class tokenizes by itself and passes token ids to the
model's `_loglikelihood_tokens`, the method below `loglikelihood` of every lm-eval backend that has a tokenizer.
"""

import hashlib
import logging
import os
import random
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from math import nan
from pathlib import Path

import numpy as np
from filelock import FileLock
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.utils import resolve_max_length
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from nanochat_hf.data.tokenizer import plain_backend
from nanochat_hf.eval import bpb
from nanochat_hf.eval.core import centered, damaged, find_file, numbered_lines, parse_row, read_jsonl

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanochat_hf"
MAX_BUNDLE = 4 << 30  # bytes of its unpacked files
CHUNK = 512  # questions tokenized together: the prompts of a full run take hundreds of megabytes


def core_bundle(folder: str | None = None) -> Path:
    """The bundle's folder: the one named, else $NANOCHAT_CORE_BUNDLE, else the cache, filled once from the network."""
    folder = folder or os.environ.get("NANOCHAT_CORE_BUNDLE")
    if folder:
        if not (Path(folder) / "core.yaml").is_file():
            raise ValueError(f"{folder} is no CORE bundle (it has no core.yaml); name the unpacked eval_bundle folder")
        return Path(folder)
    target = CACHE / "eval_bundle"
    if not target.exists() and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ValueError(f"no CORE bundle in {target}, and HF_HUB_OFFLINE is set: [eval.]core_bundle=DIR, or null")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "eval_bundle.lock"):
        if not target.exists():
            _download_bundle(target, BUNDLE_URL)
    return target


def _download_bundle(target: Path, url: str) -> None:
    """Fetch and unpack the official zip beside `target`, then rename: an interrupted download leaves nothing.

    The publisher names no checksum; the CRC of each file in the zip shows damage.
    """
    advice = "name a local bundle with core_bundle=DIR"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        packed = Path(scratch) / "bundle.zip"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, packed.open("wb") as file:
                size = int(answer.headers.get("Content-Length") or 0) or None
                with tqdm.wrapattr(answer, "read", total=size, desc="CORE bundle") as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
            with packed.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(packed) as archive:
                if (size := sum(file.file_size for file in archive.infolist())) > MAX_BUNDLE:
                    raise ValueError(f"{url} unpacks to {size / 1e9:,.3f} GB, so it is not the bundle; {advice}")
                archive.extractall(scratch)
        except OSError as error:
            raise ValueError(f"cannot download {url} ({error}); {advice}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError):
            raise ValueError(f"{url} arrived damaged; try again, or {advice}") from None
        if not (unpacked := next((path.parent for path in Path(scratch).rglob("core.yaml")), None)):
            raise ValueError(f"{url} is no CORE bundle (it has no core.yaml); {advice}")
        (unpacked / "SHA256").write_text(sha256 + "\n")
        shutil.move(unpacked, target)


FIELDS = {  # of the rows of each kind of task
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class Rows(Sequence):
    """A task's rows in the definition's order, each with its number as `_row`, parsed at first access.

    Most files hold thousands of rows of which `--limit` leaves a hundred, and the order depends on their number alone.
    Raises ValueError, with file and line, for a row that is not one of this kind of task.
    """

    def __init__(self, file: Path, kind: str):
        self.file, self.fields = file, FIELDS[kind]
        self.options = next((name for name, type_ in self.fields.items() if type_ is list), None)
        self.lines, self.parsed = numbered_lines(file), {}
        random.Random(1337).shuffle(self.lines)
        self[self.lines.index(max(self.lines))]  # the last line, which a copy that was interrupted has half of

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> dict:
        if number not in self.parsed:
            line, data = self.lines[number]
            row = parse_row(self.file, line, data, self.fields)
            if self.options:
                texts = row[self.options]
                if not texts or not all(isinstance(text, str) for text in texts):
                    raise damaged(self.file, line, f"{self.options!r} must be texts")
                if not 0 <= row["gold"] < len(texts):
                    raise damaged(self.file, line, f"'gold' is {row['gold']} of {len(texts)} {self.options}")
            self.parsed[number] = {**row, "_row": number}
        return self.parsed[number]


class TokenRequest(Instance):
    """A request of token ids, which iterates as the (strings, context, continuation) triple of lm-eval's backends.

    Ids are arrays, and the choices of a question share the array of the context: a full CORE run holds hundreds of
    millions of tokens, too many for lists of Python integers.
    """

    def __init__(self, context: np.ndarray, continuation: np.ndarray, **kwargs):
        super().__init__(request_type="_loglikelihood_tokens", **kwargs)
        self.context, self.continuation = context, continuation

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        return (None, self.context, self.continuation)[index].tolist() if index % 3 else None

    def __iter__(self):
        return (self[index] for index in range(3))


class TokenTask(Task):
    """A task that passes token ids to the model instead of text; a YAML names it as `class`.

    The tokenizer is that of `pretrained` or `tokenizer` in --model_args, unless a runner calls `use`.
    """

    OUTPUT_TYPE = "_loglikelihood_tokens"

    def __init__(self, config: dict):
        self.metadata = dict(config.get("metadata") or {})
        keys = ("task", "task_alias", "tag", "dataset_path", "num_fewshot")
        fields = {key: config[key] for key in keys if key in config}
        self._config = TaskConfig(**fields, output_type="loglikelihood", metadata=self.metadata)
        self.VERSION = self.metadata.get("version")
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        self._docs = self._instances = self._tokenizer = self._model_config = self.fewshot_rnd = None
        self.num_long = 0  # prompts longer than the model's positions, cropped on the left
        self._is_cli = True  # until a runner calls `use`

    @staticmethod
    def position_limit(config) -> int | None:
        """Longest input that a model can take; longer prompts lose their beginning, as upstream crops for GPT-2.

        Learned positions have an end. Rotary ones have none, except that nanochat refuses more than 10 contexts.
        """
        config = config.get_text_config()
        if config.model_type == "nanochat_hf":
            return 10 * config.max_position_embeddings
        if getattr(config, "rope_parameters", None):
            return None
        return getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)

    def use(self, tokenizer, model_config) -> None:
        """Called by a runner that has the model: sets the tokenizer and the model's config."""
        self._tokenizer, self._model_config, self._is_cli = tokenizer, model_config, False

    @property
    def tokenizer(self):
        return self._tokenizer or _load(AutoTokenizer, *_source(self.metadata))

    @property
    def model_config(self):
        return self._model_config or _load(AutoConfig, *_source(self.metadata))

    def has_training_docs(self) -> bool:
        return False

    has_validation_docs = has_training_docs

    def has_test_docs(self) -> bool:
        return True

    def construct_requests(self, doc, ctx, **kwargs):
        raise NotImplementedError("build_all_requests makes the requests of all rows at once")


class CoreTask(TokenTask):
    """One of the 22 tasks; the YAML gives file, number of shots, kind, delimiter and random baseline in percent."""

    def __init__(self, config: dict):
        super().__init__(config)
        self.kind, self.delimiter = self.metadata["kind"], self.metadata["delimiter"]
        self.baseline = self.metadata["baseline"] / 100
        self._scored: dict[int, list[int]] = {}  # row -> number of scored tokens of each choice

    @property
    def file(self) -> Path:
        return core_bundle(self.metadata.get("core_bundle")) / "eval_data" / self.config.dataset_path

    def test_docs(self) -> Rows:
        if self._docs is None:
            if not self.file.is_file():
                missing = f"the bundle has no {self.config.dataset_path}"
                raise ValueError(f"{self.task_name}: {missing}; leave this task out")
            self._docs = Rows(self.file, self.kind)
        return self._docs

    def doc_to_text(self, doc: dict) -> str:
        return doc.get("query") or doc.get("context") or " / ".join(doc["context_options"])

    def doc_to_target(self, doc: dict) -> str:
        return doc["continuation"] if "continuation" in doc else doc["choices"][doc["gold"]]

    def prompts(self, doc: dict, shots: list[dict]) -> list[str]:
        """The texts to compare: one per choice, or for a language task the text without and with its answer."""

        def render(row: dict) -> list[str]:
            if self.kind == "multiple_choice":
                return [f"{row['query']}{self.delimiter}{choice}" for choice in row["choices"]]
            if self.kind == "schema":
                return [f"{context}{self.delimiter}{row['continuation']}" for context in row["context_options"]]
            return [f"{row['context'].strip()}{self.delimiter}{row['continuation']}"]

        has_choices = self.kind != "language_modeling"
        before = "".join(f"{render(shot)[shot['gold'] if has_choices else 0]}\n\n" for shot in shots)
        if has_choices:
            return [before + text for text in render(doc)]
        question = f"{before}{doc['context'].strip()}{self.delimiter}"
        # A space before the answer belongs to the answer's first token, so the question must end without one.
        return [question.strip(), question + doc["continuation"]]

    def shots(self, row: int, pool: int) -> list[dict]:
        """The few-shot examples of a row, drawn from the other rows below `pool` with the row's own seed."""
        if not self.config.num_fewshot:
            return []
        if pool <= self.config.num_fewshot:
            needs = f"each needs {self.config.num_fewshot} others as examples"
            raise ValueError(f"{self.file} has {pool} rows, and {needs}: take the complete file")
        # Drawing from pool - 1 places and stepping over `row` equals drawing from the list without it, in O(shots).
        picks = random.Random(1234 + row).sample(range(pool - 1), self.config.num_fewshot)
        return [self.test_docs()[pick + (pick >= row)] for pick in picks]

    def spans(self, prompts: list[np.ndarray]) -> list[tuple[np.ndarray, int]]:
        """(tokens, start): the scored tokens of each prompt are tokens[start:]; empty if prompts do not differ."""
        if self.kind == "language_modeling":
            without, whole = prompts
            return [(whole, _shared([without, whole]))]
        if self.kind == "schema":
            suffix = _shared([tokens[::-1] for tokens in prompts])
            # A suffix that is a whole prompt leaves nothing to predict its first token from: scored as no tokens.
            return [(tokens, len(tokens) - suffix or len(tokens)) for tokens in prompts]
        prefix = _shared(prompts)
        return [(tokens, prefix) for tokens in prompts]

    def check(self, limit=None) -> int:
        """Parse every row that `limit` leaves, so that a damaged line stops all ranks before anything is computed.

        Returns the number of rows that few-shot examples are drawn from: those that are left, but at least shots + 1
        (upstream stops with an error below that).
        """
        rows = len(self.test_docs())
        pool = min(rows, max(int(limit), self.config.num_fewshot + 1)) if limit else rows
        for number in range(pool):
            self.test_docs()[number]
        return pool

    def build_all_requests(self, *, limit=None, samples=None, rank=0, world_size=1, **unused) -> None:
        """Make the requests of this rank's rows; `limit` cuts the rows before examples are drawn from them."""
        pool = self.check(None if samples else limit)
        chosen = list(self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size))
        self._instances, self.num_long, limit_of_model = [], 0, self.position_limit(self.model_config)
        for begin in range(0, len(chosen), CHUNK):
            group = chosen[begin : begin + CHUNK]
            texts = [self.prompts(doc, self.shots(doc["_row"], pool)) for _, doc in group]
            ids = iter(encode(self.tokenizer, [text for prompts in texts for text in prompts]))
            for (doc_id, doc), prompts in zip(group, texts):
                self._instances += self._requests(doc_id, doc, prompts, [next(ids) for _ in prompts], limit_of_model)
        if self._is_cli:
            self._warn_of_cropping()

    def _warn_of_cropping(self) -> None:
        """The CLI's backend crops at its max_length, which the definition does not ask for."""
        limit = int(self.metadata.get("max_length") or resolve_max_length(self.model_config, self.tokenizer))
        lengths = [len(request.context) + len(request.continuation) - 1 for request in self._instances]
        if long := sum(length > limit for length in lengths):
            logging.getLogger(__name__).warning(
                f"{self.task_name}: {long} of {len(lengths)} prompts are longer than the backend's max_length of "
                f"{limit}, which crops them; for CORE as defined add max_length={max(lengths)} to --model_args"
            )

    def _requests(
        self, doc_id: int, doc: dict, texts: list[str], ids: list[np.ndarray], longest: int | None
    ) -> list[TokenRequest]:
        """The requests of a row; prompts longer than `longest` lose their beginning."""
        requests, num_scored, context = [], [], None
        for number, (tokens, start) in enumerate(self.spans(ids)):
            if longest and len(tokens) > longest:
                self.num_long += 1
                start = max(start - (len(tokens) - longest), 1)
                tokens = tokens[-longest:]
            num_scored.append(len(tokens) - start)
            start = min(start, len(tokens) - 1)  # backends refuse an empty request; its result is ignored
            if context is None or not np.array_equal(context, tokens[:start]):
                context = tokens[:start]
            arguments = (texts[-1 if self.kind == "language_modeling" else number], "")
            fields = {"doc": doc, "arguments": arguments, "idx": number, "metadata": (self.task_name, doc_id, 1)}
            requests.append(TokenRequest(context, tokens[start:], **fields))
        self._scored[doc["_row"]] = num_scored
        return requests

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
        """results: (sum of log-probabilities, all tokens were the argmax) of each request."""
        if self.kind == "language_modeling":
            correct = bool(results[0][1])
        else:
            scored = self._scored[doc["_row"]]
            losses = [-total / count if count else nan for (total, _), count in zip(results, scored)]
            # The first of equals wins. A choice without tokens of its own has no loss: it wins in first place only,
            # as in upstream, where min() over a list that begins with nan keeps that nan.
            correct = losses.index(min(losses)) == doc["gold"]
        return {"acc": float(correct), "centered": float(correct)}

    def aggregation(self) -> dict:
        return {"acc": mean, "centered": lambda items: centered(mean(items), self.baseline)}

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True, "centered": True}


class TextTask(TokenTask):
    """Bits per byte of documents, each by itself: held_out.jsonl in `chat_data`, one `text` per line.

    Bos, then the text, in windows of metadata.length tokens or the model's context; each window begins with the last
    token of the one before. (lm-eval's `loglikelihood_rolling` charges tokenizers that add bos for a second one.)
    """

    def test_docs(self) -> list[dict]:
        if self._docs is None:
            if not (file := find_file(self.metadata.get("chat_data"), self.config.dataset_path)):
                raise ValueError(f"no file {self.config.dataset_path}: pass --metadata chat_data=DIR with its folder")
            self._docs = [row for row in read_jsonl(file, {"text": str}) if row["text"].strip()]
        return self._docs

    def doc_to_text(self, doc: dict) -> str:
        return ""

    def doc_to_target(self, doc: dict) -> str:
        return doc["text"]

    def build_all_requests(self, *, limit=None, samples=None, rank=0, world_size=1, **unused) -> None:
        size = min(self.metadata["length"], resolve_max_length(self.model_config, self.tokenizer))
        self._instances = []
        for doc_id, doc in self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size):
            [ids] = encode(self.tokenizer, [doc["text"]])
            for number, begin in enumerate(range(0, len(ids) - 1, size)):
                span = ids[begin : begin + size + 1]
                fields = {"doc": doc, "arguments": ("", doc["text"]), "idx": number}
                self._instances.append(
                    TokenRequest(span[:1], span[1:], **fields, metadata=(self.task_name, doc_id, 1))
                )

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
        return {"bits_per_byte": (-sum(total for total, _ in results), len(doc["text"].encode()))}

    def aggregation(self) -> dict:
        return {"bits_per_byte": lambda items: bpb.bits_per_byte(*map(sum, zip(*items)))}

    def higher_is_better(self) -> dict[str, bool]:
        return {"bits_per_byte": False}


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids with bos first, int32; text that spells a special token stays text."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    else:  # twice as fast as the call above: no offsets
        encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
    return [np.array([bos, *row], dtype=np.int32) for row in rows]


def _shared(rows: list[np.ndarray]) -> int:
    """Number of leading tokens that all rows have in common."""
    length = min(map(len, rows))
    same = np.logical_and.reduce([row[:length] == rows[0][:length] for row in rows])
    return length if same.all() else int(same.argmin())


def _source(metadata: dict) -> tuple[str, bool]:
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise ValueError("CORE needs the tokenizer's name: pass pretrained=DIR (or tokenizer=DIR) in --model_args")
    return name, bool(metadata.get("trust_remote_code"))


@lru_cache(maxsize=4)
def _load(kind, name: str, trust: bool):
    return kind.from_pretrained(name, trust_remote_code=trust)
