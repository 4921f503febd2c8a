"""Evaluate the models of a run with lm-eval: CORE and bits per byte of the base model, chat tasks of the others.

All tasks are the YAMLs of evals/tasks, which the plain `lm_eval` command line runs, too; what this file adds is speed
(prefixes shared, batches of equal work, every rank a share of the questions) and tools that run inside answers.

    python scripts/run_evals.py --config recipes/cpu-demo/eval.yaml --run-dir runs/cpu-demo

Results go to eval/metrics.json, every question with its answer to eval/samples/<stage>/<task>.jsonl. A killed
evaluation goes on with the stage that it had not finished.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import primer
from ..data.conversations import Mixture
from ..data.corpus import open_documents
from ..data.loader import VALIDATION, PackedLoader
from ..data.tokenizer import load_tokenizer, strip_special_tokens, token_byte_lengths
from ..errors import InputError
from ..run import begin, finish, load_json, nearest, save_json
from .bpb import evaluate_bpb, losses_of
from .core import centered_mean, evaluate_core, load_tasks, quiet, run_lm_eval, score
from .generation import Generator
from .report import bloat

EVALS = Path(__file__).parents[2] / "evals"
MEANS = {  # of centered accuracies: key in metrics.json -> group of tasks, name of the mean, name of a part of it
    "chatcore": ("nanochat_chatcore", "ChatCORE", "chat tasks"),
    "kocore": ("nanochat_ko", "KoCORE", "Korean tasks"),
}
DEMO_KINDS = ("fact", "arithmetic", "spelling", "counting", "problem")
SPELLING = {"nanochat_spellingbee", "nanochat_chatcore"}
SPELLING_BEES = 256  # questions, as upstream


@dataclass
class EvalConfig:
    """Keys of eval.yaml."""

    tasks: list[str] = field(default_factory=lambda: ["nanochat_demo"])
    """Tasks or groups for the chat stages: ours (evals/tasks) or any of lm-eval's."""
    chat_stages: list[str] = field(default_factory=lambda: ["mid", "sft", "rl"])
    """Stages that answer `tasks`; those that a run does not have are left out."""
    text_stages: list[str] | None = None
    """Stages that answer those of `tasks` that are plain text and no chat, as the Korean ones; None: chat_stages."""
    limit: int | None = None
    """Questions per chat task; None for all."""
    chat_data: str | None = None
    """Folder with local files of the chat tasks (gsm8k_test.jsonl, ...); what it lacks comes from the Hub."""
    words: str | None = None
    """Words for SpellingBee: a .txt file with a word a line, or a dataset of text; None for those of `dataset`."""
    core_bundle: str | None = None
    """CORE's data: a folder, `download` for the official bundle (kept in the cache), None for no CORE."""
    core_stages: list[str] = field(default_factory=lambda: ["base"])
    """Stages that CORE is computed for."""
    core_limit: int | None = None
    """Examples per CORE task, upstream's max_per_task; None for all."""
    dataset: str | None = "primer"
    """Text for bits per byte, its validation split; None for none. Of a mixture also those of each part."""
    bpb_tokens: int = 65536
    """Tokens of it."""
    bpb_stages: list[str] = field(default_factory=lambda: ["base", "mid", "sft", "rl"])
    """Stages that bits per byte are computed for."""
    batch_size: int = 128
    """Answers generated together."""
    batch_tokens: int = 32768
    """Positions scored together (CORE, multiple choice)."""
    max_new_tokens: int | None = None
    """Longest answer; None for what each task says."""
    num_samples: int = 1
    """Answers to each question; more than 1 gives pass@k and needs a temperature."""
    temperature: float = 0.0
    top_k: int = 50
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16."""
    log_samples: bool = True
    """Keep every question with its answer in eval/samples."""
    seed: int = 0


class LocalLM(HFLM):
    """lm-eval's model with our scoring and generation, each rank of the process group taking a share of the rows.

    Args:
        model: causal LM of transformers.
        tokenizer: its tokenizer.
        engine: has `generate(prompts, num_samples, max_new_tokens=, temperature=, top_k=, seed=)`.
    """

    def __init__(self, model, tokenizer, config: EvalConfig, engine):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.options, self.engine, self.num_cropped = config, engine, 0

    def all_gather(self, tensor):
        return torch.tensor(gather_object([tensor.item()])) if self.world_size > 1 else tensor

    def gather_object(self, obj, dst=0):
        return gather_object([obj]) if self.world_size > 1 else [obj]

    def barrier(self):
        PartialState().wait_for_everyone()

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        plain = [{**message, "content": strip_special_tokens(message["content"])} for message in chat_history]
        return super().apply_chat_template(plain, add_generation_prompt)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        pairs = []
        for request in requests:
            if hasattr(request, "context"):  # CORE's, which knows its own limit
                pairs.append((request.context, request.continuation))
                continue
            _, context, continuation = request
            keep = max(self.max_length + 1 - len(continuation), 1)
            self.num_cropped += len(context) > keep
            pairs.append((context[-keep:], continuation))
        return score(self.model, pairs, self.options.batch_tokens)

    def generate_until(self, requests, disable_tqdm=False):
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            room = self.options.max_new_tokens or request.args[1].get("max_gen_toks", 256)
            by_length.setdefault(room, []).append(number)
        for room, numbers in by_length.items():
            keep = max(self.max_length - room, self.max_length // 2)
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            self.num_cropped += sum(len(prompt) > keep for prompt in prompts)
            found = self.engine.generate(
                [prompt[-keep:] for prompt in prompts],
                max_new_tokens=min(room, self.max_length - keep),
                temperature=self.options.temperature,
                top_k=self.options.top_k,
                seed=self.options.seed + 7919 * self.rank,
            )
            for number, [ids] in zip(numbers, found):
                text = self.tokenizer.decode(ids, skip_special_tokens=False)
                for end in [*requests[number].args[1].get("until", []), self.tokenizer.eos_token]:
                    text = text.split(end)[0]
                answers[number] = text
        return answers


def evaluate(config: EvalConfig, models: dict[str, str], output: Path, engine: Callable | None = None) -> dict | None:
    """Evaluate each stage's model and write output/metrics.json.

    Args:
        config: keys of eval.yaml.
        models: stage -> folder or Hub id, for example {"base": "runs/d12/base", "sft": "runs/d12/sft"}.
        output: the eval folder of the run.
        engine: (model, tokenizer) -> object with `generate`, such as `serve.generate.Engine`; None: the built-in one.

    Returns:
        What stands in metrics.json, on the main process; None elsewhere.

    Raises:
        InputError: unknown task, no chat template, no bundle, no such model.
    """
    state, output, record = PartialState(), Path(output), begin(config)
    if config.num_samples > 1 and config.temperature == 0:
        raise InputError("num_samples above 1 needs a temperature: greedy answers would all be the same")
    for name in ("limit", "core_limit"):
        if (value := getattr(config, name)) is not None and value < state.num_processes:
            raise InputError(
                f"{name} is {value}: give at least one question for each of {state.num_processes} processes"
            )
    if not models:
        raise InputError("no finished model to evaluate: run the base stage first")
    with quiet():
        tasks = Tasks(config, models, output)
        stages = {}
        for stage, folder in models.items():
            kept = output / "state" / f"{stage}.json"
            found = [load_json(kept) if state.is_main_process else None]
            if state.num_processes > 1:
                broadcast_object_list(found)
            if found[0] is None or found[0]["config"] != asdict(config):
                numbers = evaluate_model(config, stage, folder, tasks, output, engine, state)
                found = [{"config": asdict(config), **numbers}]
                if state.is_main_process:
                    save_json(kept, found[0])
            stages[stage] = found[0]
        state.wait_for_everyone()
    if not state.is_main_process:
        return None
    numbers = {key: {s: n[key] for s, n in stages.items() if n[key]} for key in ("results", "core", *MEANS)}
    numbers["examples"] = {stage: found["examples"] for stage, found in stages.items()}
    numbers["seconds"] = {stage: found["seconds"] for stage, found in stages.items()}
    numbers["bytes_per_token"] = compression(load_tokenizer(next(iter(models.values()))))
    metrics = finish(output, record, models=models, bloat=bloat(), **numbers)
    shutil.rmtree(output / "state", ignore_errors=True)
    return metrics


def evaluate_model(config, stage: str, folder: str, tasks: "Tasks", output: Path, engine, state) -> dict:
    """All numbers of one stage; the same on every rank except for what only the main process gathers."""
    began, seconds, results, examples, core = time.time(), {}, {}, [], None
    model, tokenizer = load(folder, config.dtype, state.device)
    generator = engine(model, tokenizer) if engine else Generator(model, tokenizer, config.batch_size)
    lm = LocalLM(model, tokenizer, config, generator)
    if config.dataset and stage in config.bpb_stages:
        parts = {"val_bpb": config.dataset}
        if isinstance(config.dataset, list):
            parts |= {f"bpb {Path(part['dataset']).name}": part["dataset"] for part in config.dataset}
        for name, dataset in parts.items():
            results[name] = held_out_bpb(replace(config, dataset=dataset), model, tokenizer)
            state.print(f"[eval] {stage}: {name.replace('_', ' ')} {results[name]['value']:.4f}")
        seconds["val_bpb"] = time.time() - began
    if config.core_bundle and stage in config.core_stages:
        start = time.time()
        core = tasks.core(lm, state.print)
        seconds["core"] = time.time() - start
        if core:
            state.print(f"[eval] {stage}: {core['label']} {core['value']:.4f} in {seconds['core']:.1f} s")
    for name in tasks.of(stage):
        if name in tasks.chat and not tokenizer.chat_template:
            raise InputError(f"{folder} has no chat template, so it cannot answer {name}: evaluate a chat model")
        start = time.time()
        found, samples = tasks.run(name, lm)
        seconds[name] = time.time() - start
        for key, value in found.items():
            results[key] = value
            state.print(f"[eval] {stage}: {key} {shown(value)} in {seconds[name]:.1f} s")
        if state.is_main_process and samples:
            examples += samples[:2]
            if config.log_samples:
                path = output / "samples" / stage / f"{name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    means = {
        kind: centered_mean({k: v for k, v in results.items() if v.get(kind)}, label, len(tasks.members(kind)), part)
        for kind, (_, label, part) in MEANS.items()
    }
    seconds["all"] = time.time() - began
    return {"results": results, "core": core, **means, "examples": examples, "seconds": seconds}


class Tasks:
    """The lm-eval tasks that a config names, ready to run; finds out about wrong names before any model is loaded."""

    def __init__(self, config: EvalConfig, models: dict[str, str], output: Path):
        self.config, self.models = config, models
        if not (EVALS / "tasks").is_dir():
            raise InputError(f"no {EVALS}: evaluation runs from a checkout of the repository")
        if config.chat_data and not Path(config.chat_data).is_dir():
            raise InputError(f"chat_data: no folder {config.chat_data}")
        if isinstance(config.dataset, list) and not config.words and SPELLING & set(config.tasks):
            raise InputError(
                "dataset is a mixture, and SpellingBee takes its words from one dataset: name it in words"
            )
        bundle = None if config.core_bundle == "download" else config.core_bundle
        metadata = {"core_bundle": bundle, "chat_data": [config.chat_data, str(output / "questions")]}
        self.manager = TaskManager(include_path=str(EVALS), include_defaults=False, metadata=metadata)
        if any(not name.startswith("nanochat_") for name in config.tasks):
            self.manager = TaskManager(include_path=str(EVALS), metadata=metadata)  # reads all of lm-eval's
        for name in config.tasks:
            if name not in self.manager.all_tasks:
                raise InputError(f"unknown task {name!r}; {nearest(name, self.manager.all_tasks)}")
        self.loaded: dict = {}
        if set(models) & {*config.chat_stages, *(config.text_stages or [])}:
            self.write_questions(output)
            self.load()
        self.chat = [name for name, task in self.loaded.items() if (task.config.metadata or {}).get("chat")]

    def load(self) -> None:
        """Load the tasks; of the Korean group those whose rows can be had here."""
        for name in self.config.tasks:
            korean, failed = name == MEANS["kocore"][0], []
            for part in self.members("kocore") if korean else [name]:
                try:
                    self.loaded |= load_tasks(self.manager, [part])
                except InputError as error:
                    failed.append(f"{part.removeprefix(name + '_')} ({error})")
                    if not korean:
                        raise
            if korean and not self.loaded:
                raise InputError(f"no task of {name} has its rows here: {failed[0]}; name them with chat_data")
            if failed:
                PartialState().print(f"[eval] {name} goes without {', '.join(failed)}")

    def members(self, kind: str) -> list[str]:
        return self.manager.task_index[MEANS[kind][0]].cfg["task"]

    def of(self, stage: str) -> list[str]:
        """The tasks that this stage answers."""
        chat, text = self.config.chat_stages, self.config.text_stages
        text = chat if text is None else text
        return [name for name in self.loaded if stage in (chat if name in self.chat else text)]

    def write_questions(self, output: Path) -> None:
        """The rows of tasks that are generated, as files that the plain lm_eval command line can read again."""

        def write(name: str, rows: list[dict]) -> None:
            path = output / "questions" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        if PartialState().is_main_process:
            for kind in DEMO_KINDS:
                write(f"primer_{kind}.jsonl", primer.questions(kind))
            source = self.config.words or self.config.dataset
            if source and SPELLING & set(self.config.tasks):
                bee = {"dataset": source, "split": "test", "transform": "spelling_bee", "rows": SPELLING_BEES}
                found = [row["messages"] for row in Mixture([bee], seed=self.config.seed)]
                rows = [{"messages": turns[:1], "answer": turns[-1]["content"]} for turns in found]
                write("spellingbee_test.jsonl", rows)
        PartialState().wait_for_everyone()

    def run(self, name: str, lm: LocalLM) -> tuple[dict, list[dict]]:
        """One task -> ({short name: result}, samples); both empty on ranks other than the first."""
        task, chat, lm.num_cropped = self.loaded[name], name in self.chat, 0
        if self.config.num_samples > 1 and task.OUTPUT_TYPE == "generate_until":
            count = self.config.num_samples
            task.config.repeats = count
            task._filters = [build_filter_ensemble("none", [["take_first_k", {"k": count}]])]
        found = run_lm_eval(lm, {name: task}, self.config.limit, chat=chat, log_samples=True)
        if found is None:
            return {}, []
        numbers, metadata = found["results"][name], task.config.metadata or {}
        samples = [readable(sample) for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])]
        metric = next(m for m in ("acc", "acc_norm", "exact_match", *task.aggregation()) if f"{m},none" in numbers)
        result = {
            "value": numbers[f"{metric},none"],
            "stderr": standard_error([sample.get(metric) for sample in found["samples"][name]]),
            "n": len(samples),
            "baseline": majority(samples) if metadata.get("baseline") == "majority" else metadata.get("baseline"),
            "higher_is_better": task.higher_is_better().get(metric, True),
        }
        extra = {k.removesuffix(",none"): v for k, v in numbers.items() if k.startswith(("tool_use", "pass@"))}
        result |= {key: value for key, value in extra.items() if "stderr" not in key}
        if lm.num_cropped:
            result["cropped"] = lm.num_cropped
        result |= {kind: True for kind in MEANS if name in self.members(kind)}
        return {task.config.task_alias or name: result}, samples

    def core(self, lm: LocalLM, log: Callable = print) -> dict | None:
        return evaluate_core(lm, self.manager, self.config.core_limit, log)


def core_metric(tokenizer, bundle: str) -> Callable[[torch.nn.Module, int], float]:
    """(model, examples per task) -> mean centered accuracy, the same on every rank: CORE while a model trains.

    A bundle that lacks tasks gives the mean over those it has. The model must be in eval mode.
    """
    config = EvalConfig(core_bundle=bundle)
    metadata = {"core_bundle": None if bundle == "download" else bundle}
    manager = TaskManager(include_path=str(EVALS), include_defaults=False, metadata=metadata)

    def measure(model, limit: int) -> float:
        with quiet():
            lm = LocalLM(model, tokenizer, config, engine=None)
            found = evaluate_core(lm, manager, limit if limit > 0 else None, log=lambda line: None)
        value = [found and found["value"]]
        return broadcast_object_list(value)[0] if lm.world_size > 1 else value[0]

    return measure


def held_out_bpb(config: EvalConfig, model, tokenizer) -> dict:
    """Bits per byte of `bpb_tokens` tokens of the validation split, in rows of the model's training length."""
    state, length = PartialState(), model.config.max_position_embeddings
    batch = max(1, config.batch_tokens // 4 // length)  # all positions have logits here, which take the memory
    stream = open_documents(config.dataset, "validation", state.process_index, state.num_processes, seed=0)
    loader = PackedLoader(stream, tokenizer, batch, length, **VALIDATION)
    steps = max(1, config.bpb_tokens // (batch * length * state.num_processes))

    def batches():
        for _ in range(steps):
            rows = torch.from_numpy(next(loader)).long().to(model.device)
            yield rows[:, :-1], rows[:, 1:]

    value = evaluate_bpb(losses_of(model), batches(), torch.tensor(token_byte_lengths(tokenizer)))
    loader.close()
    tokens = steps * batch * length * state.num_processes
    return {"value": value, "stderr": None, "n": tokens, "baseline": None, "higher_is_better": False}


def compression(tokenizer) -> dict[str, dict[str, float | None]]:
    """Bytes per token on short English, code, Korean and mathematics (evals/texts), beside GPT-2's and GPT-4's
    tokenizers where this machine has them; None where not."""
    columns: dict[str, Callable] = {"ours": tokenizer}
    for name, place in (("GPT-2", "openai-community/gpt2"), ("GPT-4", "Xenova/gpt-4")):
        try:
            columns[name] = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError):
            columns[name] = None
    table = {}
    for path in sorted((EVALS / "texts").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        size = len(text.encode())
        counts = {name: t and len(t(text, add_special_tokens=False)["input_ids"]) for name, t in columns.items()}
        table[path.stem] = {name: size / count if count else None for name, count in counts.items()}
    return table


def load(folder: str, dtype: str, device: torch.device):
    """Model in eval mode on `device`, and its tokenizer."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, not {dtype!r}")
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda") else torch.float32
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except (OSError, ValueError) as error:
        raise InputError(f"no model in {folder}: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), tokenizer


def readable(sample: dict) -> dict:
    """What a person wants to see of an lm-eval sample."""
    doc, answers = sample["doc"], sample["filtered_resps"][0]
    if not isinstance(answers, str | list):  # multiple choice: (log-probability, greedy) of each letter
        answers = {
            request[1]: round(found[0], 3) for request, found in zip(sample["arguments"], sample["filtered_resps"])
        }
    question = doc["messages"][0]["content"] if doc.get("messages") else doc.get("question") or doc.get("prompt")
    question = question if isinstance(question, str) else str(sample["arguments"][0][0])
    expected = doc["letters"][sample["target"]] if "letters" in doc else sample["target"]
    return {"question": question, "expected": expected, "answer": answers, "correct": sample.get("acc")}


def majority(samples: list[dict]) -> float:
    """What always giving the most frequent answer would get."""
    return Counter(str(sample["expected"]) for sample in samples).most_common(1)[0][1] / len(samples)


def standard_error(values: list) -> float | None:
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def shown(result: dict) -> str:
    words = f"{result['value']:.4f}"
    if result.get("stderr") is not None:
        words += f" ± {result['stderr']:.4f}"
    if result.get("baseline"):
        words += f" (guessing {result['baseline']:.2f})"
    return words + (f", tool called in {result['tool_use']:.0%}" if "tool_use" in result else "")
