"""Direct preference optimization on TRL's DPOTrainer: an optional stage, which karpathy/nanochat does not have.

    nanochat dpo --config recipes/d12/dpo.yaml --run-dir runs/d12

DPO (arXiv:2305.18290) needs no reward model and no sampling. The implicit reward is beta x the log-ratio of the model
to the reference model, from which it starts. A logistic loss separates chosen from rejected completions.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ..data.documents import log
from ..data.mixture import MAX_LISTED_REASONS, DatasetConfig, log_skipped, open_rows
from ..data.tokenizer import assistant_mask
from ..data.transforms import BadRow, check, normalize, with_system
from ..distributed import main_process_first
from ..errors import InputError
from ..run import fingerprint, start_record, track
from ..stage_configs import DPOStageConfig
from .model_setup import load_chat_model
from .runtime import check_launch
from .trainer import StageTrainer, load_source, split_step, trainer_arguments


class PreferenceTrainer(StageTrainer, DPOTrainer):
    """DPOTrainer whose loss is on assistant tokens only, and whose evaluations are means over pairs."""

    unit = "pairs"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = partial(mask_completions, self.data_collator, self.processing_class)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As TRL's, but a batch counts by its pairs: TRL takes the mean of the batches' means, the last one's, too."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        pairs = self.accelerator.gather_for_metrics(torch.ones(len(inputs["input_ids"]) // 2, device=self.args.device))
        for values in self._metrics["eval"].values():
            values += values[-1:] * (len(pairs) - 1)
        return result


def mask_completions(collate: Callable, tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of TRL's collator, with tool results and later user turns taken out of its completion_mask."""
    batch = collate(rows)
    spoken = [assistant_mask(tokenizer, ids) for ids in batch["input_ids"].tolist()]
    batch["completion_mask"] = batch["completion_mask"] * torch.tensor(spoken)
    return batch


def load_pairs(config: DPOStageConfig, tokenizer, length: int) -> tuple[Dataset, Dataset, list[dict]]:
    """Training pairs, validation pairs, and the skipped rows. Raises InputError when there are too few pairs."""
    with main_process_first(f"reading {config.dataset}"):
        rows = open_rows(DatasetConfig(config.dataset, config.split), config.seed)
    pairs, skipped = [], []
    for number in track(range(len(rows)), "reading", len(rows), "pairs"):
        try:
            pairs.append(read_pair(rows[number], tokenizer, length))
        except (BadRow, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, BadRow) else "needs chosen and rejected that hold messages"
            if config.on_bad_example == "error":
                raise InputError(f"row {number} of {config.dataset} cannot be used: {reason}") from None
            skipped.append({"dataset": config.dataset, "row": number, "reason": reason})
    log_skipped("dpo", skipped, len(skipped))
    num = config.num_eval_pairs
    if len(pairs) <= num:
        why = f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        few = f"{len(pairs)} pairs that can be used, too few for num_eval_pairs={num}: lower it"
        raise InputError(f"{config.dataset} has {few}{why}")
    if (left := len(pairs) - num) < config.examples_per_step:  # transformers would take smaller steps
        raise InputError(f"{config.dataset} leaves {left} training pairs: lower examples_per_step or num_eval_pairs")
    pairs = Dataset.from_list(pairs).shuffle(config.seed)
    prompts = [fingerprint(prompt) for prompt in pairs["prompt"]]
    held_out = {*prompts[:num]}
    if both := sum(prompt in held_out for prompt in prompts[num:]):
        log(f"[dpo] {both:,} training pairs have the prompt of a validation pair: the validation is of prompts seen")
    return pairs.select(range(num, len(pairs))), pairs.select(range(num)), skipped


def read_pair(row: dict, tokenizer, length: int) -> dict[str, list[dict]]:
    """A row as {"prompt", "chosen", "rejected"}, lists of messages. Raises BadRow if it is no pair that fits."""
    prompt, chosen, rejected = row.get("prompt") or [], row["chosen"], row["rejected"]
    text, prompt = (prompt, []) if isinstance(prompt, str) else ("", prompt)
    prompt, chosen, rejected = normalize(prompt), normalize(chosen), normalize(rejected)
    if prompt:
        prompt = with_system(row, prompt)
    else:
        chosen, rejected = with_system(row, chosen), with_system(row, rejected)
    for messages in (prompt + chosen, prompt + rejected):
        check(messages)
        size = len(tokenizer.apply_chat_template(messages, return_dict=False))
        if size > length:
            raise BadRow(f"{size} tokens, and a sequence holds {length}")
    rendered = [[(m["role"], m.get("content"), calls_of(m)) for m in part] for part in (chosen, rejected)]
    same = next((i for i, both in enumerate(zip(*rendered)) if both[0] != both[1]), None)
    if same is None:
        raise BadRow("the completions are the same, or one continues where the other ends")
    if {chosen[same]["role"], rejected[same]["role"]} != {"assistant"}:
        raise BadRow("chosen and rejected begin with different messages: both need the same question")
    questions = [str(message["content"]).strip() for message in chosen if message["role"] != "assistant"]
    if text.strip() and not any(one in text or text.strip() in one for one in questions):
        raise BadRow("its prompt is another text than that of chosen and rejected: make it messages")
    return {"prompt": prompt + chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def calls_of(message: dict) -> list[dict]:
    """Name and arguments of its calls, without what the chat template leaves out, such as ids."""
    return [call["function"] for call in message.get("tool_calls") or ()]


def train_dpo(config: DPOStageConfig, model: str, output: Path) -> None:
    """Train the model in folder `model` on preference pairs; the result and its metrics.json go to `output`."""
    check_launch("dpo")
    record, output = start_record(config), Path(output)
    tokenizer, network = load_source(model, config)
    length = config.max_seq_len if config.max_seq_len > 0 else network.config.max_position_embeddings
    config, grad_accum_steps = split_step(config)
    rows, eval_rows, skipped = load_pairs(config, tokenizer, length)
    trainer = PreferenceTrainer(
        model=network,
        ref_model=None if config.lora_r > 0 else load_chat_model(model, config, tokenizer),
        args=DPOConfig(
            **trainer_arguments(config, output),
            gradient_accumulation_steps=grad_accum_steps,
            per_device_eval_batch_size=config.device_batch_size,
            max_length=length,
            beta=config.beta,
        ),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        stage=config,
        source=model,
    )
    before = trainer.evaluate()
    trainer.train_with_resume({"data": fingerprint([list(rows), list(eval_rows)])})
    after = trainer.evaluate()
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    before, after = ({name: metrics[key] for name, key in names.items()} for metrics in (before, after))
    numbers = {"before": before, "after": after, "skipped_rows": skipped[:MAX_LISTED_REASONS], "bad": len(skipped)}
    trainer.save_stage(record, rows=len(rows), **numbers)
