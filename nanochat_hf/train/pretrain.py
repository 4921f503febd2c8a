"""Pretraining: packed text -> a base model, its curve and its figures. One function, one loop.

    pretrain(PretrainConfig(depth=12, dataset="books/"), tokenizer="runs/d12/tokenizer", output=Path("runs/d12/base"))

What depends on the size comes from `scaling.plan`, what depends on the step from its schedule. Accelerate launches the
processes, shards the model (FSDP2) and writes to trackers; the loop is ours, because it is what this
project is about. It differs from karpathy/nanochat's base_train in this: it resumes exactly (weights, optimizer, data
position, random state; also with another number of processes), finds the device batch by itself, evaluates on rows
kept in memory, stops at a loss that leaps or is not finite before that reaches the weights, and saves before it obeys
SIGTERM. On CUDA a step is queued before the figures of the one before it are read, so that the GPU is never without
work; whether to take a step is decided there.
"""

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.dataloader import VALIDATION, PackedLoader
from ..data.documents import open_documents, text_fingerprint
from ..data.tokenizer import load_tokenizer, tokenizer_fingerprint
from ..distributed import main_process_first, monitored_barrier
from ..errors import InputError
from ..optim.gradient_reduction import OwnerGradientReducer
from ..optim.muon_adamw import MuonAdamW, param_groups
from ..optim.scaling import peak_flops, plan
from ..optim.schedule import StepHyperparams
from ..run import load_json, model_fingerprint, renamed_keys, save_json, start_record, write_metrics
from . import checkpoint
from .model_setup import (
    build_loss_module,
    build_model,
    compute_dtype,
    describe,
    gradient_norm,
    plan_overrides_from,
    scale_gradients,
    shard,
)
from .monitoring import Evaluator, LossSpikeDetector, line, status
from .pretrain_config import PLAN_KEYS, SHAPE_KEYS, PretrainConfig
from .runtime import (
    check_cost,
    choose_micro_batch_size,
    copy_to_host_async,
    gc_disabled,
    graceful_shutdown,
    micro_batch_fits,
    start_accelerator,
    to_device,
)

HISTORY = 1000  # a curve has at most about so many points, besides evaluations
PLANNED = (
    "generation", "depth", "num_parameters", "num_matmul_parameters", "flops_per_token", "total_tokens", "total_flops",
    "num_iterations", "total_batch_size",
)  # fmt: skip
LOSS_SCALE = 2.0**16  # of float16, whose gradients would vanish without one


def pretrain(
    config: PretrainConfig,
    tokenizer: str,
    output: Path,
    model: str | None = None,
    core: Callable[[PreTrainedModel, int], float] | None = None,
    push: Callable[[Path, int], None] | None = None,
) -> dict:
    """Train a base model into `output`, a folder for `from_pretrained` with metrics.json; or go on where it stopped.

    Args:
        tokenizer: folder or Hub id of the tokenizer.
        model: folder or Hub id of weights to begin with; its shape then wins over the config's.
        core: (model, examples per task) -> CORE, called on every process every `core_metric_every` steps.
        push: (folder, step), called on the main process every `push_every` steps with a complete model folder.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: a config, dataset or device with which this cannot work.
        FloatingPointError: loss or gradient is not finite, or the loss leaps; a checkpoint from before that step is on
            disk, whose place in the data is after its rows, and after those of a step already on its way.
        SystemExit: SIGTERM or SIGINT came; a checkpoint is on disk, the exit code is 128 + the signal's number.
    """
    return Pretraining(config, tokenizer, Path(output), model, core, push).run()


class Step(NamedTuple):
    """An optimizer step that is queued on the device."""

    factors: StepHyperparams
    limit: float  # the loss above which the device refuses it
    taken: Tensor  # () bool, on the device: whether it was, and all before it
    read: Callable[[], list[float]]  # loss, gradient norm, share of processes that were asked to stop


class Pretraining:
    """One run of `pretrain`: what its parts share."""

    def __init__(self, config: PretrainConfig, tokenizer: str, output: Path, model: str | None, core, push):
        self.config, self.output, self.core, self.push = config, output, core, push
        self.accelerator = start_accelerator(config.report_to, output)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        # Whether FSDP2 leaves weights whole until a step is done, which the launch file decides.
        self.whole = self.sharded and not self.accelerator.state.fsdp_plugin.reshard_after_forward
        self.record = start_record(config)
        set_seed(config.seed)
        with main_process_first("loading the tokenizer"):
            self.tokenizer = load_tokenizer(tokenizer)
            shape = plan_overrides_from(model) if model else {}
            source = (model_fingerprint(model) or str(model)) if model else None
            data = text_fingerprint(config.dataset)
        self.inputs = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "model": source, "data": data}
        options = {name: getattr(config, name) for name in PLAN_KEYS} | shape
        self.plan = plan(vocab_size=len(self.tokenizer), **options)
        check_cost(self.plan, self.device)
        with main_process_first("loading the model") if model else nullcontext():
            self.model = build_model(self.plan, model, self.tokenizer, self.device, self.sharded)
        self.step, self.history, self.samples = 0, [], []
        self.changes: list[dict] = []  # of the config, at resumes
        self.unmeasured: dict | None = None  # figures of the last step, if a checkpoint ends before its evaluations
        self.seconds, self.timed = 0.0, 0  # spent in steps, and in how many: the first one on a GPU compiles
        self.signal = 0  # number of the signal that asked to stop
        self.alarm = LossSpikeDetector(config.max_loss_spike)
        self.dtype = compute_dtype(self.device, half=True)
        self.loss_scale = LOSS_SCALE if self.dtype == torch.float16 else 1.0
        self.ahead = self.device.type == "cuda" and self.loss_scale == 1  # a scaled step may have to be made again
        self.queued: Step | None = None  # the next step, when it is already on its way
        self.asked = False  # whether some process was asked to stop, as far as all of them know

        network = build_loss_module(self.model, config.attn_implementation, config.compile, config.fp8)
        self.print(describe(network, config.fp8))
        optimizer = MuonAdamW(param_groups(self.model, self.plan.groups))
        if self.sharded:
            self.loss_model, self.optimizer = self.accelerator.prepare(network, optimizer)
        else:  # on its device already, and not wrapped in DDP: `owners` says why
            self.loss_model, self.optimizer = network, self.accelerator.prepare(optimizer)
        alone = self.sharded or self.world == 1
        self.reduction = None if alone else OwnerGradientReducer(optimizer.owners())
        saved = checkpoint.latest(output / "state", self.print)
        self.rows = self.choose_micro_batch_size(saved)
        self.accumulation = self.plan.total_batch_size // (self.rows * self.plan.max_seq_len * self.world)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        self.loader = self.new_loader("train")
        self.evaluator = Evaluator(
            self.accelerator.unwrap_model(self.loss_model), self.model, self.tokenizer,
            lambda: self.new_loader("validation"),
            config.eval_tokens // (self.rows * self.plan.max_seq_len * self.world),
            alike=not (getattr(network, "fp8", False) or self.sharded),
        )  # fmt: skip
        if saved is not None:
            self.restore(saved)

    def choose_micro_batch_size(self, saved: Path | None) -> int:
        """Rows of a micro-batch: when resuming those of before, so that sums keep their order; else a new choice."""
        wanted = self.config.device_batch_size
        trial = partial(micro_batch_fits, self.plan, self.loss_model, self.optimizer.param_groups, self.accelerator)
        if self.sharded:
            trial = None  # FSDP2's processes would wait for one that ran out of memory
        if saved is not None:
            before = checkpoint.read_progress(saved)
            if before["world_size"] == self.world:
                wanted, trial = before["rows"], None
        return choose_micro_batch_size(self.plan, wanted, self.device, self.world, self.dtype, trial, self.print)

    def new_loader(self, split: str) -> PackedLoader:
        config = self.config
        stream = open_documents(
            config.dataset, split, self.accelerator.process_index, self.world, config.seed, config.skip_bad_files
        )
        packing = VALIDATION if split == "validation" else {}
        return PackedLoader(stream, self.tokenizer, self.rows, self.plan.max_seq_len, **packing)

    def run(self) -> dict:
        total, main = self.plan.num_iterations, self.accelerator.is_main_process
        if self.config.report_to != "none":
            known = {key: value for key, value in asdict(self.config).items() if value is not None}
            self.accelerator.init_trackers("nanochat_hf", known)
        interval = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
        smooth, first = None, self.step
        self.bar = tqdm(total=total, initial=self.step, disable=not main, unit="step", mininterval=interval)
        with self.bar, graceful_shutdown(self.stop), gc_disabled():
            if self.unmeasured:
                self.measure(self.unmeasured)
            self.loss_model.train()
            began = time.perf_counter()
            while self.step < total:
                if not self.queued:  # else it has been the device's turn since the step before was done
                    began, steps, seconds = time.perf_counter(), 0, 0.0
                figures, stop = self.train_step()
                elapsed, began = time.perf_counter() - began, time.perf_counter()
                if self.step > first or self.device.type == "cpu":
                    self.seconds, self.timed = self.seconds + elapsed, self.timed + 1
                    steps, seconds = steps + 1, seconds + elapsed
                self.step += 1
                # On average since the last pause: of two steps on their way, one may be charged the other's launch.
                speed = self.plan.total_batch_size * max(steps, 1) / (seconds or elapsed)
                smooth = figures["train_loss"] if smooth is None else 0.9 * smooth + 0.1 * figures["train_loss"]
                figures |= {"tokens_per_second": speed, "mfu": self.mfu(speed)}
                self.bar.set_postfix_str(status(smooth, speed, figures["mfu"]), refresh=False)
                self.bar.update()
                self.save_and_measure(figures)
                if self.due(self.config.push_every) and self.push:
                    checkpoint.save_model(self.output, self.model, self.tokenizer)
                    if main:
                        self.push(self.output, self.step)
                if stop and not self.queued and self.step < total:
                    self.print(f"stopped by a signal after step {self.step}; {self.save()} is where a rerun goes on")
                    raise SystemExit(128 + (self.signal or signal.SIGTERM))
        return self.finish()

    def train_step(self) -> tuple[dict, bool]:
        """One step, and the next one queued -> (figures of the step, whether some process was asked to stop)."""
        step = self.queued or self.launch(self.step)
        # By what all processes know, for each must queue the same: not by a signal that only this one heard.
        look_ahead = self.ahead and not self.asked and not self.pauses(self.step + 1)
        self.queued = self.launch(self.step + 1, step) if look_ahead else None
        return self.settle(step), self.asked

    def launch(self, number: int, before: Step | None = None) -> Step:
        """Queue forward, backward and update; if `before`, which is not settled yet, is refused, this one is, too."""
        factors = self.plan.schedule.at(number)
        for group in self.optimizer.param_groups:
            options = self.plan.groups[group["role"]]
            group["lr"] = options["lr"] * factors.lr
            if group["kind"] == "muon":
                group["weight_decay"] = options["weight_decay"] * factors.weight_decay
                group["momentum"] = factors.momentum
        loss = torch.zeros((), device=self.device)
        scale = self.loss_scale / (self.world if self.reduction else 1)
        for left in reversed(range(self.accumulation)):
            ids, targets = to_device(next(self.loader), self.device)
            if self.whole:
                self.loss_model.set_reshard_after_backward(left == 0)
            reducing = self.reduction if self.reduction and left == 0 else nullcontext()  # FSDP2 does so by itself
            with self.accelerator.accumulate(self.loss_model), reducing:
                part = self.loss_model(ids, targets)
                self.accelerator.backward(part if scale == 1 else part * scale)
            loss += part.detach() / self.accumulation
        if self.reduction:
            square = self.reduction.squared_norm() * self.world
        else:
            square = gradient_norm(self.model).square()
        asked = torch.full_like(loss, float(bool(self.signal)))  # torch.tensor would wait for all that is queued
        loss, asked, square = self.accelerator.reduce(torch.stack((loss, asked, square)), "mean").unbind()
        norm = square.sqrt() / self.loss_scale
        # The device decides whether to take the step, and the host hears of it when the step is already on its way.
        limit = self.alarm.limit()
        taken = loss.isfinite() & norm.isfinite() & (loss <= limit)
        if before is not None:
            taken &= before.taken
        self.optimizer.optimizer.step_factor = taken.float()
        if self.plan.max_grad_norm or self.loss_scale > 1:
            factor = (self.plan.max_grad_norm / norm.clamp(min=1e-12)).clamp(max=1) if self.plan.max_grad_norm else 1
            scale_gradients(self.model, factor / self.loss_scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(factors, limit, taken, copy_to_host_async(torch.stack((loss, norm, asked))))

    def settle(self, step: Step) -> dict:
        """Wait for this step of the run -> its figures; one that was refused is made again or ends the run."""
        loss, norm, asked = step.read()
        self.asked = asked > 0
        if self.loss_scale > 1 and math.isfinite(loss) and not math.isfinite(norm):
            self.loss_scale /= 2  # too large for these gradients: make the step with the rows that follow
            self.optimizer.optimizer.rollback_step_count()
            return self.settle(self.launch(self.step))
        if not (math.isfinite(loss) and math.isfinite(norm)) or self.alarm.rings(loss, step.limit):
            for _ in range(2 if self.queued else 1):
                self.optimizer.optimizer.rollback_step_count()
            raise FloatingPointError(self.trouble(loss, norm))
        if self.dtype == torch.float16 and self.step % 1000 == 999:
            self.loss_scale = min(2 * self.loss_scale, LOSS_SCALE)
        factor, momentum, lr = step.factors.lr, step.factors.momentum, self.plan.groups["matrix"]["lr"]
        told = {"lr_multiplier": factor, "lr": lr * factor, "momentum": momentum}
        return {"train_loss": loss, "grad_norm": norm, **told}

    def trouble(self, loss: float, norm: float) -> str:
        """Save, and say what happened where in the data and what can be done."""
        rows, usual = self.plan.total_batch_size // self.plan.max_seq_len, self.alarm.recent
        before = f" after a median of {sorted(usual)[len(usual) // 2]:.4g}" if usual else ""
        also = " and those of the next step, which was on its way" if self.queued else ""
        what = (
            f"step {self.step}: loss {loss:.4g}{before}, gradient norm {norm:.4g}, at rows {self.step * rows} to "
            f"{(self.step + 1) * rows} of the data"
        )
        try:
            saved = self.save()
        except FloatingPointError:
            older = checkpoint.complete(self.output / "state")
            left = f"the last checkpoint is {older[-1]}" if older else "there is no checkpoint yet"
            return f"{what}, and the weights are not finite; {left}. Lower the learning rates"
        return (
            f"{what}; {saved} holds the weights before it. A rerun goes on with the rows after these{also}; if it "
            "happens again, lower the learning rates, or set max_loss_spike=0 if nothing is wrong"
        )

    def pauses(self, step: int) -> bool:
        """Whether something is due after so many steps that no other should be on its way at, or they are all."""
        keys = ("eval_every", "core_metric_every", "sample_every", "save_every", "push_every")
        every = [getattr(self.config, key) for key in keys]
        return step == self.plan.num_iterations or any(n > 0 and step % n == 0 for n in every)

    def due(self, every: int, at_end: bool = False) -> bool:
        return (every > 0 and self.step % every == 0) or (at_end and self.step == self.plan.num_iterations)

    def save_and_measure(self, figures: dict) -> None:
        """Save, if that is due, and only then measure: a failing evaluation must not cost the training before it."""
        due = self.due(self.config.save_every, at_end=True)
        if self.world > 1 and self.core:  # when one rank has failed, the others cannot be made to save
            due |= self.due(self.config.core_metric_every)
        saved = self.save(figures) if due else None
        try:
            self.measure(figures)
        except Exception:
            if saved is None and self.world == 1:
                saved = self.save(figures)
            if saved:
                self.print(
                    f"an evaluation failed; {saved} holds the training up to step {self.step}, run again to resume"
                )
            raise
        if saved and self.accelerator.is_main_process:
            save_json(saved / checkpoint.MEASURED, {"history": self.history, "samples": self.samples})

    def measure(self, figures: dict) -> None:
        """Whatever is due after this step, and a point of the curve when there is something to tell."""
        config, found = self.config, {}
        told = {"step": self.step, "tokens": self.step * self.plan.total_batch_size, "time": self.seconds, **figures}
        if self.due(config.log_every):
            self.print(line(self.plan.num_iterations, told))
        self.loss_model.eval()
        if self.due(config.eval_every, at_end=config.eval_every != 0):
            found["val_bpb"] = self.evaluator.bpb()
        if self.core and config.core_metric_every > 0 and self.due(config.core_metric_every, at_end=True):
            found["core"] = self.core(self.model, config.core_metric_max_per_task)
        if self.due(config.sample_every, at_end=True):
            self.samples = self.evaluator.samples(self.step)
            texts = [f"{sample['prompt']} ->{sample['text']!r}" for sample in self.samples]
            found["samples"] = "\n".join(texts)
            for text in texts:
                self.print(f"step {self.step}: {text}")
        self.loss_model.train()
        if found:
            shard(self.loss_model)  # for what saves it
        on_curve = self.step == 1 or self.due(max(1, self.plan.num_iterations // HISTORY), at_end=True)
        if found or on_curve or self.due(config.log_every):
            self.accelerator.log({k: v for k, v in (told | found).items() if v is not None}, step=self.step)
        found.pop("samples", None)
        for name, value in found.items():
            self.print(f"step {self.step}: {name} {value:.4f}")
        if found or on_curve:
            self.history.append(told | found)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return (
            tokens_per_second * self.plan.flops_per_token / (peak * self.world) if peak and tokens_per_second else None
        )

    def stop(self, number: int) -> None:
        self.signal = number

    def print(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def save(self, unmeasured: dict | None = None) -> Path:
        """Write a checkpoint. `unmeasured`: the figures of the last step, if its evaluations are still to come."""
        progress = {
            "config": asdict(self.config), "inputs": self.inputs, "unmeasured": unmeasured,
            "changes": self.changes,
            "rows": self.rows, "wall_time_s": self.wall_time(), "timed": self.timed,
            "seconds": self.seconds, "history": self.history, "samples": self.samples,
            "recent": list(self.alarm.recent), "loss_scale": self.loss_scale,
        }  # fmt: skip
        return checkpoint.save(
            self.output / "state", self.step, self.model, self.optimizer.optimizer, self.loader.state_dict(), progress,
            self.config.keep_checkpoints,
        )  # fmt: skip

    def restore(self, path: Path) -> None:
        before, now = renamed_keys(checkpoint.read_progress(path)["config"]), asdict(self.config)
        changed = {key: f"{key}: {old!r} -> {now[key]!r}" for key, old in before.items() if now[key] != old}
        if binding := [changed[key] for key in (*SHAPE_KEYS, "dataset", "seed") if key in changed]:
            raise InputError(
                f"{path} is of another config ({', '.join(binding)}); use another --run-dir, or delete {path.parent}"
            )
        inputs = checkpoint.read_progress(path).get("inputs", self.inputs)
        if others := [name for name, value in inputs.items() if value != self.inputs.get(name)]:
            raise InputError(
                f"{path} was trained with other {' and '.join(others)} than given now: bring the old "
                f"one back, use another --run-dir, or delete {path.parent} to start this stage anew"
            )
        progress, positions = checkpoint.load(path, self.model, self.optimizer.optimizer)
        self.loader.load_state_dict(positions)
        self.step, self.seconds, self.timed = progress["step"], progress["seconds"], progress["timed"]
        measured = load_json(path / checkpoint.MEASURED)
        self.history, self.samples = (measured or progress)["history"], (measured or progress)["samples"]
        self.unmeasured = None if measured else progress.get("unmeasured")
        self.alarm.recent.extend(progress["recent"])
        self.loss_scale = progress["loss_scale"]
        self.record["earlier_wall_time_s"] = progress["wall_time_s"]
        self.changes = progress.get("changes", [])
        if changed:
            self.changes.append({"after step": self.step, "keys": list(changed.values())})
        self.print(
            f"going on after step {self.step} of {path}" + (f", with {', '.join(changed.values())}" if changed else "")
        )

    def wall_time(self) -> float:
        return time.time() - self.record["started"] + self.record.get("earlier_wall_time_s", 0)

    def finish(self) -> dict:
        """Write the model folder and metrics.json, drop the checkpoints."""
        self.loader.close()
        checkpoint.save_model(self.output, self.model, self.tokenizer)
        momenta = self.output / "optimizer.pt"
        if self.config.save_optimizer:
            checkpoint.save_optimizer_state(momenta, self.model, self.optimizer.optimizer)
        elif self.accelerator.is_main_process:
            momenta.unlink(missing_ok=True)  # that of an earlier run would be taken for this one's
        made = self.plan
        last = {key: value for point in self.history for key, value in point.items()}
        speed = self.timed * made.total_batch_size / self.seconds if self.timed else None
        numbers = {name: getattr(made, name) for name in PLANNED} | {
            "device_batch_size": self.rows,
            "gradient_accumulation": self.accumulation,
            "epochs": self.loader.epoch,
            "training_time_s": self.seconds,
            "tokens_per_second": speed,
            "mfu": self.mfu(speed),
            "fp8": getattr(self.accelerator.unwrap_model(self.loss_model), "fp8", False),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            "val_bpb": last.get("val_bpb"),
            "core": last.get("core"),
            "samples": self.samples,
            "history": self.history,
        }
        if self.accelerator.is_main_process:
            record = self.record | {"weights": model_fingerprint(self.output), "inputs": self.inputs}
            record |= {"optimizer": checkpoint.sha256(momenta) if momenta.exists() else None, "changes": self.changes}
            self.record = write_metrics(self.output, record, **numbers)
            shutil.rmtree(self.output / "state", ignore_errors=True)
        for tracker in self.accelerator.trackers:  # not end_training(), which ends the processes' group as well
            tracker.finish()
        self.accelerator.free_memory()
        monitored_barrier("the end of pretraining")
        return {**self.record, **numbers}
