"""Mid-training and SFT: teach a base model to chat, on TRL's SFTTrainer. One function, two YAML files.

    python scripts/chat_sft.py --config recipes/cpu-demo/sft.yaml --run-dir runs/cpu-demo

The first process renders the mixture with the tokenizer's chat template and packs it into rows in `state/`, where all
processes, and a resume, read them. SFT trains on what the assistant says, mid-training on every token, neither on a
tool's result. Against karpathy/nanochat: positions start anew in each conversation of a row, so that none sees
another, and a conversation that is longer than a row is skipped and counted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer, pack_dataset

from ..data.documents import log
from ..data.mixture import Mixture, content_fingerprint, shared
from ..data.splits import listed
from ..data.tokenizer import load_tokenizer, spoken_mask, tokenizer_fingerprint
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import fingerprint, load_json, model_fingerprint, save_json, start_record, writing
from .checkpoint import MANIFEST, damage, sha256, write_manifest
from .fused_model import use_fused_forward
from .model_setup import compute_dtype, load_chat_model, lora, reshard
from .trainer import (
    StageConfig,
    StageTrainer,
    save_stage,
    split_step,
    tool_result_mask,
    train_with_resume,
    trainer_arguments,
)

MANY = 20_000  # conversations from which tokenizing is shared out over the cores


@dataclass
class ChatConfig(StageConfig):
    """Keys of mid.yaml and sft.yaml, besides those of StageConfig."""

    mixture: list[dict] = field(default_factory=lambda: [{"dataset": "primer"}])
    """What to train on: entries as data/mixture.py reads them."""
    validation: list[dict] = field(default_factory=list)
    """What the validation loss is measured on, likewise; empty: nothing."""
    assistant_only_loss: bool = True
    """Train on what the assistant says only; mid-training says false."""
    max_seq_len: int = -1
    """Tokens of a row; -1: as the model was pretrained."""
    packing: bool = True
    """Put as many whole conversations into a row as fit; otherwise one conversation is one row."""
    total_batch_size: int = -1
    """Tokens of a step (without packing: conversations), over all devices; -1: one batch of each device."""
    load_optimizer: bool = True
    """Begin with the momenta in the source's optimizer.pt, if there is one."""
    chatcore_every: int = -1
    """Steps between measurements of ChatCORE on the tasks of eval.yaml; -1: never."""
    chatcore_max_per_task: int = 32
    """Questions of each task that such a measurement asks; -1: all."""
    compile: bool = False
    """Compile the network with torch.compile (CUDA)."""


class ChatTrainer(StageTrainer, SFTTrainer):
    """SFTTrainer that counts the tokens it went through, and trains the way that pretraining does (`fast.fuse`).

    `chatcore`, if set, is (model, questions per task) -> ChatCORE, measured every `chatcore_every` steps.
    """

    chatcore: Callable[[PreTrainedModel, int], float] | None = None

    def is_measurement_due(self) -> bool:
        every = self.stage.chatcore_every
        return bool(self.chatcore) and every > 0 and self.state.global_step % every == 0

    def measure(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        value = self.chatcore(model.eval(), self.stage.chatcore_max_per_task)
        model.train()
        self.log({"chatcore": value})

    def use_fused_forward(self, documents: int) -> None:
        """Take the fused training step, for batches of at most `documents` conversations, where nothing forbids it."""
        stage = self.stage
        self.fused = not (
            stage.lora_r > 0 or stage.attn_implementation or self.is_deepspeed_enabled or self.is_fsdp_enabled
        )
        if self.fused:
            device = self.accelerator.device
            use_fused_forward(self.model, compute_dtype(device), documents, stage.compile and device.type == "cuda")

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.step_tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The fused step's own loss; without it TRL's, which never holds all logits but waits for the GPU."""
        owner = Trainer if self.fused or not inputs["input_ids"].is_cuda else SFTTrainer
        return owner.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The mean over all tokens that count: transformers' mean over batches would depend on how they are cut."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        self.model.eval()
        for inputs in map(self._prepare_inputs, self.get_eval_dataloader()):
            with torch.no_grad():
                loss = self.compute_loss(self.model, inputs)
            number = (inputs["labels"][:, 1:] != -100).sum()
            sums += torch.stack((torch.where(number > 0, loss * number, 0), number))
        self.model.train()
        reshard(self.model)  # for what saves it
        loss, number = self.accelerator.reduce(sums, "sum").tolist()
        self.log({"eval_loss": loss / max(number, 1)})
        return {"eval_loss": loss / max(number, 1)}


class PackedCollator:
    """Collator: packed rows -> input_ids, labels, position_ids, each (B, length or that of the longest row).

    TRL's own would make one row of the batch, and without a variable-length kernel its attention mask costs B times
    as much. Positions that restart tell the model where a conversation begins; padding counts as one of its own.
    """

    def __init__(self, pad: int, length: int | None):
        self.pad, self.length = pad, length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = self.length or max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad),
            "labels": torch.full((len(rows), width), -100),
            "position_ids": torch.zeros((len(rows), width), dtype=torch.long),
        }
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            parts = [*row.get("seq_lengths", [size]), width - size]
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["labels"][i, :size] = torch.tensor(row["labels"])
            batch["position_ids"][i] = torch.cat([torch.arange(n) for n in parts])
        return batch


def encode(tokenizer, chats: list[list[dict]], assistant_only_loss: bool) -> dict[str, list]:
    """Conversations -> {"input_ids", "labels"}, a list each; labels are -100 where nothing is to be learned."""
    rows, labels = tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"], []
    for ids in rows:
        learned = spoken_mask(tokenizer, ids) if assistant_only_loss else tool_result_mask(ids, tokenizer)
        # What follows from nothing, or from another conversation of the row, cannot be learned.
        labels.append([-100, *(token if yes else -100 for token, yes in zip(ids[1:], learned[1:]))])
    return {"input_ids": rows, "labels": labels}


def code_version() -> str:
    """A hash of the code between a data set and the rows that are trained on."""
    package = Path(__file__).parents[1]
    files = [file for part in ("data", "demo") for file in sorted((package / part).iterdir()) if file.is_file()]
    return fingerprint([path.read_text() for path in (Path(__file__), *files)])


def build_packed_dataset(
    config: ChatConfig, entries: list[dict], tokenizer, length: int, folder: Path
) -> tuple[Dataset, dict]:
    """The rows to train on and {"rows", "tokens", "mixture", "skipped_rows", "content"}, made by the first process.

    Those that an interrupted run left in `folder` are taken if data, config, tokenizer and code are the same as then.
    Raises InputError when nothing of the mixture can be used.
    """
    with main_process_first(f"making {folder}") as main:
        if main:
            mixture = Mixture(entries, config.seed, config.on_bad_example)
            keys = {
                name: getattr(config, name) for name in ("seed", "on_bad_example", "assistant_only_loss", "packing")
            }
            sources = [content_fingerprint(source) for source in mixture.sources]
            parts = [entries, keys, length, sources, tokenizer_fingerprint(tokenizer), code_version()]
            made_from = fingerprint(parts)
            try:
                same = (load_json(folder / "made.json") or {}).get("made_from") == made_from
            except InputError:
                same = False
            if not same or not (folder / MANIFEST).exists() or damage(folder):
                with writing(folder):
                    make_rows(config, mixture, tokenizer, length, folder, made_from)
    return load_from_disk(str(folder)).with_format("numpy"), load_json(folder / "made.json")


def make_rows(config: ChatConfig, mixture: Mixture, tokenizer, length: int, folder: Path, made_from: str) -> None:
    """Encode and pack the conversations of `mixture` into `folder`, with made.json and a manifest of the files."""
    chats = [(row["entry"], row["row"], json.dumps(row["messages"])) for row in tqdm(mixture, desc="reading")]
    rows = Dataset.from_dict(dict(zip(("entry", "row", "chat"), zip(*chats)))).map(
        lambda batch: encode(tokenizer, [json.loads(chat) for chat in batch["chat"]], config.assistant_only_loss),
        batched=True,
        num_proc=min(os.cpu_count(), 32) if len(chats) > MANY else None,
        remove_columns="chat",
        desc="tokenizing",
    )
    fitting = []
    for index, (number, row, ids) in enumerate(zip(rows["entry"], rows["row"], rows["input_ids"])):
        entry = mixture.entries[number]
        if len(ids) > length:
            entry.num_rows -= 1
            mixture.skip(number, row, f"{len(ids)} tokens, and a row holds {length}")
        else:
            entry.num_tokens += len(ids)
            fitting.append(index)
    if not fitting:
        raise InputError(f"no conversation of the mixture fits into max_seq_len = {length} tokens")
    rows = rows.select(fitting).select_columns(["input_ids", "labels"])
    if config.packing:
        rows = pack_dataset(rows, length)
    shutil.rmtree(folder, ignore_errors=True)
    rows.save_to_disk(folder)
    digest = hashlib.sha256()
    for row in rows.with_format("numpy"):
        for name in ("input_ids", "labels"):
            digest.update(row[name].tobytes() + b"|")
    total = {key: sum(entry[key] for entry in mixture.summary()) for key in ("rows", "tokens")}
    print(mixture.table())
    made = {**total, "mixture": mixture.summary(), "skipped_rows": mixture.skipped}
    save_json(folder / "made.json", made | {"content": digest.hexdigest()[:16], "made_from": made_from})
    write_manifest(folder)


def pad_to_multiple(rows: Dataset, multiple: int, pad: int) -> Dataset:
    """The rows, and empty ones up to a multiple: nothing is learned from these, and every process has as many.

    Accelerate would repeat real ones instead, as many as there are processes to fill.
    """
    empty = {"input_ids": [pad], "labels": [-100], "seq_lengths": [1]}
    empty = {name: [empty[name]] * (-len(rows) % multiple) for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(empty, features=rows.features)]).with_format("numpy")


def train_chat(config: ChatConfig, model: str, output: Path, chatcore: Callable | None = None) -> None:
    """Train the model in folder `model` on conversations; the result and its metrics.json go to `output`.

    A killed run goes on from its last checkpoint when called again. `chatcore(model, questions per task)` -> number is
    called on every process, every `chatcore_every` steps (eval.chatcore makes one). Raises InputError for a mixture,
    model or batch size with which this cannot work.
    """
    record, output = start_record(config), Path(output)
    partial_state()
    with main_process_first(f"loading {model}"):
        tokenizer = load_tokenizer(model)
        network = load_chat_model(model, config, tokenizer)
    length = config.max_seq_len if config.max_seq_len > 0 else network.config.max_position_embeddings
    steps, unit = 1, length if config.packing else 1
    if config.total_batch_size > 0:
        config, steps = split_step(config, "total_batch_size", config.total_batch_size, unit)
    rows, made = build_packed_dataset(config, config.mixture, tokenizer, length, output / "state" / "rows")
    held_out = None
    if config.validation:
        if both := shared(config.mixture, config.validation):
            log(f"mixture and validation both take rows of {listed(both)}: its validation loss is of rows trained on")
        held_out, held = build_packed_dataset(
            config, config.validation, tokenizer, length, output / "state" / "validation"
        )
    together = config.device_batch_size * partial_state().num_processes
    rows = pad_to_multiple(rows, together * steps, tokenizer.pad_token_id)
    held_out = pad_to_multiple(held_out, together, tokenizer.pad_token_id) if held_out else None
    trainer = ChatTrainer(
        model=network,
        args=SFTConfig(
            **trainer_arguments(config, output) | ({} if held_out else {"eval_strategy": "no"}),
            gradient_accumulation_steps=steps,
            per_device_eval_batch_size=config.device_batch_size,
            max_length=None,  # rows are made already
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.pad_token_id, length if config.packing else None),
        peft_config=lora(config),
        stage=config,
        momenta=Path(model) / "optimizer.pt" if config.load_optimizer else None,
    )
    if chatcore and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # each would ask questions of its own
        trainer.accelerator.print("chatcore_every is left out: this launch file keeps the weights in pieces")
    else:
        trainer.chatcore = chatcore
    most = max(len(n) for part in (rows, held_out) if part for n in part["seq_lengths"]) if config.packing else 1
    trainer.use_fused_forward(config.device_batch_size * (most + 1))  # and one for a row's padding
    inputs = {"model": model_fingerprint(model) or model, "data": made.pop("content")}
    if held_out:
        inputs["validation data"] = held["content"]
    if trainer.momenta and trainer.momenta.exists():
        inputs["optimizer"] = sha256(trainer.momenta)
    history = train_with_resume(trainer, output, inputs)
    val_loss = trainer.evaluate()["eval_loss"] if held_out else None
    save_stage(trainer, tokenizer, output, record, inputs, **made, history=history, val_loss=val_loss)
