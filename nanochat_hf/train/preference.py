"""Preference training: of two answers to a prompt, make the better one likelier, on TRL's DPOTrainer. Optional.

    python scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12

Direct preference optimization (arXiv:2305.18290): no reward model and no sampling; the log-ratio of the model to where
it began is the reward, and a logistic loss separates the two answers. karpathy/nanochat has no such stage.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

from ..data.tokenizer import load_tokenizer
from ..errors import InputError
from ..run import begin
from .trainer import StageConfig, StageTrainer, conclude, fit, load_model, lora, processes, trainer_arguments


@dataclass
class PreferenceConfig(StageConfig):
    """Keys of dpo.yaml, besides those of StageConfig."""

    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    """Rows {"chosen", "rejected"} of whole conversations, or with a "prompt" before them: a Hub id or a .jsonl."""
    split: str = "train_prefs"
    """Of a Hub data set."""
    test_rows: int = 200
    """Rows kept for validation."""
    examples_per_step: int = 32
    """Pairs a step, over all devices."""
    max_seq_len: int = -1
    """Pairs with a longer conversation are left out; -1: as the model was pretrained."""
    beta: float = 0.1
    """How dear it is to move away from the model that it began with."""
    init_lr_frac: float = 0.02
    warmdown_ratio: float = 1.0


class PreferenceTrainer(StageTrainer, DPOTrainer):
    """DPOTrainer that counts the tokens it went through."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.step_tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        return super().training_step(model, inputs, num_items_in_batch)


def pairs(config: PreferenceConfig, tokenizer, length: int) -> tuple[Dataset, Dataset]:
    """-> (training rows, validation rows). Raises InputError when the data set holds no such pairs."""
    local = Path(config.dataset).suffix == ".jsonl"
    try:
        rows = load_dataset("json", data_files=config.dataset, split="train") if local else None
        rows = load_dataset(config.dataset, split=config.split) if rows is None else rows
    except Exception as error:  # the library's errors for missing, broken and unreachable data have no common type
        raise InputError(f"cannot read {config.dataset}: {str(error).splitlines()[0][:200]}") from error
    columns = [name for name in ("prompt", "chosen", "rejected") if name in rows.column_names]
    if "chosen" not in columns or "rejected" not in columns or isinstance(rows[0]["chosen"], str):
        raise InputError(f"{config.dataset} needs columns chosen and rejected that hold messages")
    if isinstance(rows[0].get("prompt"), str):  # the conversations begin with it
        columns.remove("prompt")

    def fits(row: dict) -> bool:
        prompt = row["prompt"] if "prompt" in columns else []
        whole = [prompt + row["chosen"], prompt + row["rejected"]]
        return whole[0] != whole[1] and all(len(tokenizer.apply_chat_template(x).input_ids) <= length for x in whole)

    rows = rows.select_columns(columns).filter(fits).shuffle(config.seed)
    if len(rows) <= config.test_rows:
        raise InputError(f"{config.dataset} has {len(rows)} pairs of at most {length} tokens: lower test_rows")
    return rows.select(range(config.test_rows, len(rows))), rows.select(range(config.test_rows))


def train_preference(config: PreferenceConfig, model: str, output: Path) -> None:
    """Train the model in folder `model` on pairs of answers; the result and its metrics.json go to `output`."""
    record, output = begin(config), Path(output)
    tokenizer = load_tokenizer(model)
    network = load_model(model, config, tokenizer)
    length = config.max_seq_len if config.max_seq_len > 0 else network.config.max_position_embeddings
    together = config.device_batch_size * processes().num_processes
    if config.examples_per_step % together:
        raise InputError(f"examples_per_step must be a multiple of device_batch_size x devices = {together}")
    rows, held_out = pairs(config, tokenizer, length)
    trainer = PreferenceTrainer(
        model=network,
        ref_model=None if config.lora_rank > 0 else load_model(model, config, tokenizer),
        args=DPOConfig(
            **trainer_arguments(config, output),
            gradient_accumulation_steps=config.examples_per_step // together,
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
    history = fit(trainer, output)
    after = trainer.evaluate()
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    before, after = ({name: found[key] for name, key in names.items()} for found in (before, after))
    conclude(trainer, tokenizer, output, record, rows=len(rows), history=history, before=before, after=after)
