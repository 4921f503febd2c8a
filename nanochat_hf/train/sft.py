"""Mid-training and SFT on TRL's SFTTrainer: one function, two YAML files.

    nanochat sft --config recipes/cpu-demo/sft.yaml --run-dir runs/cpu-demo

The main process renders the mixture with the chat template, packs the conversations (best-fit decreasing) and writes
them to `state/`, where all ranks read them. The loss of SFT is on assistant tokens, that of mid-training on all tokens
but tool results. Unlike in karpathy/nanochat, conversations of a packed sequence do not attend to each other. One
that is longer than a sequence is skipped and counted.
"""

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer, pack_dataset

from ..data.documents import log
from ..data.mixture import Mixture, shared
from ..data.splits import listed
from ..data.tokenizer import assistant_mask, tool_result_mask
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import load_json, save_json, start_record, track, writing
from ..stage_configs import ChatConfig
from .fused_model import use_fused_forward
from .model_setup import compute_dtype, reshard
from .trainer import StageTrainer, load_source, split_step, trainer_arguments

ENCODE_BATCH = 4000  # conversations; with each the tokenizer goes to another process
PARALLEL_FROM = 20_000  # conversations from which several processes encode them


class ChatTrainer(StageTrainer, SFTTrainer):
    """SFTTrainer with the fused forward of pretraining, a validation loss per token, and ChatCORE.

    `chatcore`, if set, is (model, questions per task) -> ChatCORE, measured every `chatcore_every` steps.
    """

    unit = "sequences"
    chatcore: Callable[[PreTrainedModel, int], float] | None = None

    def is_measurement_due(self) -> bool:
        every = self.stage.chatcore_every
        return bool(self.chatcore) and every > 0 and self.state.global_step % every == 0

    def measure(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        value = self.chatcore(model.eval(), self.stage.chatcore_max_per_task)
        model.train()
        self.log({"chatcore": value})

    def enable_fused_forward(self, max_documents: int) -> None:
        """Use the fused forward, for batches of at most `max_documents` conversations, where nothing forbids it."""
        stage, device = self.stage, self.accelerator.device
        self.fused = not (stage.lora_r > 0 or stage.attn_implementation or self.is_sharded())
        if self.fused:
            compiled = stage.compile and device.type == "cuda"
            use_fused_forward(self.model, compute_dtype(device), max_documents, compiled)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The fused forward's own loss; without it TRL's, which never holds all logits but waits for the GPU."""
        owner = Trainer if self.fused or not inputs["input_ids"].is_cuda else SFTTrainer
        return owner.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The mean loss per trained token; transformers' mean over batches would depend on the batch size."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        self.model.eval()
        for inputs in map(self._prepare_inputs, self.get_eval_dataloader()):
            with torch.no_grad():
                loss = self.compute_loss(self.model, inputs)
            number = (inputs["labels"][:, 1:] != -100).sum()
            sums += torch.stack((torch.where(number > 0, loss * number, 0), number))
        self.model.train()
        reshard(self.model)  # a checkpoint may be written next
        loss, number = self.accelerator.reduce(sums, "sum").tolist()
        self.log({"eval_loss": loss / max(number, 1)})
        return {"eval_loss": loss / max(number, 1)}


class PackedCollator:
    """Packed sequences -> input_ids, labels and position_ids, each (B, length or that of the longest sequence).

    TRL's own collator flattens the batch to one sequence, which without variable-length attention costs B times as
    much. position_ids restart where a conversation begins; the padding counts as one.
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
            lengths = [*row.get("seq_lengths", [size]), width - size]
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["labels"][i, :size] = torch.tensor(row["labels"])
            batch["position_ids"][i] = torch.cat([torch.arange(n) for n in lengths])
        return batch


def encode(tokenizer, chats: list[list[dict]], assistant_only_loss: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conversations -> (input_ids, labels) each, int32 (T,); labels are -100 where there is no loss."""
    pairs = []
    for ids in tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]:
        mask = assistant_mask(tokenizer, ids) if assistant_only_loss else tool_result_mask(tokenizer, ids)
        mask[0] = 0  # in a packed sequence the token before it is of another conversation
        ids = np.array(ids, dtype=np.int32)
        pairs.append((ids, np.where(mask, ids, -100).astype(np.int32)))
    return pairs


def encode_all(tokenizer, chats: list[list[dict]], assistant_only_loss: bool) -> Iterator[tuple]:
    """`encode` in batches; from PARALLEL_FROM conversations by several processes, since rendering is slow."""
    batches = [chats[i : i + ENCODE_BATCH] for i in range(0, len(chats), ENCODE_BATCH)]
    work = partial(encode, tokenizer, assistant_only_loss=assistant_only_loss)
    parallel = len(chats) > PARALLEL_FROM
    with multiprocessing.Pool(min(os.cpu_count(), 32)) if parallel else nullcontext() as pool:
        pairs = chain.from_iterable(pool.imap(work, batches) if pool else map(work, batches))
        yield from track(pairs, "tokenizing", len(chats), "conversations")


def build_packed_dataset(
    config: ChatConfig, entries: list[dict], tokenizer, length: int, folder: Path
) -> tuple[Dataset, dict]:
    """Encode and pack the mixture `entries` into `folder`, on the main process; all ranks read it.

    Returns rows {"input_ids", "labels"} of at most `length` tokens, with packing also "seq_lengths". And a summary
    {"rows", "tokens", "mixture", "skipped_rows", "content"}; content is a fingerprint of the rows. Raises InputError
    if no conversation can be used.
    """
    with main_process_first(f"making {folder}") as main:
        if main:
            mixture = Mixture(entries, config.seed, config.on_bad_example)
            rows = encode_mixture(config, mixture, tokenizer, length)
            digest = hashlib.sha256()
            for row in rows.with_format("numpy"):
                for name in ("input_ids", "labels"):
                    digest.update(row[name].astype(np.int64).tobytes() + b"|")
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                rows.save_to_disk(folder)
            part = "training" if folder.name == "rows" else folder.name
            print(f"[{folder.parents[1].name}] {part}: {len(rows):,} sequences\n{mixture.table()}")
            total = {key: sum(entry[key] for entry in mixture.summary()) for key in ("rows", "tokens")}
            summary = {**total, "mixture": mixture.summary(), "skipped_rows": mixture.skipped}
            save_json(folder / "summary.json", summary | {"content": digest.hexdigest()[:16]})
    return load_from_disk(str(folder)).with_format("numpy"), load_json(folder / "summary.json")


def encode_mixture(config: ChatConfig, mixture: Mixture, tokenizer, length: int) -> Dataset:
    """The conversations of at most `length` tokens, encoded and, if the config says so, packed; others are skipped."""
    examples = list(track(mixture, "reading", len(mixture), "conversations"))
    encoded = encode_all(tokenizer, [example["messages"] for example in examples], config.assistant_only_loss)
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    for example, (ids, labels) in zip(examples, encoded, strict=True):
        entry = mixture.entries[example["entry"]]
        if len(ids) > length:
            entry.num_rows -= 1
            mixture.skip(example["entry"], example["row"], f"{len(ids)} tokens, and a sequence holds {length}")
        else:
            entry.num_tokens += len(ids)
            columns["input_ids"].append(ids)
            columns["labels"].append(labels)
    if not columns["input_ids"]:
        raise InputError(f"no conversation of the mixture fits into max_seq_len = {length} tokens")
    rows = Dataset.from_dict(columns)
    return pack_dataset(rows, length) if config.packing else rows


def pad_to_multiple(rows: Dataset, multiple: int, pad: int) -> Dataset:
    """Append rows without loss up to a multiple, so that every rank has as many; Accelerate would repeat real ones."""
    empty = {"input_ids": [pad], "labels": [-100], "seq_lengths": [1]}
    empty = {name: [empty[name]] * (-len(rows) % multiple) for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(empty, features=rows.features)]).with_format("numpy")


def train_chat(config: ChatConfig, model: str, output: Path, chatcore: Callable | None = None) -> None:
    """Train the model in folder `model` on conversations; the result and its metrics.json go to `output`.

    An interrupted run resumes when it is called again. `chatcore` is (model, questions per task) -> number, called on
    all ranks every `chatcore_every` steps. Raises InputError for a mixture, model or batch size that cannot be used.
    """
    record, output = start_record(config), Path(output)
    tokenizer, network = load_source(model, config)
    if config.examples:
        tokenizer.init_kwargs["examples"] = config.examples
    length = config.max_seq_len if config.max_seq_len > 0 else network.config.max_position_embeddings
    config, grad_accum_steps = split_step(config, length)
    inputs, eval_rows = {}, None
    micro_batch = config.device_batch_size * partial_state().num_processes
    if config.validation:  # first: it is small, and may be wrong
        if both := shared(config.mixture, config.validation):
            log(f"mixture and validation both take rows of {listed(both)}: its validation loss is of rows trained on")
        folder = output / "state" / "validation"
        eval_rows, eval_summary = build_packed_dataset(config, config.validation, tokenizer, length, folder)
        inputs["validation data"] = eval_summary["content"]
        eval_rows = pad_to_multiple(eval_rows, micro_batch, tokenizer.pad_token_id)
    rows, summary = build_packed_dataset(config, config.mixture, tokenizer, length, output / "state" / "rows")
    inputs["data"] = summary.pop("content")
    padded = pad_to_multiple(rows, micro_batch * grad_accum_steps, tokenizer.pad_token_id)
    trainer = ChatTrainer(
        model=network,
        args=SFTConfig(
            **trainer_arguments(config, output) | ({} if eval_rows else {"eval_strategy": "no"}),
            gradient_accumulation_steps=grad_accum_steps,
            per_device_eval_batch_size=config.device_batch_size,
            max_length=None,  # the rows have their length already
        ),
        train_dataset=padded,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.pad_token_id, length if config.packing else None),
        stage=config,
        source=model,
    )
    trainer.padding = len(padded) - len(rows)
    trainer.chatcore = None if trainer.is_sharded() else chatcore
    if chatcore and trainer.is_sharded():  # each rank would ask questions of its own
        trainer.accelerator.print("chatcore_every is left out: this Accelerate config file shards the weights")
    most = max(len(n) for part in (rows, eval_rows) if part for n in part["seq_lengths"]) if config.packing else 1
    trainer.enable_fused_forward(config.device_batch_size * (most + 1))  # and one for a sequence's padding
    # Of the source's weights, also in a resumed run; sharded ones are not wrapped yet.
    before = trainer.evaluate()["eval_loss"] if eval_rows and not trainer.is_sharded() else None
    trainer.train_with_resume(inputs)
    val_loss = trainer.evaluate()["eval_loss"] if eval_rows else None
    trainer.save_stage(record, **summary, start_val_loss=before, val_loss=val_loss)
