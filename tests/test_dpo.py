"""DPO: pairs from a file, which tokens are compared, the paper's loss, and what a run leaves behind."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nanochat_hf import cli, stages
from nanochat_hf.data.transforms import BadRow
from nanochat_hf.errors import InputError
from nanochat_hf.run import Run, load_json, start_record, write_metrics
from nanochat_hf.stage_configs import EvalConfig, PretrainConfig
from nanochat_hf.train import dpo
from nanochat_hf.train.dpo import DPOStageConfig, load_pairs, mask_completions, read_pair, train_dpo

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

USER, REPLY = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}
OTHER = {**REPLY, "content": "no"}


@pytest.fixture
def config(tmp_path) -> DPOStageConfig:
    """Forty pairs, `yes` is better than `no`, and a row that is too long."""
    prompts = [{"role": "user", "content": f"Is it {number}?"} for number in range(40)]
    rows = [{"prompt": [prompt], "chosen": [REPLY], "rejected": [OTHER]} for prompt in prompts]
    rows.append({**rows[0], "chosen": [{**REPLY, "content": "word " * 200}]})
    keys = {"examples_per_step": 8, "device_batch_size": 8, "num_eval_pairs": 8, "num_iterations": 6}
    config = DPOStageConfig(dataset=str(tmp_path / "pairs.jsonl"), init_lr_frac=0.1, **keys)
    write_pairs(config, rows)
    return config


def write_pairs(config, rows):
    Path(config.dataset).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_are_split_and_rows_that_cannot_be_used_are_named(config, tokenizer, capsys):
    train, held_out, skipped = load_pairs(config, tokenizer, 64)
    assert "prompt" not in capsys.readouterr().err
    assert (len(train), len(held_out)) == (32, 8)
    texts = [{row["prompt"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 40
    again, other = (load_pairs(replace(config, seed=seed), tokenizer, 64)[0] for seed in (config.seed, 1))
    assert again.to_list() == train.to_list() != other.to_list()
    assert [row["row"] for row in skipped] == [40] and "a sequence holds 64" in skipped[0]["reason"]
    few = "has 40 pairs.*=40: lower it; row 40"
    step = "leaves 32 training pairs: lower examples_per_step"
    errors = [
        ({"on_bad_example": "error"}, "row 40 of"),
        ({"num_eval_pairs": 40}, few),
        ({"examples_per_step": 33}, step),
    ]
    for keys, words in errors:
        with pytest.raises(InputError, match=words):
            load_pairs(DPOStageConfig(**asdict(config) | keys), tokenizer, 64)


def test_training_pairs_with_the_prompt_of_a_validation_pair_are_counted(config, tokenizer, capsys):
    write_pairs(config, [{"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}] * 10)
    load_pairs(replace(config, examples_per_step=2), tokenizer, 64)
    assert "[dpo] 2 training pairs have the prompt of a validation pair" in capsys.readouterr().err


@pytest.mark.parametrize("row,reason", [
    ({"text": "x"}, "needs chosen and rejected"),
    ({"chosen": "yes", "rejected": "no"}, "needs chosen and rejected|no messages"),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "same"),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY, USER, REPLY]}, "continues"),
    ({"chosen": [USER, REPLY], "rejected": [{**USER, "content": "Other?"}, OTHER]}, "begin with different messages"),
    *(
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]} | {side: [{**REPLY, "content": text}]}, reason)
        for side in ("chosen", "rejected")
        for text, reason in (("word " * 200, "a sequence holds 64"), (None, "content|text|message"))
    ),
    (None, "no such dataset"),
    ({"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, {**USER, "content": "?"}, REPLY]}, "begin with"),
    ({"prompt": [USER], "chosen": [{**REPLY, "id": 1}], "rejected": [{**REPLY, "id": 2}]}, "completions are the same"),
    ({"prompt": "Another question", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, "its prompt is another text"),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER], "history": [["a", "b"]]}, "history would be left out"),
])  # fmt: skip
def test_a_file_without_pairs_is_named(config, tokenizer, tmp_path, row, reason):
    config.dataset = str(tmp_path / "other.jsonl")
    if row:
        (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=reason):
        load_pairs(config, tokenizer, 64)
    if row and "content" in reason:
        with pytest.raises(BadRow, match=reason):
            read_pair(row, tokenizer, 64)


def test_a_pair_is_cut_where_its_conversations_differ(tokenizer):
    expected = {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}
    row = {"prompt": "Is it?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    assert read_pair(row, tokenizer, 64) == expected
    row = {"chosen": [{**USER, "id": 1}, REPLY], "rejected": [{**USER, "id": 2}, OTHER]}
    assert read_pair(row, tokenizer, 64)["chosen"] == [REPLY]
    longer = {"prompt": [USER], "chosen": [REPLY, USER, REPLY], "rejected": [REPLY, USER, OTHER]}
    assert read_pair(longer, tokenizer, 64)["prompt"] == [USER, REPLY, USER]
    system = {"role": "system", "content": "Be brief."}
    for beside in ({"prompt": [USER]}, {"prompt": None, "chosen": [USER, REPLY], "rejected": [USER, OTHER]}):
        row = expected | beside | {"system": "Be brief."}  # as some datasets have it
        assert read_pair(row, tokenizer, 64) == expected | {"prompt": [system, USER]}
    size = len(tokenizer.apply_chat_template([USER, REPLY], return_dict=False))
    assert read_pair(expected, tokenizer, size) == expected  # `yes` and `no` are equally long or shorter
    with pytest.raises(BadRow, match=f"{size} tokens"):
        read_pair(expected, tokenizer, size - 1)


def test_the_loss_is_on_what_the_assistant_says(tokenizer):
    call = [{"type": "function", "function": {"name": "python", "arguments": '{"expression": "1+1"}'}}]
    chosen = [
        {"role": "assistant", "content": "So 😊", "tool_calls": call}, {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two 好"}, {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes é"},
    ]  # fmt: skip
    earlier = [USER, REPLY, USER]  # what was said before is not learned again
    row = read_pair({"prompt": earlier, "chosen": chosen, "rejected": [REPLY]}, tokenizer, 200)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = {"prompt_ids": prompt}
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        ids[f"{side}_ids"] = whole[len(prompt) :]
    batch = mask_completions(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), tokenizer, [ids])
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert texts[0] == "So 😊<|python_start|>1+1<|python_end|>Two 好<|assistant_end|>Yes é<|assistant_end|>"
    assert texts[1] == "yes<|assistant_end|>"


@pytest.mark.parametrize("rank", [0, 4])
def test_the_chosen_completion_becomes_likelier(tiny_folder, config, tmp_path, monkeypatch, rank):
    calls = []
    monkeypatch.setattr(dpo, "mask_completions", lambda *args: (calls.append(1), mask_completions(*args))[1])
    config.lora_r, config.lora_lr, config.init_lr_frac = rank, 0.02, 1.0 if rank else 0.1
    train_dpo(config, tiny_folder, tmp_path / "dpo")
    metrics = load_json(tmp_path / "dpo" / "metrics.json")
    assert metrics["before"]["margin"] == 0 and metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["after"]["accuracy"] == 1.0 and metrics["after"]["margin"] > 0.01
    assert metrics["finished"] and metrics["rows"] == 32 and metrics["bad"] == len(metrics["skipped_rows"]) == 1
    assert len(metrics["history"]) == metrics["num_iterations"] == 6 and metrics["tokens_per_second"] > 0
    assert metrics["num_epochs"] == 6 * config.examples_per_step / metrics["rows"]
    assert len(calls) > 6 and AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")


def test_an_evaluation_is_a_mean_over_pairs_whatever_the_micro_batch(tiny_folder, config, tmp_path):
    rows, rng = [json.loads(line) for line in Path(config.dataset).read_text().splitlines()][:40], Random(0)
    for row in rows:
        row["chosen"][0]["content"], row["rejected"][0]["content"] = rng.sample(["yes", "no", "red owl", "three"], 2)
    write_pairs(config, rows)
    results = []
    for size in (4, 10):  # ten pairs as 4 + 4 + 2, and as one batch
        few = {"num_eval_pairs": 10, "device_batch_size": size, "examples_per_step": 20, "num_iterations": 1}
        train_dpo(replace(config, **few), tiny_folder, tmp_path / str(size))
        results.append(load_json(tmp_path / str(size) / "metrics.json")["after"])
    assert 0 < results[1]["accuracy"] < 1 and results[0] == pytest.approx(results[1], rel=1e-4)


def test_the_loss_is_that_of_the_papers_formula_with_the_configs_beta(tiny_folder, config, tmp_path):
    """-log sigmoid(beta x (log-ratio of chosen - log-ratio of rejected)); margins are beta x that difference."""
    results = {}
    for beta in (0.1, 0.5):
        config.beta, config.num_iterations = beta, 1
        train_dpo(config, tiny_folder, tmp_path / str(beta))
        results[beta] = load_json(tmp_path / str(beta) / "metrics.json")["after"]
    # One step of normalized updates moves the weights alike, so the margins are as the betas.
    assert results[0.5]["margin"] == pytest.approx(5 * results[0.1]["margin"], rel=0.05)
    for after in results.values():  # all pairs are alike: the mean of the loss is nearly the loss of the mean
        assert after["loss"] == pytest.approx(math.log1p(math.exp(-after["margin"])), rel=0.01)


def test_dpo_is_a_stage_like_the_others(tiny_folder, config, tmp_path):
    """Trained after the newest stage, evaluated, in the report, pushed."""
    run, words = Run(tmp_path / "run"), ["--run-dir", str(tmp_path / "run")]
    shutil.copytree(tiny_folder, run.folder("rl"))
    write_metrics(run.folder("rl"), start_record(config))
    stages.run_stages(run, ["dpo"], {"base": PretrainConfig(), "dpo": config})
    few = {"tasks": ["nanochat_demo_facts"], "max_per_task": 2, "max_new_tokens": 4, "bpb_tokens": 512}
    stages.run_eval(EvalConfig(**few), run, ["dpo"])
    results = run.metrics("eval")["results"]
    assert set(results) == {"dpo"} and {"val_bpb", "facts"} <= set(results["dpo"])
    cli.dispatch("report", words)
    assert "**DPO**" in (run.path / "report.md").read_text()
    cli.dispatch("push", [*words, "--repo", "me/x", "--stage", "dpo", "--dry-run"])
    card = (run.path / "hub" / "dpo" / "README.md").read_text()
    assert "stage: DPO" in card and "- dpo\n" in card and "name: facts" in card and "| DPO " in card
    with pytest.raises(InputError, match=r"stage 'sft' of .* is not finished; finished: rl, dpo"):
        cli.dispatch("serve", [*words, "--stage", "sft"])
