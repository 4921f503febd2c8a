"""RL with verifiable rewards (RLVR) on TRL's GRPOTrainer; an engine of this project generates and runs the tool.

    nanochat rl --config recipes/cpu-demo/rl.yaml --run-dir runs/cpu-demo

As in karpathy/nanochat this is GRPO (arXiv:2402.03300) reduced to nearly REINFORCE. The first update of a batch is
on-policy; further ones (`updates_per_batch`) have importance weights, cut at 5 (CISPO, arXiv:2506.13585). There is no
KL term and no reference model. The advantage is the reward minus the prompt's mean reward (arXiv:2503.20783). The loss
is the mean over all sampled tokens of the batch (DAPO, arXiv:2503.14476), tool results masked; upstream takes the mean
per prompt. Tokens are sampled from the full softmax, as the gradient assumes; upstream samples from the top 50.
"""

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from ..data.grading import COLUMNS, correctness, hash_target, pass_at_k
from ..data.mixture import Mixture, log_skipped, prompts_of
from ..data.tokenizer import tool_result_mask
from ..demo import corpus as primer
from ..errors import InputError
from ..run import fingerprint, start_record, writing
from ..stage_configs import RLConfig
from . import checkpoint
from .runtime import check_launch
from .trainer import StageTrainer, load_source, split_step, trainer_arguments

EVAL_BATCH = 128  # completions that a device generates together in an evaluation
PRIMER_PROMPTS = 4000  # training prompts of each kind


class RLTrainer(StageTrainer, GRPOTrainer):
    """GRPOTrainer that times its generation, writes sample completions to `samples`, and measures pass@k."""

    unit = "prompts"
    shown = ("reward", "completion_length", "tool_use", "lr", "tokens_per_second")
    measured = ("pass@1",)

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

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._step = state.global_step * args.gradient_accumulation_steps  # TRL samples when a batch is used up
        if self.best_step is not None:
            self.best_checkpoint()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.num_iterations and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = False  # a resume would sample this batch anew

    @property
    def best_step(self) -> int | None:
        """The step of the highest pass@1 so far, the first of equals; None without `early_stopping_patience`."""
        scores = self.scores()
        return max(scores, key=scores.get, default=None)

    def scores(self) -> dict[int, float]:
        """pass@1 by step; empty without `early_stopping_patience`."""
        log = self.state.log_history if self.stage.early_stopping_patience > 0 else ()
        return {entry["step"]: entry["pass@1"] for entry in log if "pass@1" in entry}

    def is_complete(self) -> bool:
        worse = sum(step > self.best_step for step in self.scores())
        return super().is_complete() or 0 < self.stage.early_stopping_patience <= worse

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.control.should_save |= self.control.should_evaluate and self.stage.early_stopping_patience > 0
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_training_stop |= self.is_complete()

    def best_checkpoint(self) -> Path:
        """Raises InputError if it is not whole: on a new machine, `--sync` restores the newest checkpoint only."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.best_step}"
        if reason := checkpoint.damage(folder):
            raise InputError(f"{reason}; it has the best weights: restore it, or give early_stopping_patience=-1")
        return folder

    def evaluate_result(self) -> dict:
        """For metrics.json: the last evaluation; with early stopping the best weights come back before it."""
        best, last, log = self.best_step, self.state.global_step, self.state.log_history
        if best is None:
            return {"after": self.evaluate()}
        self.state.best_model_checkpoint = str(self.best_checkpoint())
        self._load_best_model()
        self.accelerator.print(f"[rl] ended after step {last} with the weights of step {best}, the best pass@1")
        self.state.global_step, self.state.log_history = best, list(log)  # so the same completions are sampled
        after, self.state.log_history, self.state.max_steps = self.evaluate(), log, last
        return {"after": after, "best_step": best}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Leave out completions without advantage (all of a prompt's have one reward): their gradient is zero.

        All ranks keep as many as the rank that needs most: TRL gathers metrics per completion from all ranks.
        The first update of a batch leaves its log-probabilities, those of the weights that sampled, for further ones.
        """
        useful = inputs["advantages"] != 0
        count = int(self.accelerator.gather(useful.sum()).max().clamp(min=1))  # an empty batch could not be gathered
        rows = useful.float().argsort(descending=True, stable=True)[:count].sort().values
        useful_rows = {key: value[rows] if value.ndim else value for key, value in inputs.items()}
        loss = super().compute_loss(model, useful_rows, return_outputs, num_items_in_batch)
        if "old_per_token_logps" not in inputs:
            old = inputs["old_per_token_logps"] = torch.zeros_like(inputs["completion_ids"], dtype=torch.float32)
            old[rows] = self.newest_logps
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self.model.training and not torch.is_grad_enabled():  # while TRL samples: see `compute_loss`
            return None, None, None
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.newest_logps = result[0].detach()
        return result

    def record(self, rows: list[dict], texts: list[str], rewards: list[float]) -> None:
        """Called with each graded batch: collects the outcomes of an evaluation, else writes two samples."""
        if not self.model.training:
            for row, reward in zip(rows, rewards):
                self.outcomes[str((row["prompt"], row["answer"]))].append(bool(reward))
        elif self.is_world_process_zero():
            with writing(self.samples), self.samples.open("a") as file:
                for row, text, reward in list(zip(rows, texts, rewards))[:2]:
                    sample = {"step": self.state.global_step, "prompt": row["prompt"], "text": text, "reward": reward}
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def discard_after(self, step: int) -> None:
        """Drop the samples of steps that will run again, and a half written line."""
        aside, lines = self.samples.with_name(f".{self.samples.name}"), []
        for line in self.samples.read_text(errors="replace").splitlines() if self.samples.exists() else ():
            try:
                if json.loads(line)["step"] < step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with writing(self.samples):
            aside.write_text("".join(lines))
            os.replace(aside, self.samples)

    def evaluate(self, *args, **kwargs) -> dict:
        """pass@k on the test prompts, k = 1, 2, 4 ... eval_samples; pass@1 is the accuracy. All ranks call it."""
        self.outcomes.clear()
        super().evaluate(*args, **kwargs)
        merged, samples = defaultdict(list), self.stage.eval_samples
        for prompt, outcomes in gather_object(list(self.outcomes.items())):
            merged[prompt] += outcomes
        merged = [outcomes[:samples] for outcomes in merged.values()]  # ranks may repeat prompts to fill a last batch
        metrics = {f"pass@{2**i}": pass_at_k(merged, 2**i) for i in range(samples.bit_length())}
        self.log(dict(metrics))
        return {**metrics, "questions": len(merged)}


def load_prompts(config: RLConfig, split: str, tokenizer, max_length: int) -> tuple[list[dict], list[dict], int]:
    """Prompts of a split, shuffled by the seed: rows {"prompt", *COLUMNS}; skipped ones with reasons; their number."""
    name, _, kinds = config.dataset.partition(":")
    defaults, skipped = dict.fromkeys(COLUMNS, "") | {"rivals": []}, []
    num_skipped = 0
    if name == "primer":
        num = config.eval_examples if split == "test" else PRIMER_PROMPTS
        rows = [row for kind in kinds.split("+") for row in primer.questions(kind, split, config.seed, num)]
    else:
        mixture, rows = Mixture([prompts_of(config, split)], config.seed, config.on_bad_example), []
        for row in mixture:
            prompt = list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
            answer = hash_target(row["messages"][-1]["content"])
            size = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
            if answer is None:  # a reply without one would be right
                mixture.skip(row["entry"], row["row"], "no number alone follows '#### ' in the answer")
            elif size > max_length:
                mixture.skip(row["entry"], row["row"], f"{size} tokens, and {max_length} leave room for an answer")
            else:
                rows.append({"kind": "gsm8k", "messages": prompt, "answer": answer})
        skipped, num_skipped = mixture.skipped, mixture.entries[0].num_bad
        log_skipped(f"rl, {split}", skipped, num_skipped)
    if not rows:
        raise InputError(f"{config.dataset} has no question of at most {max_length} tokens in split {split}")
    random.Random(config.seed).shuffle(rows)
    rows = [{"prompt": row["messages"], **{key: row.get(key, defaults[key]) for key in COLUMNS}} for row in rows]
    return (rows[: config.eval_examples] if split == "test" else rows), skipped, num_skipped


def grpo_arguments(config: RLConfig, output: Path) -> GRPOConfig:
    """TRL's arguments of the stage. Raises InputError when a step's completions cannot be divided evenly."""
    config, grad_accum_steps = split_step(config)
    return GRPOConfig(
        **trainer_arguments(config, output),
        gradient_accumulation_steps=grad_accum_steps,
        num_generations=config.num_samples,
        num_iterations=config.updates_per_batch,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        top_k=0,
        num_generations_eval=config.eval_samples,
        per_device_eval_batch_size=max(1, EVAL_BATCH // config.eval_samples) * config.eval_samples,
        beta=0.0,
        loss_type="cispo",
        epsilon_high=5.0,
        scale_rewards="none",
        log_completions=False,
    )


def rollout(make_engine: Callable, config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """TRL's `rollout_func` over an engine of this project, whose completions contain the tool results."""
    engines = []

    def generate(prompts: list, trainer: RLTrainer) -> dict:
        model, training = trainer.accelerator.unwrap_model(trainer.model), trainer.model.training
        step, adapters = trainer.state.global_step, model if isinstance(model, PeftModel) else None
        model.eval()
        if adapters:  # an engine with a copy of the weights reads them from the plain model
            adapters.merge_adapter()
            model = adapters.get_base_model()
        if not engines:
            engines.append(make_engine(model, tokenizer))
        elif hasattr(engines[0], "sync_weights"):  # it keeps a copy of the weights
            engines[0].sync_weights()
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        with torch.no_grad():  # some samplers take NaN without an error
            finite = bool(model(torch.tensor(ids[:1], device=model.device)).logits.isfinite().all())
        if not finite:
            trainer.stop_training("the logits are not finite")
        # The seed is the completion's place in the step, so any number of ranks samples the same ones; batches of an
        # evaluation begin at 0, whichever rank has them.
        first = trainer.args.process_index * len(ids) if training else 0
        completions = engines[0].generate(
            ids,
            seed=(trainer.args.seed + step) * 2**20 + first,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=0,
        )
        if adapters:
            adapters.unmerge_adapter()
        (adapters or model).train(training)
        completions = [samples[0] for samples in completions]
        env_mask = [tool_result_mask(tokenizer, completion) for completion in completions]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": env_mask}

    return generate


def train_rl(config: RLConfig, model: str, output: Path, engine: Callable) -> None:
    """RLVR from the model in folder `model`; the result and its metrics.json go to `output`.

    `engine` is (model, tokenizer) -> an object with the `generate` of eval.lm_eval_model.Generator. Raises InputError
    for a dataset without verifiable answers, and for batch sizes that do not divide.
    """
    check_launch("rl")
    record, output, size = start_record(config), Path(output), config.updates_per_batch
    every = {key: -(-getattr(config, key) // size) * size for key in ("eval_every", "save_every")}
    config = replace(config, **every)  # a resume within a batch would sample it anew
    tokenizer, network = load_source(model, config)
    context = network.config.max_position_embeddings
    if (max_length := context - config.max_new_tokens) < 1:
        raise InputError(f"max_new_tokens is {config.max_new_tokens}: it must leave room for a prompt, in {context}")
    rows, skipped, num_skipped = load_prompts(config, "train", tokenizer, max_length)
    eval_rows, eval_skipped, num_eval_skipped = load_prompts(config, "test", tokenizer, max_length)
    if len(rows) < (needed := config.examples_per_step):  # TRL would take no step
        raise InputError(f"{config.dataset} has {len(rows)} usable questions: lower examples_per_step, {needed}")
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL warns at every use of rollout_func
    trainer = RLTrainer(
        model=network,
        args=grpo_arguments(config, output),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        stage=config,
        source=model,
        samples=output / "samples.jsonl",
        rollout_func=rollout(engine, config, tokenizer),
    )
    before = trainer.evaluate()
    trainer.train_with_resume({"data": fingerprint([rows, eval_rows])})
    result = trainer.evaluate_result()
    share = trainer.generation_seconds / max(trainer.step_seconds, 1e-9)
    numbers = {"before": before, **result, "generation_share": share}
    numbers |= {"skipped_rows": skipped + eval_skipped, "bad": num_skipped + num_eval_skipped}
    if trainer.samples.exists():  # the main process writes them
        last = [json.loads(line) for line in trainer.samples.read_text().splitlines()[-4:]]
        numbers["samples"] = [{"prompt": row["prompt"][-1]["content"], "text": row["text"]} for row in last]
    trainer.save_stage(record, task=config.dataset, **numbers)
