"""What mid-training, SFT, RL and DPO share: a TRL trainer with this project's optimizer, schedule and exact resume.

`StageTrainer` is a mixin: `class ChatTrainer(StageTrainer, SFTTrainer)`. It brings Muon + AdamW by parameter role, the
schedule of learning rates and Muon momentum, checkpoints with each rank's optimizer state, and one progress bar.
`train_with_resume` trains, from the last complete checkpoint if there is one. `save_stage` writes the model folder
that the next stage loads, with its metrics.json.
"""

import math
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from .. import tool_loop
from ..data.tokenizer import load_tokenizer
from ..distributed import main_process_first, monitored_barrier, on_cpu, partial_state
from ..errors import InputError
from ..metrics import ChatMeasured, Skipped, TrainerState
from ..optim.muon_adamw import MuonAdamW, deepspeed_optimizer, param_groups
from ..optim.overview import batch_text, block, data_text, stage_batch, stage_rows
from ..optim.scaling import DEFAULTS, Schedule, stage_groups
from ..run import Progress, in_words, load_json, model_fingerprint, save_json, without_nan, write_metrics
from ..stage_configs import StageConfig
from . import checkpoint
from .model_setup import compute_dtype, load_chat_model, lora
from .runtime import copy_to_host_async, graceful_shutdown, peak_memory, shard_on_cpu

# Keys that may differ between the parts of an interrupted run.
MAY_CHANGE = ("device_batch_size", "eval_every", "save_every", "keep_checkpoints", "report_to")
MAY_CHANGE += ("early_stopping_patience",)
SAME = ("grad_norm", "time", "tokens_per_second", "chatcore", "reward", "reward_std", "entropy", "tool_use")
HISTORY = {name: name for name in SAME} | {  # entry of the libraries' log -> column of metrics.json's history
    "loss": "train_loss", "eval_loss": "val_loss", "mean_token_accuracy": "token_accuracy",
    "eval_reward": "val_reward", "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_ratio", "frac_reward_zero_std": "frac_reward_zero_std",
}  # fmt: skip
MUST_BE_FINITE = {"loss": "the loss", "grad_norm": "the gradient norm", "eval_loss": "the validation loss"}


def load_source(model: str, config: StageConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and float32 model of a folder or Hub id; a download is done once, by the main process."""
    partial_state()
    with main_process_first(f"loading {model}"):
        tokenizer = load_tokenizer(model)
        return tokenizer, load_chat_model(model, config, tokenizer)


def split_step(config: StageConfig, length: int = 1) -> tuple[StageConfig, int]:
    """The config, with device_batch_size lowered if a step has fewer sequences per rank, and its accumulation steps.

    length: as in `stage_batch`. Raises InputError if the ranks cannot divide the step evenly.
    """
    state = partial_state()
    size, steps = stage_batch(config, state.num_processes, length, state.print)
    return replace(config, device_batch_size=size), steps


def trainer_arguments(config: StageConfig, output: Path) -> dict:
    """Arguments that the configs of TRL's trainers have in common."""
    # TRL sets gradient_checkpointing under the name it had before transformers 5.20.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(output / "state"),
        "max_steps": config.num_iterations,
        "num_train_epochs": config.num_epochs,
        "per_device_train_batch_size": config.device_batch_size,
        "max_grad_norm": config.max_grad_norm,
        "eval_strategy": "steps" if config.eval_every > 0 else "no",
        "eval_steps": config.eval_every if config.eval_every > 0 else None,
        "save_strategy": "steps",  # saves after the last step, too
        "save_steps": config.save_every if config.save_every > 0 else 10**9,
        "save_total_limit": None,  # transformers deletes old checkpoints before all ranks have written the new one
        "logging_steps": 0.005,  # of the run: two hundred points on a curve
        "logging_first_step": True,
        "use_cpu": on_cpu(),
        "bf16": False,  # no autocast: see load_chat_model
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 2 if cuda else 0,
        "logging_nan_inf_filter": False,  # it would synchronize with the device in every micro-batch
        "disable_tqdm": True,  # StageTrainer has its own bar
        "report_to": config.report_to,
        "seed": config.seed,
    }


class StageTrainer(TrainerCallback):
    """Mixin before a TRL trainer, and a callback of that trainer.

    `stage` is the stage's config, `source` the folder or Hub id of the model. With the key `load_optimizer` training
    begins with the optimizer state in its optimizer.pt. `shown` names the numbers of the progress, `measured` those
    of an evaluation that get a line.
    """

    unit, padding = "rows", 0  # what an item of the training set is; items that only make up whole steps
    shown: tuple[str, ...] = ("train_loss", "lr", "tokens_per_second")
    measured: tuple[str, ...] = ("val_loss", "eval_rewards/accuracies", "chatcore", "pass@1")
    best_step: int | None = None  # its checkpoint is kept

    def __init__(self, *args, stage: StageConfig, source: str = "", **kwargs):
        self.stage, self.source = stage, source
        self.start_time, self.earlier_seconds = time.time(), 0.0  # earlier: of the interrupted processes before
        self.step_tokens, self.step_seconds = 0, 0.0  # of this process, without evaluations
        self.generation_seconds = 0.0  # part of step_seconds, in RL
        self.optimizer_shards: list[Path] = []  # files to resume this rank's optimizer state from
        self.resumed_log: list[dict] = []  # log entries of the steps before this process
        self.all_finite: torch.Tensor | None = None  # () bool on the device: all gradient norms so far were finite
        self.pending_checks: list[tuple[int, Callable]] = []  # (step, reader of `all_finite` as it was then)
        self.skipped: list[int] = []  # steps whose gradients were not finite
        self.last_measured_step = 0
        self.signals: list[int] = []  # SIGTERM or SIGINT, once received
        self.progress: Progress | None = None
        self.numbers: dict = {}  # newest ones, of which the progress shows some
        super().__init__(*args, peft_config=lora(stage), **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(self)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_cpu(self.accelerator) or self.is_fsdp_enabled

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = param_groups(self.model if model is None else model, self.optimizer_options())
            if self.is_deepspeed_enabled:
                self.optimizer = deepspeed_optimizer(groups, self.accelerator.deepspeed_plugin.deepspeed_config)
            else:
                self.optimizer = MuonAdamW(groups)
        return self.optimizer

    def optimizer_options(self) -> dict[str, dict]:
        return stage_groups(self.stage, self.model.config)

    def inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            stage, defaults = self.stage, DEFAULTS[self.model.config.generation]
            self.schedule = Schedule(
                num_training_steps,
                warmup_steps=math.ceil(stage.warmup_ratio * num_training_steps),
                warmdown_ratio=stage.warmdown_ratio,
                final_lr_frac=stage.final_lr_frac,
                momentum=defaults.momentum,
                momentum_steps=defaults.momentum_steps,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.lr)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None):
        if "input_ids" in inputs:  # RL has rows of prompts, and counts what it generates
            self.step_tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        """As transformers'; the optimizer skips the step, on the device, once a norm was not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        inner = self.inner_optimizer()
        if isinstance(inner, MuonAdamW):
            finite = (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()
            self.all_finite = finite if self.all_finite is None else finite & self.all_finite
            inner.step_factor = self.all_finite.float()
            self.pending_checks.append((self.state.global_step + 1, copy_to_host_async(self.all_finite[None].float())))
        return norm

    def check_finite(self, lag: int = 0) -> None:
        """Check the steps up to the last `lag` ones; if one was not finite, save and raise FloatingPointError.

        The checkpoint has the weights before that step and the data position after it. None is written if the step
        before was skipped, too, or the step is the last: else a diverged run would reach its end.
        """
        while len(self.pending_checks) > lag:
            step, read = self.pending_checks.pop(0)
            if not read()[0]:
                skipped = [step, *(number for number, _ in self.pending_checks)]
                self.pending_checks.clear()
                for _ in skipped:
                    self.optimizer.optimizer.rollback_step_count()
                reason = f"the gradients of step {step} are not finite"
                if step - 1 in self.skipped or skipped[-1] >= self.state.max_steps:
                    self.stop_training(reason)
                self.skipped += skipped
                if self.is_world_process_zero():
                    save_json(Path(self.args.output_dir) / checkpoint.SKIPPED, {"steps": self.skipped})
                self._save_checkpoint()
                self.stop_training(reason, "Run again to resume with the data after it; if that happens again, lower")

    def stop_training(self, reason: str, advice: str = "Lower") -> None:
        state = Path(self.args.output_dir)
        checkpoints = checkpoint.complete_checkpoints(state)
        last = f"the last checkpoint with finite weights is {checkpoints[-1]}" if checkpoints else "no checkpoint yet"
        again = f"{advice} the learning rates or set max_grad_norm, delete {state} and start this stage anew"
        raise FloatingPointError(f"{state.parent.name}: {reason}; {last}. {again}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for key, name in MUST_BE_FINITE.items():
            if key in logs and not math.isfinite(logs[key]):
                self.check_finite()
                self.stop_training(f"{name} is {logs[key]} at step {self.state.global_step}")
        logs["time"] = self.earlier_seconds + time.time() - self.start_time
        if self.step_seconds:
            logs["tokens_per_second"] = self.step_tokens / self.step_seconds
        super().log(logs, start_time)

    def checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_checkpoint(self, model=None, trial=None):
        """As transformers', but only of finite weights, with each rank's optimizer state; the manifest comes last."""
        self.check_finite()
        if not self.is_sharded():
            try:
                checkpoint.refuse_nan(self.accelerator.unwrap_model(self.model).state_dict(), "the model")
            except FloatingPointError as error:
                self.stop_training(str(error).partition(":")[0])
        self.state.log_history[:] = without_nan(self.state.log_history)
        folder = self.checkpoint_folder()
        with checkpoint.writing_checkpoint(folder):
            super()._save_checkpoint(model or self.model_wrapped, trial)
            if self.args.world_size > 1 and not self.is_sharded():  # DDP: transformers saves only the first rank's
                torch.save(self.optimizer.state_dict(), folder / f"optimizer-{self.args.process_index}.pt")
        monitored_barrier(f"{folder.name} of {folder.parent.parent.name}")
        if self.is_world_process_zero():
            checkpoint.write_manifest(folder)
            checkpoint.delete_superseded(folder.parent, self.stage.keep_checkpoints, self.best_step)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """As transformers', but saves before it evaluates: a failing evaluation must not cost the training before."""
        evaluate, self.control.should_evaluate = self.control.should_evaluate, False
        self.control.should_save |= evaluate and self.args.world_size > 1  # ranks cannot save after one has failed
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.measure_after_step(evaluate)

    def is_complete(self) -> bool:
        """Whether no step is left to take."""
        return self.state.global_step >= self.state.max_steps

    def measure_after_step(self, evaluate: bool) -> None:
        """Run the evaluation, if `evaluate`, and `measure`, if it is due. Random state stays as it was."""
        measure = self.is_measurement_due() and self.last_measured_step != self.state.global_step  # also per epoch
        if not evaluate and not measure:
            return
        before, self.last_measured_step = checkpoint.random_state(), self.state.global_step
        folder = self.checkpoint_folder()
        try:
            if evaluate:
                self.evaluate()
            if measure:
                self.measure()
        except Exception:
            if self.args.world_size == 1 and not checkpoint.manifest_of(folder):
                self._save_checkpoint()
            raise
        checkpoint.restore_random_state(before)
        monitored_barrier("the end of an evaluation")
        if self.is_world_process_zero() and checkpoint.manifest_of(folder):
            save_json(folder / checkpoint.MEASURED, {"log": self.state.log_history})

    def is_measurement_due(self) -> bool:
        """Whether `measure` is to be called after this step."""
        return False

    def discard_after(self, step: int) -> None:
        """Called on the main process before training resumes after `step` steps: drop what later steps wrote."""

    def _load_from_checkpoint(self, folder, *args, **kwargs):
        with checkpoint.reading(Path(folder)):
            super()._load_from_checkpoint(folder, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, folder):
        with checkpoint.reading(Path(folder)) if folder else nullcontext():
            super()._load_optimizer_and_scheduler(folder)

    def _load_rng_state(self, folder):
        with checkpoint.reading(Path(folder)) if folder else nullcontext():
            super()._load_rng_state(folder)

    def _run_epoch(self, *args, **kwargs):
        """As transformers', which takes one step too many if a run is resumed after its last step."""
        if not self.is_complete():
            super()._run_epoch(*args, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        inner = self.inner_optimizer()
        if self.optimizer_shards:
            with checkpoint.reading(self.optimizer_shards[0].parent):
                shards = [torch.load(path, map_location="cpu", weights_only=True) for path in self.optimizer_shards]
                self.optimizer.load_state_dict(checkpoint.merged(shards))
        elif self.loads_optimizer() and state.global_step + self.stage.lora_r == 0 and isinstance(inner, MuonAdamW):
            model = self.accelerator.unwrap_model(self.model)
            checkpoint.load_optimizer_state(Path(self.source) / "optimizer.pt", model, inner)
        state.compute_steps(args, state.max_steps)  # else a resume keeps the intervals of the checkpoint
        self.first_step = step = state.global_step
        if self.resumed_log:
            state.log_history = self.resumed_log
        if step and not (self.checkpoint_folder() / checkpoint.MEASURED).exists():  # interrupted in its evaluations
            due = args.eval_strategy == "steps" and (step % state.eval_steps == 0 or step >= state.max_steps)
            self.measure_after_step(due)
        if state.is_world_process_zero:
            print(self.overview())
        self.progress = Progress(Path(args.output_dir).parent.name, state.max_steps, step)

    def overview(self) -> str:
        """What the stage is about to do, as `nanochat plan` prints it."""
        args, model, device = self.args, self.accelerator.unwrap_model(self.model), self.accelerator.device
        rows, steps = f"{len(self.train_dataset) - self.padding:,} {self.unit}", f"{self.state.max_steps:,}"
        batch = batch_text(args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        data = f"{data_text(self.stage)}: {rows}"
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO-3 empties its own
        sharding = "ZeRO" if self.is_deepspeed_enabled else "FSDP2" if self.is_fsdp_enabled else None
        more = {"sharding": sharding, "precision": f"{compute_dtype(device)} on {device.type}".removeprefix("torch.")}
        groups = self.optimizer_options()
        return block(stage_rows(self.stage, model.config, parameters, groups, data, steps, batch) | more)

    def loads_optimizer(self) -> bool:
        return getattr(self.stage, "load_optimizer", False) and (Path(self.source) / "optimizer.pt").exists()

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_start = time.time()
        for group in self.optimizer.param_groups:
            if group.get("kind") == "muon":
                group["momentum"] = self.schedule.muon_momentum(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        cuda = torch.cuda.is_available()
        self.check_finite(lag=1 if cuda else 0)  # no wait for a step that is still queued
        self.step_seconds += time.time() - self.step_start
        if state.global_step == self.first_step + 1 and cuda:  # it compiled
            self.step_tokens, self.step_seconds, self.generation_seconds = 0, 0.0, 0.0
        peak = self.optimizer_options()["lora" if self.stage.lora_r > 0 else "matrix"]["lr"]
        self.numbers["lr"] = peak * self.schedule.lr(state.global_step - 1)
        self.progress.update(state.global_step, in_words(self.numbers, self.shown))
        if self.signals:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {HISTORY.get(key, key): value for key, value in logs.items()}
        self.numbers |= numbers
        if (words := in_words(numbers, self.measured)) and state.is_world_process_zero:
            tqdm.write(f"[{Path(args.output_dir).parent.name}] step {state.global_step}: {words}")

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()
        self.measured = ()  # the stage ends with a line about its result

    def train_with_resume(self, data: dict[str, str]) -> None:
        """Train, from the last complete checkpoint if there is one; `data` are fingerprints of the data, by name.

        Raises InputError if the checkpoint is damaged, or of another recipe, model, data or launch. Raises
        FloatingPointError if loss or gradients are not finite; a checkpoint from before that step is on disk.
        """
        state, log = Path(self.args.output_dir), self.accelerator.print
        self.inputs = {"model": model_fingerprint(self.source) or str(self.source), **data}
        if self.loads_optimizer():
            self.inputs["optimizer"] = checkpoint.sha256(Path(self.source) / "optimizer.pt")
        latest = checkpoint.latest(state, log)
        with main_process_first("preparing the checkpoints' folder") as main:
            if latest:
                self.compare_settings(state, self.settings())
            if main:
                self.prepare_state_folder(state, checkpoint.step_of(latest) if latest else 0)
        if latest:
            log(f"[{state.parent.name}] resuming at step {checkpoint.step_of(latest)}")
            self.restore_records(latest)
        # A model that was evaluated before counts as prepared, and would then train without DDP.
        prepared = self.accelerator._models
        prepared[:] = [model for model in prepared if model is not self.model]
        self.model._is_accelerate_prepared = False
        with graceful_shutdown(self.signals.append) if self.args.world_size == 1 else nullcontext():
            self.train(resume_from_checkpoint=str(latest) if latest else None)
        if self.signals and self.state.global_step < self.state.max_steps:
            log(f"stopped by a signal after step {self.state.global_step}; run again to resume")
            raise SystemExit(128 + self.signals[-1])

    def settings(self) -> dict:
        """What must not change between the parts of an interrupted run, for config.json in `state/`."""
        args, settings = self.args, {k: v for k, v in asdict(self.stage).items() if k not in MAY_CHANGE} | self.inputs
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        zero = f"ZeRO over {args.world_size} processes"  # its checkpoints fit no other number of ranks
        sharding = zero if self.is_deepspeed_enabled else "FSDP2" if self.is_fsdp_enabled else "none"
        return settings | {"sequences per step": per_step, "sharding": sharding}

    def prepare_state_folder(self, state: Path, step: int) -> None:
        """Write the settings, and delete what an interruption after `step` steps left half done."""
        for folder in set(checkpoint.all_checkpoints(state)) - set(checkpoint.complete_checkpoints(state)):
            checkpoint.remove(folder)
        save_json(state / "config.json", self.settings())
        self.discard_after(step)

    def compare_settings(self, state: Path, settings: dict) -> None:
        """Raise InputError if the checkpoints in `state` were written with other `settings`."""
        before = load_json(state / "config.json", f"restore it, or delete {state} to start anew")
        if before is None:
            raise InputError(f"{state / 'config.json'} is missing: restore it, or delete {state} to start anew")
        checkpoint.refuse_changes(state, checkpoint.changed_keys(before, settings).values())

    def restore_records(self, folder: Path) -> None:
        """Take over what transformers does not restore: skipped steps, the log, and where optimizer state lies."""
        skipped, older = folder.parent / checkpoint.SKIPPED, f"delete {folder} to use an older checkpoint"
        self.skipped = (load_json(skipped, "delete it to count none as skipped", Skipped) or {"steps": []})["steps"]
        written = load_json(folder / "trainer_state.json", older, TrainerState) or {}
        if written.get("global_step") != checkpoint.step_of(folder):
            raise InputError(f"{folder / 'trainer_state.json'} is missing or of another step: {older}")
        measured = load_json(folder / checkpoint.MEASURED, "delete it to repeat that evaluation", ChatMeasured)
        log = measured["log"] if measured else written["log_history"]
        self.earlier_seconds, self.resumed_log = log[-1].get("time", 0.0) if log else 0.0, log
        self.optimizer_shards = list(folder.glob("optimizer-*.pt"))  # none if one rank wrote the whole state
        if len(self.optimizer_shards) == self.args.world_size:
            self.optimizer_shards = [folder / f"optimizer-{self.args.process_index}.pt"]

    def history(self) -> list[dict]:
        """The log as rows {step, lr_multiplier, ...}, one per logged step."""
        rows: dict[int, dict] = {}
        for entry in self.state.log_history:
            if "train_runtime" not in entry:  # the library's summary
                step = entry["step"]
                row = rows.setdefault(step, {"step": step, "lr_multiplier": self.schedule.lr(max(step - 1, 0))})
                row.update({name: entry[key] for key, name in HISTORY.items() if key in entry})
                row.update({key: value for key, value in entry.items() if key.startswith("pass@")})
        return list(rows.values())

    def save_stage(self, record: dict, **numbers) -> None:
        """Write the stage's result (adapters merged in), with metrics.json; delete checkpoints. All ranks call it."""
        output = Path(self.args.output_dir).parent
        monitored_barrier("the end of training")
        if self.is_world_process_zero():
            tool_loop.ship(output)
        if self.is_deepspeed_enabled:
            self.save_model(str(output))
        else:
            model = self.accelerator.unwrap_model(self.model)
            model = model.merge_and_unload() if self.stage.lora_r > 0 else model
            checkpoint.save_model(output, model, self.processing_class)
        if self.is_world_process_zero():
            history = self.history()
            speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
            speed = self.step_tokens / self.step_seconds if self.step_seconds else (speeds or [None])[-1]
            record |= {"earlier_wall_time_s": self.earlier_seconds, "weights": model_fingerprint(output)}
            record |= {"inputs": self.inputs, "skipped_steps": self.skipped}
            numbers |= {"num_iterations": self.state.max_steps, "num_epochs": self.state.epoch, "history": history}
            numbers |= {"tokens_per_second": speed, "peak_memory_bytes": peak_memory(self.args.device)}
            write_metrics(output, record, **numbers)
            shutil.rmtree(output / "state", ignore_errors=True)
