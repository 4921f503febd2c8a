"""Reinforcement learning on questions whose answers can be checked, with the calculator at hand, on TRL's GRPOTrainer.

    python scripts/chat_rl.py --config recipes/cpu-demo/rl.yaml --run-dir runs/cpu-demo

What is left of GRPO (arXiv:2402.03300), as in karpathy/nanochat, is close to REINFORCE: on-policy (one update per
batch, so the ratio is 1 and clipping never acts), no KL term and no reference model, advantage = reward - mean of the
question's samples without division by their spread (arXiv:2503.20783), and a loss summed over the sampled tokens of
the batch and divided by their number (DAPO, arXiv:2503.14476). Tool results are masked. Unlike upstream all tokens of
the batch weigh alike, not only those of one question; and tokens are sampled from the full softmax, of which the
gradient is taken, where upstream samples among the 50 likeliest.

Generation is most of the cost. It is transformers' `generate` with TRL's tool loop, unless `train_rl` is given an
`engine` (eval.generation.Generator, serve.engine.Engine), which runs the tool inside the answer.
"""

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from ..data.grading import COLUMNS, correctness, hash_answer, pass_at_k
from ..data.mixture import Mixture
from ..data.tokenizer import load_tokenizer
from ..demo import corpus as primer
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import fingerprint, model_fingerprint, start_record, writing
from ..tools import python
from .model_setup import load_chat_model, lora
from .runtime import check_launch
from .trainer import (
    StageConfig,
    StageTrainer,
    save_stage,
    split_step,
    tool_result_mask,
    train_with_resume,
    trainer_arguments,
)

MAX_TOOL_CALLS = 4  # of one answer
EVAL_ROWS = 128  # answers that a device generates together while measuring
PRIMER_QUESTIONS = 4000  # of each kind, to practise on


@dataclass
class RLConfig(StageConfig):
    """Keys of rl.yaml, besides those of StageConfig."""

    dataset: str = "openai/gsm8k"
    """Questions: `primer:KIND` (or KIND+KIND), or GSM8K's format as a Hub id, a folder or `path/of_{split}.jsonl`."""
    subset: str | None = "main"
    """Of a Hub data set."""
    examples_per_step: int = 16
    """Questions a step, over all devices."""
    num_samples: int = 16
    """Answers sampled for each question."""
    max_new_tokens: int = 256
    """Of an answer, tool results included."""
    temperature: float = 1.0
    top_k: int = 0
    """Only 0, sampling among all tokens: the gradient is that of the full softmax."""
    eval_examples: int = 400
    """Questions of the test split that are asked before and after."""
    eval_samples: int = 4
    """Answers to each of them, for pass@k."""
    warmdown_ratio: float = 1.0
    init_lr_frac: float = 0.05
    enabled: bool = True
    """Run this stage only when --stages names it."""


class RLTrainer(StageTrainer, GRPOTrainer):
    """GRPOTrainer that times its generation, keeps samples, and measures pass@k."""

    def __init__(self, *args, samples: Path, processing_class: PreTrainedTokenizerBase, **kwargs):
        self.samples, self.outcomes = samples, defaultdict(list)
        reward = correctness(processing_class, self.record)
        super().__init__(*args, reward_funcs=reward, processing_class=processing_class, **kwargs)

    def _generate(self, prompts: list):
        start = time.perf_counter()
        result = super()._generate(prompts)
        if self.model.training:
            self.generation_seconds += time.perf_counter() - start
            self.step_tokens += sum(map(len, result[1])) * self.accelerator.num_processes
        return result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Leaves out rows without advantage (all of a question's answers equally good): their gradient is zero.

        As many as the rank that needs most rows can do without: TRL gathers figures of each row from all ranks.
        """
        useful = inputs["advantages"] != 0
        count = int(self.accelerator.gather(useful.sum()).max().clamp(min=1))  # none would leave nothing to gather
        rows = useful.float().argsort(descending=True, stable=True)[:count].sort().values
        inputs = {key: value[rows] if value.ndim else value for key, value in inputs.items()}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def record(self, rows: list[dict], texts: list[str], rewards: list[float]) -> None:
        """Sees every graded batch of this process: while measuring it notes who was right, else two samples."""
        if not self.model.training:
            for row, reward in zip(rows, rewards):
                self.outcomes[row["prompt"][-1]["content"]].append(bool(reward))
        elif self.is_world_process_zero():
            with writing(self.samples), self.samples.open("a") as file:
                for row, text, reward in list(zip(rows, texts, rewards))[:2]:
                    sample = {"step": self.state.global_step, "prompt": row["prompt"], "text": text, "reward": reward}
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the samples of steps that will be made again, and a line that was left half written."""

        def is_before(line: str) -> bool:
            try:
                return json.loads(line)["step"] < step
            except (ValueError, KeyError, TypeError):
                return False

        lines = self.samples.read_text(errors="replace").splitlines(keepends=True) if self.samples.exists() else []
        aside = self.samples.with_name(f".{self.samples.name}")
        with writing(self.samples):
            aside.write_text("".join(filter(is_before, lines)))
            os.replace(aside, self.samples)

    def evaluate(self, *args, **kwargs) -> dict:
        """pass@k on the test questions, k = 1, 2, 4 ... eval_samples; pass@1 is the accuracy. All ranks call it."""
        self.outcomes.clear()
        super().evaluate(*args, **kwargs)
        merged, samples = defaultdict(list), self.stage.eval_samples
        for question, right in gather_object(list(self.outcomes.items())):
            merged[question] += right
        right = [right[:samples] for right in merged.values()]  # ranks may repeat questions to fill their last batch
        found = {f"pass@{2**i}": pass_at_k(right, 2**i) for i in range(samples.bit_length())}
        self.log(dict(found))
        return {**found, "questions": len(right)}


def questions(config: RLConfig, split: str, tokenizer: PreTrainedTokenizerBase, room: int) -> tuple[list, list]:
    """Rows {"prompt", "kind", "answer", "entity", "rivals"} of one split, shuffled by the seed, and the skipped ones.

    A prompt of more than `room` tokens leaves no place for an answer and is a bad row.
    """
    name, _, kinds = config.dataset.partition(":")
    nothing, skipped = dict.fromkeys(COLUMNS, "") | {"rivals": []}, []
    if name == "primer":
        num = config.eval_examples if split == "test" else PRIMER_QUESTIONS
        rows = [row for kind in kinds.split("+") for row in primer.questions(kind, split, config.seed, num)]
    else:
        entry = {"dataset": config.dataset.replace("{split}", split), "subset": config.subset, "split": split}
        mixture, rows = Mixture([{**entry, "transform": "gsm8k"}], config.seed, config.on_bad_example), []
        for row in mixture:
            asked, answer = row["messages"][:1], hash_answer(row["messages"][-1]["content"])
            size = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
            if size > room:
                mixture.skip(row["entry"], row["row"], f"{size} tokens, and {room} leave room for an answer")
            else:
                rows.append({"kind": "gsm8k", "messages": asked, "answer": answer})
        skipped = mixture.skipped
    if not rows:
        raise InputError(f"{config.dataset} has no question of at most {room} tokens in split {split}")
    random.Random(config.seed).shuffle(rows)
    rows = [{"prompt": row["messages"], **{key: row.get(key, nothing[key]) for key in COLUMNS}} for row in rows]
    return (rows[: config.eval_examples] if split == "test" else rows), skipped


def grpo_arguments(config: RLConfig, output: Path) -> GRPOConfig:
    """TRL's arguments of the stage. Raises InputError when a step's answers cannot be shared out evenly."""
    answers = config.examples_per_step * config.num_samples
    config, steps = split_step(config, "examples_per_step x num_samples", answers)
    return GRPOConfig(
        **trainer_arguments(config, output),
        gradient_accumulation_steps=steps,
        num_generations=config.num_samples,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        top_k=0,
        max_tool_calling_iterations=MAX_TOOL_CALLS,
        num_generations_eval=config.eval_samples,
        per_device_eval_batch_size=max(1, EVAL_ROWS // config.eval_samples) * config.eval_samples,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="none",
        log_completions=False,
    )


def rollout(make_engine: Callable, config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """TRL's `rollout_func` over an engine of this project, whose answers hold the tool's results already."""
    engines = []

    def generate(prompts: list, trainer: RLTrainer) -> dict:
        model, training = trainer.accelerator.unwrap_model(trainer.model), trainer.model.training
        step, adapters = trainer.state.global_step, model if isinstance(model, PeftModel) else None
        model.eval()
        if adapters:  # an engine that keeps a copy of the weights reads them from the plain model
            adapters.merge_adapter()
            model = adapters.get_base_model()
        if not engines:
            engines.append(make_engine(model, tokenizer))
        elif hasattr(engines[0], "sync_weights"):  # it keeps a copy of the weights
            engines[0].sync_weights()
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        with torch.no_grad():  # samplers make no sense of NaN, and some no error either
            finite = bool(model(torch.tensor(ids[:1], device=model.device)).logits.isfinite().all())
        if not finite:
            trainer.stop_training("the logits are not finite")
        # An answer's seed is its place in the step, so any number of processes gives the same ones; batches of an
        # evaluation begin anew, whoever has them.
        first = trainer.args.process_index * len(ids) if training else 0
        answers = engines[0].generate(
            ids,
            seed=(trainer.args.seed + step) * 2**20 + first,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=0,
        )
        if adapters:
            adapters.unmerge_adapter()
        (adapters or model).train(training)
        answers = [samples[0] for samples in answers]
        own = [tool_result_mask(answer, tokenizer) for answer in answers]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None, "env_mask": own}

    return generate


def train_rl(config: RLConfig, model: str, output: Path, engine: Callable | None = None) -> None:
    """Practise on questions, from the model in folder `model`; the result and its metrics.json go to `output`.

    `engine`, if given, is called with model and tokenizer and makes what has the `generate` of
    eval.generation.Generator. Raises InputError for a data set without checkable answers, and for batch sizes that do
    not divide.
    """
    check_launch("rl")
    if config.top_k:
        raise InputError(
            f"top_k is {config.top_k}, and the gradient is that of sampling among all tokens: set top_k to 0, or "
            "leave it out"
        )
    record, output = start_record(config), Path(output)
    partial_state()
    with main_process_first(f"loading {model}"):
        tokenizer = load_tokenizer(model)
        network = load_chat_model(model, config, tokenizer)
    room = network.config.max_position_embeddings - config.max_new_tokens
    rows, skipped = questions(config, "train", tokenizer, room)
    held_out, bad = questions(config, "test", tokenizer, room)
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change, as every release reminds
    trainer = RLTrainer(
        model=network,
        args=grpo_arguments(config, output),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=lora(config),
        stage=config,
        samples=output / "samples.jsonl",
        **({"rollout_func": rollout(engine, config, tokenizer)} if engine else {"tools": [python]}),
    )
    before = trainer.evaluate()
    inputs = {"model": model_fingerprint(model) or model, "data": fingerprint([rows, held_out])}
    history = train_with_resume(trainer, output, inputs)
    after = trainer.evaluate()
    share = trainer.generation_seconds / max(trainer.step_seconds, 1e-9)
    numbers = {"before": before, "after": after, "generation_share": share, "skipped_rows": skipped + bad}
    if trainer.samples.exists():  # the main process writes them
        last = [json.loads(line) for line in trainer.samples.read_text().splitlines()[-4:]]
        numbers["samples"] = [{"prompt": row["prompt"][-1]["content"], "text": row["text"]} for row in last]
    save_stage(trainer, tokenizer, output, record, inputs, task=config.dataset, history=history, **numbers)
