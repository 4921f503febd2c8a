"""What mid-training, SFT and RL share: a transformers Trainer with this project's optimizer, schedule, resume and bar.

`StageTrainer` stands before one of TRL's trainers (`class ChatTrainer(StageTrainer, SFTTrainer)`) and changes four
things: Muon + AdamW by role, their rates and Muon's momentum by `schedule.Schedule`, checkpoints that a killed stage
finds again (with each rank's own optimizer state), and one progress bar in place of printed dicts. `fit` trains,
resumes and returns the log; `conclude` writes the folder that the next stage loads.
"""

import math
import os
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from .. import tool_loop
from ..distributed import meet, on_cpu, processes
from ..errors import InputError
from ..model.quantization import is_quantized
from ..run import finish, load_json, save_json
from .checkpoint import load_momenta, merged, save_model
from .device import shard_on_cpu, share_out
from .network import compute_dtype
from .optim import MuonAdamW, param_groups
from .scaling import RECIPES, optimizer_groups
from .schedule import Schedule

COMPLETE = "complete"  # name of the mark in a checkpoint that was written to its end
MAY_CHANGE = ("device_batch_size", "eval_every", "save_every", "report_to")  # keys, at a stop
HISTORY = {  # what a row of metrics.json's history keeps, by the names that the libraries give
    "loss": "train_loss",
    "eval_loss": "val_loss",
    "grad_norm": "grad_norm",
    "time": "time",
    "tokens_per_second": "tokens_per_second",
    "mean_token_accuracy": "token_accuracy",
    "chatcore": "chatcore",
    "reward": "reward",
    "reward_std": "reward_std",
    "eval_reward": "val_reward",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "cut_off",
    "tool_use": "tool_use",
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
    bad_rows: str = "skip"
    """What to do with rows of the data that cannot be used: `skip` and count them, or `refuse`."""
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
    lora_rank: int = 0
    """Rank of LoRA adapters, merged into the weights at the end; 0: train all weights."""
    lora_alpha: int = 32
    adamw_lr: float = 1e-3
    """AdamW rate of the adapters."""
    eval_every: int = -1
    """Steps between evaluations; -1: only at the ends."""
    save_every: int = -1
    """Steps between checkpoints for a resume; -1: none."""
    attn_implementation: str | None = None
    seed: int = 0
    report_to: str = "none"
    """Where TRL reports to: none, trackio, wandb, tensorboard."""


def check_launch(stage: str) -> None:
    """Raises InputError if the job was launched with DeepSpeed or FSDP2.

    For stages that evaluate before they train, which neither can, or generate with the weights that they train.
    """
    for name in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            raise InputError(
                f"{stage} needs whole weights between its steps, and {name} keeps them in pieces: launch it with "
                "configs/accelerate/multi_gpu.yaml"
            )


def load_model(source: str, config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of folder (or Hub id) `source`: float32 weights, computing in bf16 where the device has it.

    Its generation config ends a turn at assistant_end and pauses it at python_end, where a tool has to answer.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no model in {source}: {str(error).splitlines()[0]}") from None
    if is_quantized(model):
        raise InputError(f"{source} is quantized and cannot be trained: take the model that it was made from")
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    model.generation_config.update(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    dtype = compute_dtype(processes().device)
    if dtype != torch.float32:
        # What comes out of the embeddings decides in which dtype the network runs; the weights all stay float32.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
        if config.lora_rank > 0:  # peft calls the matrices itself, where the model would cast them
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.forward = partial(cast_linear, module)
    return model


def cast_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight.to(x.dtype))


def outside_results(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """1 for each token that a speaker chose, 0 for those of a tool's result, its marks included."""
    opens, closes = tokenizer.convert_tokens_to_ids(["<|output_start|>", "<|output_end|>"])
    inside, mask = False, []
    for token in ids:
        inside = inside or token == opens
        mask.append(int(not inside))
        inside = inside and token != closes
    return mask


def lora(config: StageConfig) -> LoraConfig | None:
    if config.lora_rank <= 0:
        return None
    # The default targets, all matrices of attention and MLP, are registered in nanochat_hf/__init__.py.
    return LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, task_type="CAUSAL_LM")


def split_step(config: StageConfig, name: str, total: int, unit: int = 1) -> tuple[StageConfig, int]:
    """-> the config, with fewer rows a device if a step of `total` has no more for each, and the batches of a step.

    Raises InputError, which calls the total `name`, when it cannot be shared out (`device.share_out`).
    """
    state = processes()
    rows, steps = share_out(name, total, unit, config.device_batch_size, state.num_processes, state.print)
    return replace(config, device_batch_size=rows), steps


def trainer_arguments(config: StageConfig, output: Path) -> dict:
    """Arguments that TRL's configs share. transformers chooses the device; nothing is downloaded or pushed."""
    # gradient_checkpointing has a new name since 5.20, which older versions do not know
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    return {
        "output_dir": str(output / "state"),
        "max_steps": config.num_iterations,
        "num_train_epochs": config.num_epochs,
        "per_device_train_batch_size": config.device_batch_size,
        "max_grad_norm": config.max_grad_norm,
        "eval_strategy": "steps" if config.eval_every > 0 else "no",
        "eval_steps": config.eval_every if config.eval_every > 0 else None,
        "save_strategy": "steps" if config.save_every > 0 else "no",
        "save_steps": max(config.save_every, 1),
        "save_total_limit": 1,
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
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(StageCallback(self))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_cpu(self.accelerator) or self.is_fsdp_enabled

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            network, rates = self.model if model is None else model, self.rates()
            make = self.zero_optimizer if self.is_deepspeed_enabled else MuonAdamW
            self.optimizer = make(param_groups(network, rates))
        return self.optimizer

    def zero_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """DeepSpeed's own Muon and AdamW: ZeRO cuts matrices into flat pieces, after its own Muon has seen them.

        The same rates serve: its updates are as large as ours. What it lacks is in `muon`: rows equilibrated, Polar
        Express, NorMuon, cautious decay.
        """
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # DeepSpeed takes seconds to import

        for group in groups:
            group["use_muon"] = group["kind"] == "muon"
            for p in group["params"]:
                p.use_muon = group["use_muon"]
        # Scattered, a gradient would come in pieces; stage 3 insists on that.
        self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_scatter"] = False
        return MuonWithAuxAdam(groups)

    def rates(self) -> dict[str, dict]:
        """Options of each role's group: the generation's own rates, or those that the recipe names, x init_lr_frac."""
        names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
        named = {name: value for name in names if (value := getattr(self.stage, name)) is not None}
        shape = self.model.config
        groups = optimizer_groups(replace(RECIPES[shape.generation], **named), shape.generation, shape.hidden_size)
        groups = {role: {**group, "lr": group["lr"] * self.stage.init_lr_frac} for role, group in groups.items()}
        return {**groups, "lora": {**groups["head"], "lr": self.stage.adamw_lr, "betas": (0.9, 0.99)}}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            stage, recipe = self.stage, RECIPES[self.model.config.generation]
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
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
            parts = [torch.load(part, map_location="cpu", weights_only=True) for part in self.trainer.parts]
            optimizer.load_state_dict(merged(parts))
        elif state.global_step == 0 and self.trainer.momenta and self.trainer.momenta.exists():
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper is around it
            if isinstance(inner, MuonAdamW) and self.trainer.stage.lora_rank <= 0:
                load_momenta(self.trainer.momenta, self.trainer.accelerator.unwrap_model(self.trainer.model), inner)
        self.begun_at = state.global_step
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
        trainer.step_seconds += time.time() - self.step_began
        if state.global_step == self.begun_at + 1 and torch.cuda.is_available():  # compiled, or chose its kernels
            trainer.step_tokens, trainer.step_seconds, trainer.generation_seconds = 0, 0.0, 0.0
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"loss": "loss", "reward": "reward", "eval_loss": "val", "tokens_per_second": "tok/s"}
        if self.bar is not None:
            self.bar.set_postfix({shown[key]: f"{value:,.4g}" for key, value in logs.items() if key in shown})

    def on_save(self, args, state, control, optimizer=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if sharded(self.trainer):
            torch.save(optimizer.state_dict(), folder / f"optimizer-{args.process_index}.pt")
        meet(f"{folder.name} of {folder.parent.parent.name}")
        if state.is_world_process_zero:
            (folder / COMPLETE).touch()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def sharded(trainer: StageTrainer) -> bool:
    """Whether each process holds optimizer state of its own (DDP): transformers saves only the first one's."""
    return trainer.args.world_size > 1 and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def fit(trainer: StageTrainer, output: Path) -> list[dict]:
    """Train, from the last complete checkpoint in output/state if there is one; returns the rows of `history`.

    Raises InputError when that checkpoint belongs to another recipe or launch.
    """
    state, args = output / "state", trainer.args
    settings = {key: value for key, value in asdict(trainer.stage).items() if key not in MAY_CHANGE}
    settings["rows of a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    zero = f"ZeRO over {args.world_size} processes"  # whose pieces fit no other number of them
    settings["sharding"] = zero if trainer.is_deepspeed_enabled else "FSDP2" if trainer.is_fsdp_enabled else "none"
    found = [int(mark.parent.name.split("-")[-1]) for mark in state.glob(f"checkpoint-*/{COMPLETE}")]
    checkpoint = state / f"checkpoint-{max(found)}" if found else None
    before = load_json(state / "config.json") if checkpoint else settings
    changed = [key for key in settings if before.get(key, settings[key]) != settings[key]]  # older: fewer keys
    if changed:
        changed = [f"{key}: {before[key]!r} -> {settings[key]!r}" for key in changed]
        raise InputError(
            f"{state} was written by another recipe or launch ({', '.join(changed)}): go on with that, or delete it "
            "to start this stage anew"
        )
    meet("reading the last checkpoint")
    if trainer.is_world_process_zero():
        # A checkpoint that was not written to its end would count as the newest, and be kept in a new one's place.
        for folder in state.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
        save_json(state / "config.json", settings)
    meet("dropping what is incomplete")
    if checkpoint:
        trainer.earlier = load_json(checkpoint / "trainer_state.json")["log_history"][-1]["time"]
        trainer.parts = list(checkpoint.glob("optimizer-*.pt"))  # none if one process wrote it: then it is whole
        if len(trainer.parts) == args.world_size:
            trainer.parts = [checkpoint / f"optimizer-{args.process_index}.pt"]
    # A model that was evaluated before counts as prepared, without DDP: gradients would stay on each process.
    prepared = trainer.accelerator._models
    prepared[:] = [model for model in prepared if model is not trainer.model]
    trainer.model._is_accelerate_prepared = False
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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


def conclude(trainer: StageTrainer, tokenizer: PreTrainedTokenizerBase, output: Path, record: dict, **numbers) -> None:
    """Make `output` a folder for from_pretrained (adapters merged in, with the tool loop) that has a metrics.json, and
    drop what a resume would have needed. All ranks call it."""
    meet("the end of training")
    if trainer.is_world_process_zero():
        tool_loop.ship(output)
    if trainer.is_deepspeed_enabled:
        trainer.save_model(str(output))
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_model(output, model.merge_and_unload() if trainer.stage.lora_rank > 0 else model, tokenizer)
    if trainer.is_world_process_zero():
        speed = trainer.step_tokens / trainer.step_seconds if trainer.step_seconds else None
        finish(output, record | {"earlier_wall_time_s": trainer.earlier}, tokens_per_second=speed, **numbers)
        shutil.rmtree(output / "state", ignore_errors=True)
