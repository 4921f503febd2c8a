"""What mid-training, SFT and RL share: a transformers Trainer with this project's optimizer, schedule, resume and bar.

`StageTrainer` stands before one of TRL's trainers (`class ChatTrainer(StageTrainer, SFTTrainer)`) and changes four
things: Muon + AdamW by role, their rates and Muon's momentum by `schedule.Schedule`, checkpoints that a killed stage
finds again (with each rank's own optimizer state), and one progress bar in place of printed dicts.
`train_with_resume` trains, resumes and returns the log; `save_stage` writes the folder that the next stage loads.
"""

import math
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from .. import tool_loop
from ..distributed import main_process_first, monitored_barrier, on_cpu, partial_state
from ..errors import InputError
from ..optim.muon_adamw import MuonAdamW, deepspeed_optimizer, param_groups
from ..optim.scaling import DEFAULTS, optimizer_groups
from ..optim.schedule import Schedule
from ..run import load_json, model_fingerprint, save_json, without_nan, write_metrics, writing
from .checkpoint import (
    COMPLETE,
    MEASURED,
    SKIPPED,
    all_checkpoints,
    complete_checkpoints,
    load_optimizer_state,
    merged,
    missing_file,
    newest_intact,
    random_state,
    reading,
    refuse_change,
    refuse_nan,
    remove,
    restore_random_state,
    save_model,
    step_of,
    superseded,
    write_manifest,
)
from .runtime import copy_to_host_async, graceful_shutdown, shard_on_cpu, split_global_batch

MAY_CHANGE = ("device_batch_size", "eval_every", "save_every", "keep_checkpoints", "report_to")  # keys, at a stop
SAME = ("grad_norm", "time", "tokens_per_second", "chatcore", "reward", "reward_std", "entropy", "tool_use")
HISTORY = {name: name for name in SAME} | {  # what metrics.json's history keeps, by the names that the libraries give
    "loss": "train_loss",
    "eval_loss": "val_loss",
    "mean_token_accuracy": "token_accuracy",
    "eval_reward": "val_reward",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "cut_off",
    "tools/failure_frequency": "tool_failures",
}


@dataclass
class StageConfig:
    """Keys that mid.yaml, sft.yaml, rl.yaml and dpo.yaml have in common."""

    num_iterations: int = -1
    """Optimizer steps; -1: as many as `num_epochs` passes over the data take."""
    num_epochs: float = 1
    device_batch_size: int = 16
    """Rows that a device takes at once; fewer where a step has no more for each."""
    on_bad_example: str = "skip"
    """What to do with rows of the data that cannot be used: `skip` and count them, or `error`."""
    embedding_lr: float | None = None
    """This and the next three: rates at width 768, as in base.yaml; empty: those of the model's generation."""
    unembedding_lr: float | None = None
    matrix_lr: float | None = None
    scalar_lr: float | None = None
    init_lr_frac: float = 1.0
    """Factor on all of these rates."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the rates rise."""
    warmdown_ratio: float = 0.5
    """Share of the steps, at the end, in which the rates fall linearly."""
    final_lr_frac: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Gradients are clipped at this norm; 0: not at all."""
    lora_r: int = 0
    """Rank of LoRA adapters, merged into the weights at the end; 0: train all weights."""
    lora_alpha: int = 32
    lora_lr: float = 1e-3
    """AdamW rate of the adapters."""
    eval_every: int = -1
    """Steps between evaluations; -1: only at the ends."""
    save_every: int = -1
    """Steps between checkpoints for a resume; -1: only one after the last step, before the closing evaluation."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk while the stage trains."""
    attn_implementation: str | None = None
    seed: int = 0
    report_to: str = "none"
    """Where TRL reports to: none, trackio, wandb, tensorboard."""


def tool_result_mask(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """1 for each token that a speaker chose, 0 for those of a tool's result, its marks included."""
    opens, closes = tokenizer.convert_tokens_to_ids(["<|output_start|>", "<|output_end|>"])
    inside, mask = False, []
    for token in ids:
        inside = inside or token == opens
        mask.append(int(not inside))
        inside = inside and token != closes
    return mask


def split_step(config: StageConfig, name: str, total: int, unit: int = 1) -> tuple[StageConfig, int]:
    """-> the config, with fewer rows a device if a step of `total` has no more for each, and the batches of a step.

    Raises InputError, which calls the total `name`, when it cannot be shared out (`device.share_out`).
    """
    state = partial_state()
    rows, steps = split_global_batch(name, total, unit, config.device_batch_size, state.num_processes, state.print)
    return replace(config, device_batch_size=rows), steps


def trainer_arguments(config: StageConfig, output: Path) -> dict:
    """Arguments that TRL's configs share. transformers chooses the device; nothing is downloaded or pushed."""
    # gradient_checkpointing has a new name since 5.20, which older versions do not know
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    if config.num_iterations == 0:
        raise InputError("num_iterations is 0, which trains nothing: give a number of steps, or -1")
    return {
        "output_dir": str(output / "state"),
        "max_steps": config.num_iterations,
        "num_train_epochs": config.num_epochs,
        "per_device_train_batch_size": config.device_batch_size,
        "max_grad_norm": config.max_grad_norm,
        "eval_strategy": "steps" if config.eval_every > 0 else "no",
        "eval_steps": config.eval_every if config.eval_every > 0 else None,
        "save_strategy": "steps",  # which saves after the last step, too
        "save_steps": config.save_every if config.save_every > 0 else 10**9,
        "save_total_limit": None,  # transformers deletes old ones before all ranks have written the new one
        "logging_steps": 0.005,  # of the run: two hundred points on a curve
        "logging_first_step": True,
        "use_cpu": on_cpu(),
        "bf16": False,  # no autocast: see load_model
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": 2 if torch.cuda.is_available() else 0,
        "logging_nan_inf_filter": False,  # it waits for the device in every micro-batch
        "disable_tqdm": True,  # the bar is ours
        "report_to": config.report_to,
        "seed": config.seed,
    }


class StageTrainer:
    """Mixin before a TRL trainer.

    Takes the stage's config as the keyword `stage`, and as `momenta` the file of an optimizer's state to begin with.
    """

    def __init__(self, *args, stage: StageConfig, momenta: Path | None = None, **kwargs):
        self.stage, self.momenta = stage, momenta
        self.began, self.earlier = time.time(), 0.0  # `earlier`: seconds of the killed processes before this one
        self.step_tokens, self.step_seconds = 0, 0.0  # since this process started, evaluations left out
        self.generation_seconds = 0.0  # of these, in RL
        self.parts: list[Path] = []  # files with the optimizer state that this rank begins with, on a resume
        self.all_finite: torch.Tensor | None = None  # () bool on the device: all gradient norms so far were finite
        self.resumed_log: list[dict] = []  # log of the steps before this process
        self.measured_at = 0  # the last step after which `measure` was called
        self.signal = 0  # number of the signal that asked to stop
        self.skipped: list[int] = []  # steps whose gradients were not finite
        self.unread: list[tuple[int, Callable]] = []  # (step, what reads `all_finite` as it was then)
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(StageCallback(self))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_cpu(self.accelerator) or self.is_fsdp_enabled

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            network, rates = self.model if model is None else model, self.rates()
            groups = param_groups(network, rates)
            if self.is_deepspeed_enabled:
                self.optimizer = deepspeed_optimizer(groups, self.accelerator.deepspeed_plugin.deepspeed_config)
            else:
                self.optimizer = MuonAdamW(groups)
        return self.optimizer

    def rates(self) -> dict[str, dict]:
        """Options of each role's group: the generation's own rates, or those that the recipe names, x init_lr_frac."""
        names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
        named = {name: value for name in names if (value := getattr(self.stage, name)) is not None}
        shape = self.model.config
        groups = optimizer_groups(replace(DEFAULTS[shape.generation], **named), shape.generation, shape.hidden_size)
        groups = {role: {**group, "lr": group["lr"] * self.stage.init_lr_frac} for role, group in groups.items()}
        return {**groups, "lora": {**groups["head"], "lr": self.stage.lora_lr, "betas": (0.9, 0.99)}}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            stage, recipe = self.stage, DEFAULTS[self.model.config.generation]
            self.schedule = schedule = Schedule(
                num_training_steps,
                warmup_steps=math.ceil(stage.warmup_ratio * num_training_steps),
                warmdown_ratio=stage.warmdown_ratio,
                final_lr_frac=stage.final_lr_frac,
                momentum=recipe.momentum,
                momentum_steps=recipe.momentum_steps,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule.lr)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *args, **kwargs):
        """As transformers', which takes one step too many if a run is resumed after its last step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """As transformers'; the optimizer skips the step, on the device, if a norm up to now is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate's wrapper is around it
        if isinstance(inner, MuonAdamW):
            finite = (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()
            self.all_finite = finite if self.all_finite is None else finite & self.all_finite
            inner.step_factor = self.all_finite.float()
            self.unread.append((self.state.global_step + 1, copy_to_host_async(self.all_finite[None].float())))
        return norm

    def check_finite(self, lag: int = 0) -> None:
        """Read whether the steps up to the last `lag` ones were finite; if not, save and raise FloatingPointError.

        The checkpoint has the weights before the step, and the data after it. None is written if the step before was
        skipped as well or the step is the last: a run that diverged would skip its way to the end.
        """
        while len(self.unread) > lag:
            step, read = self.unread.pop(0)
            if not read()[0]:
                skipped = [step, *(number for number, _ in self.unread)]
                self.unread.clear()
                for _ in skipped:
                    self.optimizer.optimizer.rollback_step_count()
                reason = f"the gradients of step {step} are not finite"
                if step - 1 in self.skipped or skipped[-1] >= self.state.max_steps:
                    self.stop_training(reason)
                self.skipped += skipped
                if self.is_world_process_zero():
                    save_json(Path(self.args.output_dir) / SKIPPED, {"steps": self.skipped})
                self.save_checkpoint()
                self.stop_training(reason, "Run again to go on with the rows after it; if that happens again, lower")

    def checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def save_checkpoint(self) -> None:
        self._save_checkpoint(self.model_wrapped, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def stop_training(self, reason: str, advice: str = "Lower") -> None:
        state = Path(self.args.output_dir)
        checkpoints = complete_checkpoints(state)
        left = f"the last checkpoint with finite weights is {checkpoints[-1]}" if checkpoints else "no checkpoint yet"
        raise FloatingPointError(
            f"{state.parent.name}: {reason}; {left}. {advice} the learning rates or set max_grad_norm, delete {state} "
            "and start this stage anew"
        )

    def _save_checkpoint(self, model, trial):
        """As transformers', but only of finite weights, and a full disk is one line and leaves no half checkpoint."""
        self.check_finite()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            try:
                refuse_nan(self.accelerator.unwrap_model(self.model).state_dict(), "the model")
            except FloatingPointError as error:
                self.stop_training(str(error).partition(":")[0])
        self.state.log_history[:] = without_nan(self.state.log_history)
        folder = self.checkpoint_folder()
        older = complete_checkpoints(folder.parent)
        try:
            with writing(folder, f"; the checkpoint before it is {older[-1]}" if older else ""):
                super()._save_checkpoint(model, trial)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """As transformers', but saves before it evaluates: a failing evaluation must not cost the training before."""
        evaluate, self.control.should_evaluate = self.control.should_evaluate, False
        self.control.should_save |= evaluate and self.args.world_size > 1  # after it one rank may have failed
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.measure_after_step(evaluate)

    def measure_after_step(self, evaluate: bool) -> None:
        """The evaluation, if `evaluate`, and `measure`, if it is due. Random state stays as it was."""
        measure = self.is_measurement_due() and self.measured_at != self.state.global_step  # also called by epoch
        if not evaluate and not measure:
            return
        before, self.measured_at = random_state(), self.state.global_step
        try:
            if evaluate:
                self.evaluate()
            if measure:
                self.measure()
        except Exception:
            if self.args.world_size == 1 and not (self.checkpoint_folder() / COMPLETE).exists():
                self.save_checkpoint()
            raise
        restore_random_state(before)
        monitored_barrier("the end of an evaluation")
        folder = self.checkpoint_folder()
        if self.is_world_process_zero() and (folder / COMPLETE).exists():
            save_json(folder / MEASURED, {"log": self.state.log_history})

    def on_signal(self, number: int) -> None:
        self.signal = number

    def rewind(self, step: int) -> None:
        """Called on the main process before training goes on after `step` steps: drop what later steps wrote."""

    def is_measurement_due(self) -> bool:
        """Whether `measure` is to be called after this step."""
        return False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        names = {"loss": "the loss", "grad_norm": "the gradient norm", "eval_loss": "the validation loss"}
        for key, name in names.items():
            if key in logs and not math.isfinite(logs[key]):
                self.check_finite()
                self.stop_training(f"{name} is {logs[key]} at step {self.state.global_step}")
        logs["time"] = self.earlier + time.time() - self.began
        if self.step_seconds:
            logs["tokens_per_second"] = self.step_tokens / self.step_seconds
        super().log(logs, start_time)


class StageCallback(TrainerCallback):
    """The bar, Muon's momentum, and a checkpoint that is complete: every rank's optimizer state, then a mark."""

    def __init__(self, trainer: StageTrainer):
        self.trainer, self.bar = trainer, None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.trainer.parts:
            with reading(self.trainer.parts[0].parent):
                parts = [torch.load(part, map_location="cpu", weights_only=True) for part in self.trainer.parts]
                optimizer.load_state_dict(merged(parts))
        elif state.global_step == 0 and self.trainer.momenta and self.trainer.momenta.exists():
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper is around it
            if isinstance(inner, MuonAdamW) and self.trainer.stage.lora_r <= 0:
                load_optimizer_state(
                    self.trainer.momenta, self.trainer.accelerator.unwrap_model(self.trainer.model), inner
                )
        state.compute_steps(args, state.max_steps)  # a resume would go on with the intervals of the checkpoint
        self.begun_at = step = state.global_step
        if self.trainer.resumed_log:
            state.log_history = self.trainer.resumed_log
        if step and not (self.trainer.checkpoint_folder() / MEASURED).exists():  # stopped in its evaluations
            due = args.eval_strategy == "steps" and (step % state.eval_steps == 0 or step >= state.max_steps)
            self.trainer.measure_after_step(due)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            desc=Path(args.output_dir).parent.name,
            disable=not state.is_world_process_zero,
        )

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.step_began = time.time()
        for group in optimizer.param_groups:
            if group.get("kind") == "muon":
                group["momentum"] = self.trainer.schedule.muon_momentum(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.check_finite(lag=1 if torch.cuda.is_available() else 0)  # a queued step is not waited for
        trainer.step_seconds += time.time() - self.step_began
        if state.global_step == self.begun_at + 1 and torch.cuda.is_available():  # compiled, or chose its kernels
            trainer.step_tokens, trainer.step_seconds, trainer.generation_seconds = 0, 0.0, 0.0
        self.bar.update(state.global_step - self.bar.n)
        if trainer.signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"loss": "loss", "reward": "reward", "eval_loss": "val", "tokens_per_second": "tok/s"}
        if self.bar is not None:
            self.bar.set_postfix({shown[key]: f"{value:,.4g}" for key, value in logs.items() if key in shown})

    def on_save(self, args, state, control, optimizer=None, **kwargs):
        folder = self.trainer.checkpoint_folder()
        if sharded(self.trainer):
            with writing(folder):
                torch.save(optimizer.state_dict(), folder / f"optimizer-{args.process_index}.pt")
        monitored_barrier(f"{folder.name} of {folder.parent.parent.name}")
        if state.is_world_process_zero:
            write_manifest(folder, COMPLETE)
            for old in superseded(complete_checkpoints(folder.parent), self.trainer.stage.keep_checkpoints):
                (old / COMPLETE).unlink()  # a kill while it is deleted must not leave half of one that counts
                remove(old)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def sharded(trainer: StageTrainer) -> bool:
    """Whether each process holds optimizer state of its own (DDP): transformers saves only the first one's."""
    return trainer.args.world_size > 1 and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def train_with_resume(trainer: StageTrainer, output: Path, inputs: dict[str, str | None]) -> list[dict]:
    """Train, from the last complete checkpoint in output/state if there is one; returns the rows of `history`.

    Args:
        inputs: fingerprints of the model that it starts from and of its data; a checkpoint of others is refused.

    Raises:
        InputError: the checkpoint belongs to another recipe, model, data or launch, or is damaged.
        FloatingPointError: loss or gradients are not finite; a checkpoint from before that step is on disk.
    """
    state, args = output / "state", trainer.args
    settings = {key: value for key, value in asdict(trainer.stage).items() if key not in MAY_CHANGE} | inputs
    settings["rows of a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    zero = f"ZeRO over {args.world_size} processes"  # whose pieces fit no other number of them
    settings["sharding"] = zero if trainer.is_deepspeed_enabled else "FSDP2" if trainer.is_fsdp_enabled else "none"
    checkpoint = newest_intact(complete_checkpoints(state), COMPLETE, trainer.accelerator.print)
    if checkpoint and (name := missing_file(checkpoint)):
        raise InputError(f"{checkpoint / name} is missing: bring it back, or delete {checkpoint} to do without it")
    with main_process_first("preparing the checkpoints' folder") as main:
        if checkpoint:
            refuse_change(state, settings, trainer.accelerator.print)
        if main:
            # A checkpoint that was not written to its end would be in the way of a new one of its step.
            for folder in set(all_checkpoints(state)) - set(complete_checkpoints(state)):
                remove(folder)
            save_json(state / "config.json", settings)
            trainer.rewind(step_of(checkpoint) if checkpoint else 0)
    trainer.skipped = (load_json(state / SKIPPED) or {}).get("steps", []) if checkpoint else []
    if checkpoint:
        measured, written = load_json(checkpoint / MEASURED), load_json(checkpoint / "trainer_state.json")
        log = measured["log"] if measured else written["log_history"]
        trainer.earlier, trainer.resumed_log = log[-1]["time"] if log else 0.0, log
        trainer.parts = list(checkpoint.glob("optimizer-*.pt"))  # none if one process wrote it: then it is whole
        if len(trainer.parts) == args.world_size:
            trainer.parts = [checkpoint / f"optimizer-{args.process_index}.pt"]
    # A model that was evaluated before counts as prepared, without DDP: gradients would stay on each process.
    prepared = trainer.accelerator._models
    prepared[:] = [model for model in prepared if model is not trainer.model]
    trainer.model._is_accelerate_prepared = False
    with graceful_shutdown(trainer.on_signal) if args.world_size == 1 else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.signal and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.print(f"stopped by a signal after step {trainer.state.global_step}; run again to resume")
        raise SystemExit(128 + trainer.signal)
    return history(trainer)


def history(trainer: StageTrainer) -> list[dict]:
    """The log as rows {step, lr_multiplier, ...}, one a step that was logged."""
    rows: dict[int, dict] = {}
    for entry in trainer.state.log_history:
        if "train_runtime" not in entry:  # the library's summary, not a step
            step = entry["step"]
            row = rows.setdefault(step, {"step": step, "lr_multiplier": trainer.schedule.lr(max(step - 1, 0))})
            row.update({name: entry[key] for key, name in HISTORY.items() if key in entry})
            row.update({key: value for key, value in entry.items() if key.startswith("pass@")})
    return list(rows.values())


def save_stage(
    trainer: StageTrainer, tokenizer: PreTrainedTokenizerBase, output: Path, record: dict, inputs: dict, **numbers
) -> None:
    """Make `output` a folder for from_pretrained (adapters merged in, with the tool loop and metrics.json), without
    what a resume would have needed. All ranks call it."""
    monitored_barrier("the end of training")
    if trainer.is_world_process_zero():
        tool_loop.ship(output)
    if trainer.is_deepspeed_enabled:
        trainer.save_model(str(output))
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_model(output, model.merge_and_unload() if trainer.stage.lora_r > 0 else model, tokenizer)
    if trainer.is_world_process_zero():
        speeds = [row["tokens_per_second"] for row in numbers["history"] if "tokens_per_second" in row]
        speed = trainer.step_tokens / trainer.step_seconds if trainer.step_seconds else (speeds or [None])[-1]
        record |= {"earlier_wall_time_s": trainer.earlier, "weights": model_fingerprint(output), "inputs": inputs}
        record["skipped_steps"] = trainer.skipped
        write_metrics(output, record, tokens_per_second=speed, **numbers)
        shutil.rmtree(output / "state", ignore_errors=True)
