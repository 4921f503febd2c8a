"""Preference training: of two answers to a prompt, make the better one likelier, on TRL's DPOTrainer. Optional.

    python scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12

Direct preference optimization (arXiv:2305.18290): no reward model and no sampling; the log-ratio of the model to where
it began is the reward, and a logistic loss separates the two answers. karpathy/nanochat has no such stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from trl import DPOConfig, DPOTrainer

from ..data.mixture import REASONS_KEPT, DatasetConfig, open_rows
from ..data.tokenizer import load_tokenizer, spoken_mask
from ..data.transforms import BadRow, check, normalize
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import fingerprint, model_fingerprint, start_record
from .model_setup import load_chat_model, lora
from .runtime import check_launch
from .trainer import StageConfig, StageTrainer, save_stage, split_step, train_with_resume, trainer_arguments


@dataclass
class DPOStageConfig(StageConfig):
    """Keys of dpo.yaml, besides those of StageConfig."""

    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    """Rows {"chosen", "rejected"} of whole conversations, or with a "prompt" before them: a Hub id or a .jsonl."""
    split: str = "train_prefs"
    """Of a Hub data set."""
    num_eval_pairs: int = 200
    """Rows kept for validation."""
    examples_per_step: int = 32
    """Pairs a step, over all devices."""
    max_seq_len: int = -1
    """Tokens; pairs with a longer conversation cannot be used. -1: as the model was pretrained."""
    beta: float = 0.1
    """How dear it is to move away from the model that it began with."""
    init_lr_frac: float = 0.02
    warmdown_ratio: float = 1.0


class PreferenceTrainer(StageTrainer, DPOTrainer):
    """DPOTrainer that counts the tokens it went through, and compares what the assistant says only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = partial(spoken_only, self.data_collator, self.processing_class)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.step_tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        return super().training_step(model, inputs, num_items_in_batch)


def spoken_only(collate: Callable, tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of TRL's collator, its completions without results of tools and later questions of the user."""
    batch = collate(rows)
    spoken = [spoken_mask(tokenizer, ids) for ids in batch["input_ids"].tolist()]
    batch["completion_mask"] = batch["completion_mask"] * torch.tensor(spoken)
    return batch


def pairs(config: DPOStageConfig, tokenizer, length: int) -> tuple[Dataset, Dataset, list[dict]]:
    """-> (training rows, validation rows, skipped ones). Raises InputError when too few of the rows are such pairs."""
    with main_process_first(f"reading {config.dataset}"):
        source, good, skipped = open_rows(DatasetConfig(config.dataset, config.split), config.seed), [], []
    for number in tqdm(range(len(source)), desc="reading", disable=not partial_state().is_main_process):
        try:
            good.append(pair(source[number], tokenizer, length))
        except (BadRow, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, BadRow) else "needs chosen and rejected that hold messages"
            if config.on_bad_example == "error":
                raise InputError(f"row {number} of {config.dataset} cannot be used: {reason}") from None
            skipped.append({"dataset": config.dataset, "row": number, "reason": reason})
    if len(good) <= config.num_eval_pairs:
        why = f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        raise InputError(f"{config.dataset} has {len(good)} pairs that can be used, too few for num_eval_pairs{why}")
    rows = Dataset.from_list(good).shuffle(config.seed)
    return rows.select(range(config.num_eval_pairs, len(rows))), rows.select(range(config.num_eval_pairs)), skipped


def pair(row: dict, tokenizer, length: int) -> dict[str, list[dict]]:
    """A row as {"prompt", "chosen", "rejected"}, lists of messages. Raises BadRow if it is no pair that fits."""
    prompt, chosen, rejected = row.get("prompt") or [], row["chosen"], row["rejected"]
    prompt = [] if isinstance(prompt, str) else prompt  # where it is text the conversations begin with it
    prompt, chosen, rejected = normalize(prompt), normalize(chosen), normalize(rejected)
    for messages in (prompt + chosen, prompt + rejected):
        check(messages)
        size = len(tokenizer.apply_chat_template(messages, return_dict=False))
        if size > length:
            raise BadRow(f"{size} tokens, and a row holds {length}")
    same = next((i for i, both in enumerate(zip(chosen, rejected)) if both[0] != both[1]), None)
    if same is None:
        raise BadRow("the answers are the same, or one goes on where the other ends")
    return {"prompt": prompt + chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def train_preference(config: DPOStageConfig, model: str, output: Path) -> None:
    """Train the model in folder `model` on pairs of answers; the result and its metrics.json go to `output`."""
    check_launch("dpo")
    record, output = start_record(config), Path(output)
    partial_state()
    with main_process_first(f"loading {model}"):
        tokenizer = load_tokenizer(model)
        network = load_chat_model(model, config, tokenizer)
    length = config.max_seq_len if config.max_seq_len > 0 else network.config.max_position_embeddings
    config, steps = split_step(config, "examples_per_step", config.examples_per_step)
    rows, held_out, skipped = pairs(config, tokenizer, length)
    trainer = PreferenceTrainer(
        model=network,
        ref_model=None if config.lora_r > 0 else load_chat_model(model, config, tokenizer),
        args=DPOConfig(
            **trainer_arguments(config, output),
            gradient_accumulation_steps=steps,
            per_device_eval_batch_size=config.device_batch_size,
            max_length=length,
            beta=config.beta,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora(config),
        stage=config,
    )
    before = trainer.evaluate()
    data = fingerprint([list(rows), list(held_out)])
    inputs = {"model": model_fingerprint(model) or model, "data": data}
    history = train_with_resume(trainer, output, inputs)
    after = trainer.evaluate()
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    before, after = ({name: found[key] for name, key in names.items()} for found in (before, after))
    numbers = {"before": before, "after": after, "skipped_rows": skipped[:REASONS_KEPT], "bad": len(skipped)}
    save_stage(trainer, tokenizer, output, record, inputs, rows=len(rows), history=history, **numbers)
