"""Pretraining: packed text -> a base model with its learning curve and metrics. One function, one loop.

    pretrain(PretrainConfig(depth=12, dataset="books/"), tokenizer="runs/d12/tokenizer", output=Path("runs/d12/base"))

`scaling.plan` gives the hyperparameters. Accelerate launches the ranks, shards the model (FSDP2) and reports to
trackers; the loop is our own. Beyond karpathy/nanochat's base_train it
- resumes exactly (weights, optimizer, data-loader state, random state), also with another number of ranks,
- chooses the micro-batch size, and saves a checkpoint on SIGTERM,
- stops at a loss spike or a loss that is not finite, before that reaches the weights.
Each step is enqueued before the metrics of the one before are read, so that a GPU never waits for the host. The device
decides whether to skip a step.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.dataloader import VALIDATION, PackedLoader
from ..data.documents import open_documents, text_fingerprint
from ..data.tokenizer import load_tokenizer, tokenizer_fingerprint
from ..distributed import main_process_first, monitored_barrier
from ..metrics import Measured
from ..optim.muon_adamw import MuonAdamW, OwnerGradientReducer, param_groups
from ..optim.overview import Devices, base_rows, block
from ..optim.scaling import peak_flops, plan
from ..run import WORDS, Progress, in_words, load_json, model_fingerprint, save_json, start_record, write_metrics
from ..stage_configs import SHAPE_KEYS, PretrainConfig
from . import checkpoint, model_setup, runtime
from .monitoring import Evaluator, LossSpikeDetector, StepTimer

HISTORY = 1000  # points of a curve at most, besides evaluations
INTERVALS = ("eval_every", "core_metric_every", "sample_every", "save_every", "push_every")
LOSS_SCALE = 2.0**16  # initial and largest one of float16, whose gradients underflow without


def pretrain(
    config: PretrainConfig,
    tokenizer: str,
    output: Path,
    model: str | None = None,
    core: Callable[[PreTrainedModel, int], float] | None = None,
    push: Callable[[Path, int], None] | None = None,
) -> dict:
    """Train a base model into `output`, a folder for `from_pretrained` with metrics.json, or resume a run.

    Args:
        tokenizer: folder or Hub id of the tokenizer.
        model: folder or Hub id of initial weights; its shape wins over the config's.
        core: (model, examples per task) -> CORE, called on every rank every `core_metric_every` steps.
        push: (folder, step), called on rank 0 every `push_every` steps with a complete model folder.

    Returns: the content of metrics.json.

    Raises:
        InputError: a config, dataset or device with which this cannot work.
        FloatingPointError: loss or gradient is not finite, or the loss spikes. A checkpoint has the weights before
            that step; a rerun skips the data of this step and of the next one, which was enqueued.
        SystemExit: SIGTERM or SIGINT; a checkpoint is on disk, the exit code is 128 + the signal's number.
    """
    return Pretraining(config, tokenizer, Path(output), model, core, push).run()


class Step(NamedTuple):
    """An optimizer step that is enqueued on the device."""

    limit: float  # a loss above it is a spike
    healthy: Tensor  # () bool on the device: neither this step nor one before it diverged
    read: Callable[[], list[float]]  # loss, gradient norm, loss scale, fraction of ranks with a signal


class Pretraining:
    """A run of `pretrain`."""

    def __init__(self, config: PretrainConfig, tokenizer: str, output: Path, model: str | None, core, push):
        self.config, self.output, self.core, self.push = config, output, core, push
        self.accelerator = runtime.start_accelerator(config.report_to, output)
        self.record = start_record(config) | {"changes": []}
        set_seed(config.seed)
        with main_process_first("loading the tokenizer"):
            self.tokenizer = load_tokenizer(tokenizer)
            source = (model_fingerprint(model) or str(model)) if model else None
            data = text_fingerprint(config.dataset)
            shape = model_setup.plan_overrides_from(model) if model else {}
        self.record["inputs"] = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "model": source, "data": data}
        self.plan = plan(replace(config, **shape), len(self.tokenizer))
        runtime.check_cost(self.plan, self.device)
        with main_process_first("loading the model") if model else nullcontext():
            self.model = model_setup.build_model(self.plan, model, self.tokenizer, self.device, self.sharded)
        network = model_setup.build_loss_module(self.model, config.attn_implementation, config.compile, config.fp8)
        kernels = model_setup.describe(network, config.fp8)
        optimizer, self.reducer = MuonAdamW(param_groups(self.model, self.plan.groups)), None
        if self.sharded:
            self.loss_model, self.optimizer = self.accelerator.prepare(network, optimizer)
        else:  # replicated parameters without DDP, see `OwnerGradientReducer`
            self.loss_model, self.optimizer = network, self.accelerator.prepare(optimizer)
            self.reducer = OwnerGradientReducer(optimizer.owners()) if self.world > 1 else None

        self.step, self.history, self.samples = 0, [], []
        self.unmeasured: dict | None = None  # metrics of the last step, if a checkpoint precedes its evaluations
        self.signal = 0  # number of a signal to this rank
        self.stopping = False  # whether a rank got a signal, as far as all ranks can tell
        self.pending_step: Step | None = None
        self.spikes = LossSpikeDetector(config.max_loss_spike)
        self.timer = StepTimer(skip_first=self.device.type != "cpu")
        float16 = model_setup.compute_dtype(self.device, half=True) == torch.float16
        self.loss_scale = torch.tensor(LOSS_SCALE if float16 else 1.0, device=self.device)
        saved = checkpoint.latest(output / "state", self.print)
        self.micro_batch_size = self.choose_micro_batch_size(saved)
        sequences = self.plan.total_batch_size // self.plan.max_seq_len
        self.accelerator.gradient_accumulation_steps = sequences // (self.micro_batch_size * self.world)
        self.loader = self.new_loader("train")
        self.evaluator = Evaluator(
            self.accelerator.unwrap_model(self.loss_model), self.model, self.tokenizer,
            partial(self.new_loader, "validation"),
            config.eval_tokens // (self.micro_batch_size * self.plan.max_seq_len * self.world),
            as_in_training=not (getattr(network, "fp8", False) or self.sharded),
        )  # fmt: skip
        if self.accelerator.is_main_process:
            print(self.overview(kernels))
        if saved is not None:
            with checkpoint.reading(saved):
                self.restore(saved)

    def overview(self, kernels: str) -> str:
        """What the run is about to do, as `nanochat plan` prints it."""
        cuda, batch = self.device.type == "cuda", (self.micro_batch_size, self.grad_accum_steps)
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type.upper()
        devices = Devices(name, self.world, sharding="FSDP2" if self.sharded else None)
        return block(base_rows(self.config, self.plan, devices, batch, self.fp8, {"kernels": kernels}))

    @property
    def fp8(self) -> bool:
        return getattr(self.accelerator.unwrap_model(self.loss_model), "fp8", False)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def grad_accum_steps(self) -> int:
        return self.accelerator.gradient_accumulation_steps

    def choose_micro_batch_size(self, saved: Path | None) -> int:
        """Sequences per micro-batch: on resume with as many ranks the same, for equal sums; else a new choice."""
        progress = checkpoint.read_progress(saved) if saved else {}
        resumes = progress.get("world_size") == self.world
        requested = progress["rows"] if resumes else self.config.device_batch_size
        groups = self.optimizer.param_groups
        fits = partial(runtime.micro_batch_fits, self.plan, self.loss_model, groups, self.accelerator)
        if resumes or self.sharded:  # ranks of FSDP2 would wait for one that ran out of memory
            fits = None
        return runtime.choose_micro_batch_size(self.plan, requested, self.accelerator, fits, self.print)

    def new_loader(self, split: str) -> PackedLoader:
        config, rank = self.config, self.accelerator.process_index
        stream = open_documents(config.dataset, split, rank, self.world, config.seed, config.skip_bad_files)
        packing = VALIDATION if split == "validation" else {}
        return PackedLoader(stream, self.tokenizer, self.micro_batch_size, self.plan.max_seq_len, **packing)

    def run(self) -> dict:
        if self.config.report_to != "none":
            values = {key: value for key, value in asdict(self.config).items() if value is not None}
            self.accelerator.init_trackers("nanochat_hf", values)
        total, smooth = self.plan.num_iterations, None
        shutdown = runtime.graceful_shutdown(lambda number: setattr(self, "signal", number))
        with closing(Progress(self.output.name, total, self.step)) as progress, shutdown, runtime.gc_disabled():
            self.evaluator.read_batches(1)  # a validation split without text is refused now, not after the last step
            if self.unmeasured:
                self.measure(self.unmeasured)
            if self.step == 0 and self.config.eval_every > 0:  # the learning curve begins before the first step
                self.loss_model.eval()
                self.record["start_val_bpb"] = self.evaluator.bpb()
                model_setup.reshard(self.loss_model)
            self.loss_model.train()
            while self.step < total:
                metrics = self.train_step()
                loss = metrics["train_loss"]
                smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
                names = ("train_loss", "lr", "tokens_per_second", "mfu")
                progress.update(self.step, in_words(metrics | {"train_loss": smooth}, names))
                self.save_and_measure(metrics)
                if self.push and self.due(self.config.push_every):
                    checkpoint.save_model(self.output, self.model, self.tokenizer)
                    if self.accelerator.is_main_process:
                        self.push(self.output, self.step)
                if self.stopping and not self.pending_step and self.step < total:
                    self.print(f"stopped by a signal after step {self.step}; run again to resume from {self.save()}")
                    raise SystemExit(128 + (self.signal or signal.SIGTERM))
        return self.save_result()

    def train_step(self) -> dict:
        """Enqueue the next step, then wait for the current one; returns its metrics."""
        if self.pending_step is None:
            self.timer.start()
        step = self.pending_step or self.enqueue_step(self.step)
        # All ranks must decide alike: not by a signal that only this one got.
        lookahead = not self.stopping and not self.is_sync_point(self.step + 1)
        self.pending_step = self.enqueue_step(self.step + 1, step) if lookahead else None
        metrics = self.finalize_step(step)
        speed = self.plan.total_batch_size / self.timer.lap()
        self.step += 1
        return metrics | {"tokens_per_second": speed, "mfu": self.mfu(speed)}

    def enqueue_step(self, number: int, previous: Step | None = None) -> Step:
        """Enqueue forward, backward and update; the device skips the update if this or the previous step diverged."""
        self.plan.schedule.apply(self.optimizer, self.plan.groups, number)
        loss, norm, signals = self.reduce(self.accumulate_gradients())
        loss_scale, limit = self.loss_scale, self.spikes.limit()
        # A norm that is not finite skips a step of float16 and halves its loss scale, as in torch's GradScaler; with
        # no scale left to halve, and in other dtypes, it is divergence.
        healthy = loss.isfinite() & (loss <= limit) & (norm.isfinite() | (loss_scale > 1))
        if previous is not None:
            healthy &= previous.healthy
        self.optimizer.optimizer.step_factor = (healthy & norm.isfinite()).float()
        clip, float16 = self.plan.max_grad_norm, model_setup.compute_dtype(self.device, half=True) == torch.float16
        if clip or float16:
            clipping = (clip / norm.clamp(min=1e-12)).clamp(max=1) if clip else 1
            model_setup.scale_gradients(self.model, clipping / loss_scale)
        if float16:
            grown = (2 * loss_scale).clamp(max=LOSS_SCALE) if number % 1000 == 999 else loss_scale
            self.loss_scale = torch.where(norm.isfinite(), grown, loss_scale / 2)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        read = runtime.copy_to_host_async(torch.stack((loss, norm, loss_scale, signals)))
        return Step(limit, healthy, read)

    def accumulate_gradients(self) -> Tensor:
        """Forward and backward of the next micro-batches of this rank; returns their mean loss, () on the device."""
        loss = torch.zeros((), device=self.device)
        factor = self.loss_scale / (self.world if self.reducer else 1)  # the reducer adds up, FSDP2 takes means
        for left in reversed(range(self.grad_accum_steps)):
            ids, targets = runtime.to_device(next(self.loader), self.device)
            if self.sharded and not self.accelerator.state.fsdp_plugin.reshard_after_forward:
                self.loss_model.set_reshard_after_backward(left == 0)
            reducing = self.reducer if self.reducer and left == 0 else nullcontext()
            with self.accelerator.accumulate(self.loss_model), reducing:
                micro_loss = self.loss_model(ids, targets)
                self.accelerator.backward(micro_loss * factor)
            loss += micro_loss.detach() / self.grad_accum_steps
        return loss

    def reduce(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, norm of the gradients, and fraction of ranks with a signal, over all ranks: () on the device each."""
        if self.reducer:
            square = self.reducer.squared_norm() * self.world
        else:
            square = model_setup.gradient_norm(self.model).square()
        signals = torch.full_like(loss, float(bool(self.signal)))  # torch.tensor would wait for the device
        loss, signals, square = self.accelerator.reduce(torch.stack((loss, signals, square)), "mean").unbind()
        return loss, square.sqrt() / self.loss_scale, signals

    def finalize_step(self, step: Step) -> dict:
        """Wait for step number `self.step`; returns its metrics. Raises FloatingPointError if it diverged."""
        loss, norm, loss_scale, signals = step.read()
        self.stopping = signals > 0
        finite = math.isfinite(loss) and (math.isfinite(norm) or loss_scale > 1)
        if not finite or self.spikes.is_spike(loss, step.limit):
            for _ in range(2 if self.pending_step else 1):
                self.optimizer.optimizer.rollback_step_count()
            raise FloatingPointError(self.divergence_message(loss, norm))
        if not math.isfinite(norm):
            self.optimizer.optimizer.rollback_step_count()
        schedule, peak = self.plan.schedule, self.plan.groups["matrix"]["lr"]
        lr, momentum = schedule.lr(self.step), schedule.muon_momentum(self.step)
        return {"train_loss": loss, "grad_norm": norm, "lr_multiplier": lr, "lr": lr * peak, "momentum": momentum}

    def divergence_message(self, loss: float, norm: float) -> str:
        """Save a checkpoint; returns what happened, where in the data, and what to do."""
        sequences, recent = self.plan.total_batch_size // self.plan.max_seq_len, sorted(self.spikes.recent)
        median = f" after a median of {recent[len(recent) // 2]:.4g}" if recent else ""
        also = " and those of the next step, which was enqueued" if self.pending_step else ""
        message = (
            f"step {self.step}: loss {loss:.4g}{median}, gradient norm {norm:.4g}, at sequences "
            f"{self.step * sequences} to {(self.step + 1) * sequences} of the data"
        )
        try:
            saved = self.save()
        except FloatingPointError:
            older = checkpoint.complete_checkpoints(self.output / "state")
            left = f"the last checkpoint is {older[-1]}" if older else "there is no checkpoint yet"
            return f"{message}, and the weights are not finite; {left}. Lower the learning rates"
        return (
            f"{message}; {saved} has the weights before it. Run again to resume after these sequences{also}; if it "
            "happens again, lower the learning rates, or set max_loss_spike=0 if nothing is wrong"
        )

    def is_sync_point(self, step: int) -> bool:
        """Whether something is due after `step` steps for which no further step may be enqueued."""
        every = [getattr(self.config, name) for name in INTERVALS]
        return step == self.plan.num_iterations or any(n > 0 and step % n == 0 for n in every)

    def due(self, every: int, at_end: bool = False) -> bool:
        return (every > 0 and self.step % every == 0) or (at_end and self.step == self.plan.num_iterations)

    def save_and_measure(self, metrics: dict) -> None:
        """Save if that is due, and measure afterwards: a failed evaluation must not lose the training before it."""
        due = self.due(self.config.save_every, at_end=True)
        if self.world > 1 and self.core:  # after the failure of one rank the others cannot save
            due |= self.due(self.config.core_metric_every)
        saved = self.save(metrics) if due else None
        try:
            self.measure(metrics)
        except Exception:
            if saved is None and self.world == 1 and not self.pending_step:  # whose update may be in the weights
                saved = self.save(metrics)
            if saved:
                self.print(f"an evaluation failed; {saved} holds step {self.step}: run again to resume")
            raise
        if saved and self.accelerator.is_main_process:
            save_json(saved / checkpoint.MEASURED, {"history": self.history, "samples": self.samples})

    def measure(self, metrics: dict) -> None:
        """Evaluations that are due after this step; log lines, trackers, and a point of the learning curve."""
        config, results, texts = self.config, {}, []
        tokens = self.step * self.plan.total_batch_size
        metrics = {"step": self.step, "tokens": tokens, "time": self.timer.seconds, **metrics}
        if self.due(config.log_every):
            self.print(f"step {self.step}/{self.plan.num_iterations}: {in_words(metrics, WORDS)}")
        self.loss_model.eval()
        if self.due(config.eval_every, at_end=config.eval_every != 0):
            results["val_bpb"] = self.evaluator.bpb()
        if self.core and config.core_metric_every > 0 and self.due(config.core_metric_every, at_end=True):
            results["core"] = self.core(self.model, config.core_metric_max_per_task)
        if self.due(config.sample_every, at_end=True):
            self.samples = self.evaluator.samples(self.step)
            texts = [f"{sample['prompt']!r} -> {sample['text']!r}" for sample in self.samples]
        self.loss_model.train()
        for text in filter(None, [*texts, in_words(results, results)]):
            self.print(f"step {self.step}: {text}")
        if results or texts:
            model_setup.reshard(self.loss_model)  # checkpoints need sharded weights
        on_curve = self.step == 1 or self.due(max(1, self.plan.num_iterations // HISTORY), at_end=True)
        if results or texts or on_curve or self.due(config.log_every):
            values = metrics | results | ({"samples": "\n".join(texts)} if texts else {})
            self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=self.step)
        if results or texts or on_curve:
            self.history.append(metrics | results)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        flops = self.plan.flops_per_token * (tokens_per_second or 0)
        return flops / (peak * self.world) if peak and flops else None

    def print(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"[{self.output.name}] {text}")

    def save(self, unmeasured: dict | None = None) -> Path:
        """Write a checkpoint. `unmeasured`: the metrics of the last step, if its evaluations are still to come."""
        wall_time = time.time() - self.record["started"] + self.record.get("earlier_wall_time_s", 0)
        progress = {
            "config": asdict(self.config), "inputs": self.record["inputs"], "changes": self.record["changes"],
            "unmeasured": unmeasured, "rows": self.micro_batch_size, "wall_time_s": wall_time,
            "timed": self.timer.steps, "seconds": self.timer.seconds, "history": self.history,
            "samples": self.samples, "recent": list(self.spikes.recent), "loss_scale": self.loss_scale.item(),
            "start_val_bpb": self.record.get("start_val_bpb"),
        }  # fmt: skip
        return checkpoint.save(
            self.output / "state", self.step, self.model, self.optimizer.optimizer, self.loader.state_dict(), progress,
            self.config.keep_checkpoints,
        )  # fmt: skip

    def restore(self, path: Path) -> None:
        progress = checkpoint.read_progress(path)
        changed = checkpoint.changed_keys(progress["config"], asdict(self.config))
        inputs = checkpoint.changed_keys(progress["inputs"], self.record["inputs"])
        # The learning rate of steps that are done did not decay for a shorter length.
        length = ("num_iterations", "target_flops", "target_param_data_ratio")
        past = length if progress["step"] >= self.plan.num_iterations else ()
        binding = [changed[key] for key in (*SHAPE_KEYS, "dataset", "seed", *past) if key in changed]
        checkpoint.refuse_changes(path.parent, [*binding, *inputs.values()])
        self.loader.load_state_dict(checkpoint.load(path, self.model, self.optimizer.optimizer))
        measured = load_json(path / checkpoint.MEASURED, "delete it to repeat that evaluation", Measured)
        self.history, self.samples = (measured or progress)["history"], (measured or progress)["samples"]
        self.unmeasured = None if measured else progress["unmeasured"]
        self.step, self.timer.seconds, self.timer.steps = progress["step"], progress["seconds"], progress["timed"]
        self.spikes.recent.extend(progress["recent"])
        self.loss_scale.fill_(progress["loss_scale"])
        self.record["earlier_wall_time_s"] = progress["wall_time_s"]
        self.record["start_val_bpb"] = progress["start_val_bpb"]
        self.record["changes"] = progress["changes"]
        if changed:
            self.record["changes"].append({"after step": self.step, "keys": list(changed.values())})
        changes = f" (changed: {', '.join(changed.values())})" if changed else ""
        self.print(f"resuming at step {self.step}{changes}")

    def save_result(self) -> dict:
        """Write the model folder and metrics.json, delete the checkpoints."""
        self.loader.close()
        checkpoint.save_model(self.output, self.model, self.tokenizer)
        optimizer_state = self.output / "optimizer.pt"
        if self.config.save_optimizer:
            checkpoint.save_optimizer_state(optimizer_state, self.model, self.optimizer.optimizer)
        elif self.accelerator.is_main_process:
            optimizer_state.unlink(missing_ok=True)  # of an earlier run
        last = {k: v for point in self.history for k, v in point.items()}
        speed = self.timer.steps * self.plan.total_batch_size / self.timer.seconds if self.timer.steps else None
        numbers = self.plan.summary() | {
            "device_batch_size": self.micro_batch_size, "gradient_accumulation": self.grad_accum_steps,
            "epochs": self.loader.epoch, "training_time_s": self.timer.seconds, "tokens_per_second": speed,
            "mfu": self.mfu(speed), "fp8": self.fp8, "peak_memory_bytes": runtime.peak_memory(self.device),
            "val_bpb": last.get("val_bpb"), "core": last.get("core"),
            "samples": self.samples, "history": self.history,
        }  # fmt: skip
        if self.accelerator.is_main_process:
            self.record["weights"] = model_fingerprint(self.output)
            self.record["optimizer"] = checkpoint.sha256(optimizer_state) if optimizer_state.exists() else None
            self.record = write_metrics(self.output, self.record, **numbers)
            shutil.rmtree(self.output / "state", ignore_errors=True)
        for tracker in self.accelerator.trackers:  # end_training() would also end the process group
            tracker.finish()
        self.accelerator.free_memory()
        monitored_barrier("the end of pretraining")
        return {**self.record, **numbers}
