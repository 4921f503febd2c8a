"""On-policy distillation (GKD, arXiv:2306.13649): a student model learns what a larger sibling says of its own answers.

    python scripts/distill.py recipes/cpu-demo/distill.yaml --student runs/small/sft --teacher runs/cpu-demo/rl \\
        --run-dir runs/distilled

TRL's GKDTrainer with this project's optimizer and generation. A share `lmbda` of the steps is on completions that the
student samples, the others are on those of the mixture. The loss is the divergence between the distributions of both
models at every assistant token; tool results have none. The result is the stage sft of RUN_DIR, and the same command
resumes. Memory: the logits of both models, `device_batch_size` x tokens x vocabulary, are held at once.
"""

import json
from typing import Annotated

from annotated_types import Ge, Gt, Le
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

from nanochat_hf import stages
from nanochat_hf.config import Dir, Fraction, Length, Parser, Place, parse_config, settings
from nanochat_hf.data.mixture import Mixture
from nanochat_hf.data.tokenizer import load_tokenizer
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.jobs import working
from nanochat_hf.run import fingerprint, model_fingerprint, start_record
from nanochat_hf.stage_configs import ChatConfig
from nanochat_hf.train.grpo import rollout
from nanochat_hf.train.model_setup import load_chat_model
from nanochat_hf.train.runtime import check_launch
from nanochat_hf.train.sft import PackedCollator, encode
from nanochat_hf.train.trainer import StageTrainer, load_source, split_step, trainer_arguments


@settings
class DistillConfig(ChatConfig):
    """Keys of distill.yaml: those of sft.yaml, of which some have one value, and these."""

    lmbda: Fraction = 1.0
    """Share of the steps on the student's own completions."""
    beta: Fraction = 0.0
    """Divergence: 0 KL(teacher, student), 1 KL(student, teacher), between them generalized Jensen-Shannon."""
    temperature: Annotated[float, Gt(0), Le(5)] = 1.0
    """Of the student's sampling; the divergence is at 1."""
    max_new_tokens: Length = 256
    """Tokens per completion, tool results included."""
    total_batch_size: Annotated[int, Ge(1), Le(10**9)] = 32
    """Conversations per step, over all devices."""
    packing: bool = False


class DistillationTrainer(StageTrainer, GKDTrainer):
    """GKDTrainer whose batches are ours; `sample` is a rollout function of train/grpo.py."""

    unit = "conversations"

    def __init__(self, *args, sample, processing_class, **kwargs):
        self.sample, self.pad = sample, PackedCollator(processing_class.pad_token_id, None)
        super().__init__(*args, data_collator=self.collate, processing_class=processing_class, **kwargs)

    def collate(self, rows: list[dict]) -> dict:
        """Padding is on the right, where causal attention needs no mask for it."""
        batch = self.pad(rows)
        prompts = [json.loads(row["prompt"]) for row in rows]
        return {name: batch[name] for name in ("input_ids", "labels")} | {"attention_mask": None, "prompts": prompts}

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, None)  # it counts the labels from before sampling

    def generate_on_policy_outputs(self, model, inputs, generation_config):
        """As TRL's, by our engine, which runs the tool: ids (B, T), no mask, and labels without tool results."""
        sampled, rows = self.sample(inputs["prompts"], self), []
        for prompt, completion, mask in zip(sampled["prompt_ids"], sampled["completion_ids"], sampled["env_mask"]):
            labels = [token if own else -100 for token, own in zip(completion, mask)]
            rows.append({"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + labels})
        batch = self._prepare_inputs(self.pad(rows))
        return batch["input_ids"], None, batch["labels"]


def load_rows(config: DistillConfig, tokenizer, length: int) -> tuple[list[dict], Mixture]:
    """Conversations as rows {"input_ids", "labels", "prompt"}, the last as JSON: Arrow would add keys to messages."""
    mixture, rows = Mixture(config.mixture, config.seed, config.on_bad_example), []
    for row in mixture:
        messages = row["messages"]
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        [(ids, labels)] = encode(tokenizer, [messages], config.assistant_only_loss)
        prompt = tokenizer.apply_chat_template(messages[: last + 1], add_generation_prompt=True, return_dict=False)
        if (size := max(len(ids), len(prompt) + config.max_new_tokens)) > length:
            mixture.skip(row["entry"], row["row"], f"{size} tokens with max_new_tokens, and a sequence holds {length}")
        else:
            rows.append({"input_ids": ids, "labels": labels, "prompt": json.dumps(messages[: last + 1])})
    if len(rows) < config.total_batch_size:
        raise InputError(f"{len(rows)} usable conversations are no step: lower total_batch_size or max_new_tokens")
    return rows, mixture


def distill(config: DistillConfig, student: str, teacher: str, output) -> None:
    """Train the model in folder `student`; the result and its metrics.json go to `output`."""
    check_launch("distill")
    record = start_record(config) | {"student": student, "teacher": teacher}
    tokenizer, network = load_source(student, config)
    other = load_tokenizer(teacher)
    if tokenizer.backend_tokenizer.to_str() != other.backend_tokenizer.to_str():
        raise InputError(f"{student} and {teacher} have different tokenizers: distillation compares token by token")
    config, grad_accum_steps = split_step(config)
    length = network.config.max_position_embeddings
    rows, mixture = load_rows(config, tokenizer, length)
    trainer = DistillationTrainer(
        model=network,
        teacher_model=load_chat_model(teacher, config, tokenizer),
        args=GKDConfig(
            **trainer_arguments(config, output) | {"eval_strategy": "no"},
            gradient_accumulation_steps=grad_accum_steps,
            max_length=None,
            **{name: getattr(config, name) for name in ("lmbda", "beta", "temperature", "max_new_tokens")},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        stage=config,
        source=student,
        sample=rollout(stages.engine, config, tokenizer),
    )
    trainer.train_with_resume({"data": fingerprint(rows), "teacher": model_fingerprint(teacher) or teacher})
    trainer.save_stage(record, mixture=mixture.summary(), skipped_rows=mixture.skipped)


def main() -> None:
    parser = Parser(__doc__)
    parser.option("config", Place, help="YAML of these keys, for example recipes/cpu-demo/distill.yaml")
    parser.option("--student", Place, required=True, help="folder or Hub id of the chat model to train")
    parser.option("--teacher", Place, required=True, help="that of a better one with the same tokenizer")
    parser.option("--run-dir", Dir, required=True, help="run folder, whose stage sft will be the result")
    parser.add_keys(DistillConfig)
    keys = vars(parser.parse_args())
    path, student, teacher, run_dir = (keys.pop(name) for name in ("config", "student", "teacher", "run_dir"))
    config = parse_config(DistillConfig, path, keys)
    if config.packing or config.compile or config.validation or config.chatcore_every > 0:
        raise InputError("distillation has no packing, compile, validation and chatcore_every: leave them out")
    with working("distill", run_dir, None) as run:
        folder = stages.new_folder(run, "sft")
        distill(config, student, teacher, folder)
        stages.show_result(folder)


if __name__ == "__main__":
    guarded(main)
