"""RL practises on checkable questions, its gradient is REINFORCE's with a baseline, and it learns."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from nanochat_hf.errors import InputError
from nanochat_hf.eval.generation import Generator
from nanochat_hf.run import load_json
from nanochat_hf.tools import python
from nanochat_hf.train.grpo import RLConfig, RLTrainer, grpo_arguments, questions, rollout, train_rl
from nanochat_hf.train.sft import ChatConfig, train_chat
from nanochat_hf.train.trainer import load_model

KEYS = {"dataset": "primer:problem", "examples_per_step": 2, "num_samples": 4, "device_batch_size": 8}
KEYS |= {"max_new_tokens": 12, "eval_examples": 6, "eval_samples": 2, "num_iterations": 2}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.fixture
def source(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return str(tmp_path / "sft")


def config(**keys) -> RLConfig:
    return RLConfig(**{**KEYS, **keys})


def new_trainer(source, tokenizer, tmp_path, made=None) -> RLTrainer:
    made = made or config()
    model = load_model(source, made, tokenizer)
    model.lm_head.weight.data.normal_(std=0.05)  # a fresh head is all but zero: every token would be alike
    rows = Dataset.from_list(questions(made, "test"))
    return RLTrainer(
        model=model, args=grpo_arguments(made, tmp_path / "rl"), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, tools=[python], stage=made, samples=tmp_path / "samples.jsonl",
    )  # fmt: skip


def graded_batch(trainer) -> dict:
    """Answers to two questions, of which some of the first's are right and all of the second's are wrong."""
    torch.manual_seed(0)
    size = trainer.model.config.num_tokens
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[0, 4:] = mask[5, 3:] = 0
    return {
        "prompt_ids": torch.randint(size, (8, 5)),
        "prompt_mask": torch.ones(8, 5, dtype=torch.long),
        "completion_ids": torch.randint(size, (8, 6)),
        "completion_mask": mask,
        "advantages": rewards - rewards.view(2, 4).mean(1).repeat_interleave(4),
        "num_items_in_batch": mask.sum(),
    }


def test_primer_questions_come_with_what_a_grader_needs():
    made = config(dataset="primer:problem+spelling", eval_examples=30)
    rows, test = questions(made, "train"), questions(made, "test")
    assert {row["kind"] for row in rows} == {row["kind"] for row in test} == {"problem", "spelling"} and len(
        test
    ) == 60
    assert (
        rows[0].keys() == {"prompt", "kind", "answer", "entity", "rivals"} and rows[0]["prompt"][0]["role"] == "user"
    )
    assert not {row["prompt"][0]["content"] for row in rows} & {row["prompt"][0]["content"] for row in test}


def test_gsm8k_questions_are_read_from_the_file_of_the_split(tmp_path):
    for split, result in (("train", 7), ("test", 1200)):
        row = {"question": f"{split}?", "answer": f"It is <<1+6=7>>7.\n#### {result:,}"}
        (tmp_path / f"gsm_{split}.jsonl").write_text(json.dumps(row) + "\n")
    made = config(dataset=str(tmp_path / "gsm_{split}.jsonl"))
    assert [
        (r["prompt"][0]["content"], r["answer"], r["kind"]) for r in questions(made, "train") + questions(made, "test")
    ] == [
        ("train?", "7", "gsm8k"),
        ("test?", "1200", "gsm8k"),
    ]


def test_answers_that_cannot_be_shared_out_are_refused(tmp_path):
    with pytest.raises(InputError, match="8 answers a step cannot be cut into batches"):
        grpo_arguments(config(device_batch_size=3), tmp_path)
    assert grpo_arguments(config(device_batch_size=2), tmp_path).gradient_accumulation_steps == 4


def test_the_gradient_is_reinforce_with_the_mean_as_baseline(source, tokenizer, tmp_path):
    trainer = new_trainer(source, tokenizer, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    model, batch = trainer.model.train(), graded_batch(trainer)
    trainer.compute_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, 4:, 0]
    chosen = logp * batch["completion_mask"] * batch["advantages"][:, None]
    (-chosen.sum() / batch["completion_mask"].sum()).backward()
    assert len(found) == sum(p.grad is not None for p in model.parameters()) > 10
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_rows_without_advantage_are_left_out_and_nothing_changes(source, tokenizer, tmp_path, monkeypatch):
    trainer = new_trainer(source, tokenizer, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    sizes, real = [], GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer,
        "_compute_loss",
        lambda self, model, x: (sizes.append(len(x["advantages"])), real(self, model, x))[1],
    )
    model, batch = trainer.model.train(), graded_batch(trainer)
    losses = [trainer.compute_loss(model, batch), GRPOTrainer.compute_loss(trainer, model, batch)]
    assert sizes == [4, 8] and losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)
    batch["advantages"] = torch.zeros(8)
    trainer.compute_loss(model, batch).backward()  # every rank has a backward pass, even when nothing is to be learned
    assert sizes[-1] == 1


def test_tool_results_in_an_engines_answers_are_not_trained_on(tokenizer):
    said = "<|python_start|>2+3<|python_end|>", "<|output_start|>5<|output_end|>", "2 + 3 = 5<|assistant_end|>"
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in said]

    class Engine:
        refreshed = 0

        def __init__(self, model, tokenizer):
            assert not model.training

        def refresh(self):
            Engine.refreshed += 1

        def generate(self, prompts, **options):
            assert options["max_new_tokens"] == 12 and options["temperature"] == 1.0
            return [[[*ids[0], *ids[1], *ids[2]]] for _ in prompts]

    class Stub:  # what a rollout reads of its trainer
        model = torch.nn.Linear(1, 1)
        accelerator = type("A", (), {"unwrap_model": staticmethod(lambda model: model)})
        args = type("B", (), {"seed": 0, "world_size": 1, "process_index": 0})
        state = type("C", (), {"global_step": 3})

    generate, prompt = rollout(Engine, config(), tokenizer), [{"role": "user", "content": "What is 2 + 3?"}]
    for times in (0, 1):
        out = generate([prompt, prompt], Stub())
        assert Engine.refreshed == times and Stub.model.training
    assert out["env_mask"][0] == [1] * len(ids[0]) + [0] * len(ids[1]) + [1] * len(ids[2])
    assert tokenizer.decode(out["prompt_ids"][0]).endswith("<|user_end|><|assistant_start|>")


@pytest.mark.parametrize("engine", [None, Generator])
def test_a_run_leaves_a_model_its_figures_and_samples(source, tmp_path, engine):
    out = tmp_path / "rl"
    train_rl(config(save_every=1), source, out, engine=engine)
    metrics = load_json(out / "metrics.json")
    assert metrics["finished"] and metrics["task"] == "primer:problem" and 0 < metrics["generation_share"] < 1
    assert metrics["before"].keys() == metrics["after"].keys() == {"pass@1", "pass@2", "questions"}
    assert [row["step"] for row in metrics["history"] if "reward" in row] == [1, 2]
    assert all(
        0 <= row["reward"] <= 1 and row["completion_length"] > 0 for row in metrics["history"] if "reward" in row
    )
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and samples[0].keys() == {"step", "prompt", "text", "reward"}
    assert not (out / "state").exists() and AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, Generator])
def test_a_model_that_guesses_learns_what_is_rewarded(source, tmp_path, engine):
    """SFT teaches to answer one of four numbers, equally often; RL is told which of them is right."""
    choices = [f"It is so.\n#### {number}" for number in (1, 2, 3, 4)]
    chats = [
        [{"role": "user", "content": "Pick one."}, {"role": "assistant", "content": choices[i % 4]}]
        for i in range(256)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for split in ("train", "test"):
        row = {"question": "Pick one.", "answer": choices[2]}
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * (64 if split == "train" else 1))
    sft = ChatConfig(mixture=[{"dataset": str(tmp_path / "chats.jsonl")}], device_batch_size=4, num_iterations=60)
    train_chat(sft, source, tmp_path / "guesses")
    rl = config(dataset=str(tmp_path / "{split}.jsonl"), num_iterations=12, num_samples=16, device_batch_size=32)
    rl.eval_samples, rl.max_new_tokens, rl.init_lr_frac = 64, 24, 0.2
    train_rl(rl, str(tmp_path / "guesses"), tmp_path / "rl", engine=engine)
    metrics = load_json(tmp_path / "rl" / "metrics.json")
    assert metrics["before"]["pass@1"] < 0.45 and metrics["after"]["pass@1"] > 0.65
