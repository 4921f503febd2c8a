"""DPO: pairs from a file, the better answer becomes likelier, and the reference stays where it was."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from workers import launch

from nanochat_hf.data.transforms import BadRow
from nanochat_hf.errors import InputError
from nanochat_hf.run import load_json, parse_config
from nanochat_hf.train.dpo import DPOStageConfig, pair, pairs, spoken_only, train_preference

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def config(tmp_path) -> DPOStageConfig:
    """Forty pairs: `yes` is better than `no`, whatever is asked."""

    def said(word: str) -> list[dict]:
        return [{"role": "assistant", "content": word}]

    rows = [{"role": "user", "content": f"Is it {number}?"} for number in range(40)]
    rows = [{"prompt": [row], "chosen": said("yes"), "rejected": said("no")} for row in rows]
    rows.append({"prompt": rows[0]["prompt"], "chosen": said("word " * 200), "rejected": said("no")})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "examples_per_step": 8,
        "device_batch_size": 8,
        "num_eval_pairs": 8,
        "num_iterations": 6,
        "init_lr_frac": 0.1,
    }
    return DPOStageConfig(dataset=str(tmp_path / "pairs.jsonl"), **keys)


def test_pairs_that_cannot_be_used_are_named_and_some_are_held_out(config, tokenizer):
    train, test, skipped = pairs(config, tokenizer, 64)
    assert (len(train), len(test)) == (32, 8)
    questions = [{row["prompt"][0]["content"] for row in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    assert [row["row"] for row in skipped] == [40] and "a row holds 64" in skipped[0]["reason"]
    config.on_bad_example = "error"
    with pytest.raises(InputError, match=r"row 40 of .* cannot be used: \d+ tokens"):
        pairs(config, tokenizer, 64)


def test_only_what_the_assistant_says_is_compared(tokenizer):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    call = [{"type": "function", "function": {"name": "python", "arguments": '{"expression": "1+1"}'}}]
    chosen = [
        {"role": "assistant", "content": "So 😊", "tool_calls": call},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two 好"},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes é"},
    ]
    row = pair({"prompt": [USER], "chosen": chosen, "rejected": [REPLY]}, tokenizer, 200)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = {"prompt_ids": prompt}
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        ids[f"{side}_ids"] = whole[len(prompt) :]
    batch = spoken_only(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), tokenizer, [ids])
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert texts[0] == "So 😊<|python_start|>1+1<|python_end|>Two 好<|assistant_end|>Yes é<|assistant_end|>"
    assert texts[1] == "yes<|assistant_end|>"


USER, REPLY = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"text": "x"}, "needs chosen and rejected"),
        ({"chosen": "yes", "rejected": "no"}, "needs chosen and rejected|no messages"),
        ({"prompt": [USER], "chosen": [], "rejected": []}, "last message"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "same"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY, USER, REPLY]}, "goes on"),
        (None, "no such dataset"),
    ],
)
def test_a_file_without_pairs_is_named(config, tokenizer, tmp_path, row, reason):
    config.dataset = str(tmp_path / "other.jsonl")
    if row:
        (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=reason):
        pairs(config, tokenizer, 64)


def test_conversations_may_begin_with_their_prompt(tokenizer):
    other = {**REPLY, "content": "no"}
    found = pair({"prompt": "Is it?", "chosen": [USER, REPLY], "rejected": [USER, other]}, tokenizer, 64)
    assert found == {"prompt": [USER], "chosen": [REPLY], "rejected": [other]}


@pytest.mark.parametrize("rank", [0, 4])
def test_the_better_answer_becomes_likelier(tiny_folder, config, tmp_path, rank):
    config.lora_r, config.lora_lr, config.init_lr_frac = rank, 0.02, 1.0 if rank else 0.1
    train_preference(config, tiny_folder, tmp_path / "dpo")
    metrics = load_json(tmp_path / "dpo" / "metrics.json")
    assert metrics["before"]["margin"] == 0 and metrics["before"]["loss"] == pytest.approx(0.693, abs=1e-3)
    assert metrics["after"]["accuracy"] == 1.0 and metrics["after"]["margin"] > 0.01
    assert len(metrics["history"]) == 6 and AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_two_processes_learn_what_one_does(tiny_folder, config, tmp_path, rank):
    config.lora_r, config.device_batch_size = rank, 4
    for number, launch_file in ((1, ""), (2, "multi_gpu")):
        job = {"do": "dpo", "model": tiny_folder, "output": tmp_path / str(number), **asdict(config)}
        assert launch(number, launch_file, [job]).returncode == 0
    one, two = (load_json(tmp_path / name / "metrics.json") for name in ("1", "2"))
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in two["history"]] == pytest.approx([row[key] for row in one["history"]], abs=1e-5)
    assert two["after"] == pytest.approx(one["after"], abs=1e-5)


def test_the_loss_is_that_of_the_papers_formula_with_the_configs_beta(tiny_folder, config, tmp_path):
    """-log sigmoid(beta x (log-ratio of chosen - log-ratio of rejected)); margins are beta x that difference."""
    losses = {}
    for beta in (0.1, 0.5):
        config.beta, config.num_iterations = beta, 1
        train_preference(config, tiny_folder, tmp_path / str(beta))
        metrics = load_json(tmp_path / str(beta) / "metrics.json")
        losses[beta] = metrics["after"]
        assert metrics["config"]["beta"] == beta
    # One step of normalized updates moves the weights alike, so the margins are as the betas.
    assert losses[0.5]["margin"] == pytest.approx(5 * losses[0.1]["margin"], rel=0.05)
    for found in losses.values():  # all pairs are alike: the mean of the loss is nearly the loss of the mean
        assert found["loss"] == pytest.approx(math.log1p(math.exp(-found["margin"])), rel=0.01)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_either_answer_of_a_pair_that_cannot_be_used_makes_it_a_bad_row(tokenizer, side):
    other = "rejected" if side == "chosen" else "chosen"
    fine = {"prompt": [USER], other: [REPLY]}
    for answer, reason in (("word " * 200, "a row holds 64"), (None, "content|text|message")):
        with pytest.raises(BadRow, match=reason):
            pair({**fine, side: [{"role": "assistant", "content": answer}]}, tokenizer, 64)


def test_the_recipe_is_read_by_the_parser_of_real_runs(tmp_path):
    text = (Path(__file__).parent.parent / "recipes" / "d12" / "dpo.yaml").read_text()
    keys = {"examples_per_step": 48, "beta": 0.25, "num_eval_pairs": 7}
    lines = [line for line in text.splitlines() if line.partition(":")[0] not in keys]
    (tmp_path / "dpo.yaml").write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in keys.items())]))
    config = parse_config(DPOStageConfig, tmp_path / "dpo.yaml", {"save_every": "9"})
    assert {key: getattr(config, key) for key in keys} == keys and config.save_every == 9
