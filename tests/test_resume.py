"""Interrupted stages: whatever stops base, SFT, RL or DPO, and wherever, nothing is lost and nothing is made twice."""

import dataclasses
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrain import run as run_base
from test_pretrain import world  # noqa: F401  (a fixture)
from transformers import Trainer

from nanochat_hf.data.tokenizer import load_tokenizer, train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.run import Run, load_json, model_fingerprint
from nanochat_hf.train import pretrain, sft, trainer
from nanochat_hf.train.checkpoint import complete_checkpoints, damage
from nanochat_hf.train.dpo import DPOStageConfig, PreferenceTrainer, train_preference
from nanochat_hf.train.grpo import RLConfig, RLTrainer, train_rl
from nanochat_hf.train.model_setup import read_model
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SFT = ChatConfig(
    mixture=[{"dataset": "primer", "rows": 60}], validation=[{"dataset": "primer", "split": "test", "rows": 8}],
    device_batch_size=4, num_iterations=4, save_every=2, eval_every=2,
)  # fmt: skip
RL = RLConfig(
    dataset="primer:problem", examples_per_step=2, num_samples=4, device_batch_size=8, max_new_tokens=12,
    eval_examples=6, eval_samples=2, num_iterations=4, save_every=2, eval_every=2,
)  # fmt: skip
TRAINERS = {"sft": ChatTrainer, "rl": RLTrainer, "dpo": PreferenceTrainer}


@pytest.fixture
def train(tiny_folder, tmp_path):
    """(stage, output, **changes of its config) -> None: train a chat stage from the tiny model."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Is it {i}?"}], "chosen": answer("yes"), "rejected": answer("no")}
        for i in range(24)
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    keys = {
        "dataset": str(pairs),
        "examples_per_step": 4,
        "device_batch_size": 4,
        "num_eval_pairs": 8,
        "num_iterations": 4,
    }
    dpo = DPOStageConfig(**keys, save_every=2, eval_every=2)

    def train(stage: str, output: Path, model: Path = tiny_folder, **changes) -> None:
        if stage == "sft":
            chatcore = changes.pop("chatcore", None)
            train_chat(dataclasses.replace(SFT, **changes), str(model), output, chatcore)
        elif stage == "rl":
            train_rl(dataclasses.replace(RL, **changes), str(model), output, engine=Generator)
        else:
            train_preference(dataclasses.replace(dpo, **changes), str(model), output)

    return train


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(word: str, number: int = 40) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"Say it {i}"}, *answer(word)]} for i in range(number)]


def fail(monkeypatch, owner, name: str, error: BaseException, when=lambda *args: True):
    """`owner.name` raises `error` the first time that when(*its arguments)."""
    real, raised = getattr(owner, name), []

    def method(*args, **kwargs):
        if not raised and when(*args):
            raised.append(1)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def after(step: int):
    return lambda trainer, *_: trainer.state.global_step == step


def result(folder: Path) -> tuple:
    """What must be the same in a run without a stop: history without times, figures of the ends, weights."""
    metrics = load_json(folder / "metrics.json")
    history = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in metrics["history"]]
    ends = {key: metrics.get(key) for key in ("val_loss", "before", "after", "val_bpb")}
    return history, ends, {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


def slowly(*cases) -> list:
    """Parameters of tests that only `make test-slow` runs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


PLACES = ["closing evaluation", "evaluation on the way", "evaluation after the last step", "model folder", "metrics"]


# --- stops, by stage and place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage,place",
    [
        ("sft", "evaluation on the way"),
        ("rl", "closing evaluation"),
        *slowly(*((stage, place) for stage in TRAINERS for place in PLACES)),
    ],
)
def test_a_stop_anywhere_changes_nothing(train, tmp_path, monkeypatch, stage, place):
    train(stage, tmp_path / "whole")
    with monkeypatch.context() as patch:
        owner, name, when = {
            "closing evaluation": (
                TRAINERS[stage],
                "evaluate",
                lambda *_: len(list(tmp_path.glob("stopped/state/*-4/measured.json"))) > 0,
            ),
            "evaluation after the last step": (TRAINERS[stage], "evaluate", after(4)),
            "evaluation on the way": (TRAINERS[stage], "evaluate", after(2)),
            "model folder": (trainer, "save_model", lambda *_: True),  # custom_generate is there by then
            "metrics": (trainer, "write_metrics", lambda *_: True),
        }[place]
        fail(patch, owner, name, KeyboardInterrupt(), when)
        with pytest.raises(KeyboardInterrupt):
            train(stage, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    steps, real = [], TRAINERS[stage].training_step
    with monkeypatch.context() as patch:
        patch.setattr(TRAINERS[stage], "training_step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
        train(stage, tmp_path / "stopped")
    assert len(steps) == (2 if place == "evaluation on the way" else 0), "no step is made twice, or one too many"
    whole, stopped = result(tmp_path / "whole"), result(tmp_path / "stopped")
    assert whole == stopped
    if stage == "rl":
        one, other = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "stopped"))
        assert one == other


@pytest.mark.parametrize("stage,save_every", [("sft", -1), *slowly(("sft", 2), ("rl", 2), ("rl", -1), ("dpo", -1))])
def test_a_failing_evaluation_costs_no_training(train, tmp_path, monkeypatch, stage, save_every):
    for step in (2, 4):
        with monkeypatch.context() as patch:
            fail(patch, TRAINERS[stage], "evaluate", torch.OutOfMemoryError("out of memory"), after(step))
            with pytest.raises(torch.OutOfMemoryError):
                train(stage, tmp_path / "out", save_every=save_every)
        assert complete_checkpoints(tmp_path / "out" / "state")[-1].name == f"checkpoint-{step}"
    train(stage, tmp_path / "out", save_every=save_every)
    assert [row["step"] for row in load_json(tmp_path / "out" / "metrics.json")["history"]] == [1, 2, 3, 4]


def test_a_failing_chatcore_costs_no_training(train, tmp_path):
    def broken(model, questions):
        raise InputError("arc_easy_test.jsonl, line 7: not JSON")

    with pytest.raises(InputError, match="line 7"):
        train("sft", tmp_path / "out", chatcore=broken, chatcore_every=3, save_every=-1)
    assert complete_checkpoints(tmp_path / "out" / "state")[-1].name == "checkpoint-3"


@pytest.mark.parametrize("step,save_every", [(20, -1), *slowly((6, -1), (6, 6), (20, 6))])
def test_a_failing_core_costs_no_pretraining(world, tmp_path, step, save_every):  # noqa: F811
    calls = []

    def core(model, limit):
        calls.append(1)
        if len(calls) == {6: 1, 20: 4}[step]:
            raise InputError("copa.jsonl, line 1: not JSON")
        return 0.1

    def run(folder, core):
        keys = {"core_metric_every": 6, "save_every": save_every}
        return run_base(world, tmp_path / folder, core=core, **keys)

    with pytest.raises(InputError, match="line 1"):
        run("out", core)
    assert [path.name for path in (tmp_path / "out" / "state").glob("step_*")][-1] == f"step_{step:06d}"
    run("out", lambda model, limit: 0.1)
    run("whole", lambda model, limit: 0.1)
    assert result(tmp_path / "whole") == result(tmp_path / "out")


# --- other inputs under a half-done stage ------------------------------------------------------------------------


@pytest.fixture
def half_done(train, tmp_path, monkeypatch):
    """An SFT that was stopped after its checkpoints of steps 2 and 3, on the conversations of chats.jsonl."""
    write_rows(tmp_path / "chats.jsonl", chats("alpha"))
    keys = {"mixture": [{"dataset": str(tmp_path / "chats.jsonl")}], "save_every": 1, "validation": []}
    with monkeypatch.context() as patch:
        fail(patch, ChatTrainer, "training_step", KeyboardInterrupt(), after(3))
        with pytest.raises(KeyboardInterrupt):
            train("sft", tmp_path / "out", **keys)
    return lambda **changes: train("sft", tmp_path / "out", **keys | changes)


def test_a_half_done_stage_refuses_other_data_and_another_model(half_done, tiny_folder, tmp_path):
    write_rows(tmp_path / "chats.jsonl", chats("gamma"))  # as many bytes
    with pytest.raises(InputError, match=r"written by another recipe or launch \(data:"):
        half_done()
    write_rows(tmp_path / "chats.jsonl", chats("alpha"))
    weights = load_file(tiny_folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"written by another recipe or launch \(model:"):
        half_done()


@pytest.mark.parametrize("stage", ["rl", "dpo"])
def test_half_done_rl_and_dpo_refuse_another_model(train, tiny_folder, tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patch:
        fail(patch, TRAINERS[stage], "training_step", KeyboardInterrupt(), after(3))
        with pytest.raises(KeyboardInterrupt):
            train(stage, tmp_path / "out")
    weights = load_file(tiny_folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"written by another recipe or launch \(model:"):
        train(stage, tmp_path / "out")


def test_a_half_done_base_refuses_another_tokenizer(world, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="stop"):
        run_base(world, tmp_path / "out", save_every=5, core=stop_core, core_metric_every=7)
    texts = [json.loads(line)["text"].upper() for line in (world / "text.jsonl").read_text().splitlines()]
    other = tmp_path / "other"
    train_bpe(iter(texts), vocab_size=len(load_tokenizer(world / "tokenizer"))).save_pretrained(other)
    config = dataclasses.replace(module_config(world), save_every=5)
    with pytest.raises(InputError, match="trained with other tokenizer than given now"):
        pretrain.pretrain(config, str(other), tmp_path / "out")


def stop_core(model, limit):
    raise InputError("stop")


def module_config(world):  # noqa: F811
    from test_pretrain import TINY

    return dataclasses.replace(TINY, dataset=str(world / "text.jsonl"))


def test_a_half_done_stage_refuses_other_validation_data(train, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "val.jsonl", chats("alpha", 8))
    keys = {"validation": [{"dataset": str(path)}], "save_every": 1}
    with monkeypatch.context() as patch:
        fail(patch, ChatTrainer, "training_step", KeyboardInterrupt(), after(3))
        with pytest.raises(KeyboardInterrupt):
            train("sft", tmp_path / "out", **keys)
    write_rows(path, chats("gamma", 8))
    with pytest.raises(InputError, match=r"written by another recipe or launch \(validation data:"):
        train("sft", tmp_path / "out", **keys)


def test_intervals_may_change_at_a_stop_and_are_then_obeyed(half_done, tmp_path):
    keys = {"validation": [{"dataset": "primer", "split": "test", "rows": 8}], "eval_every": 1, "num_iterations": 4}
    with pytest.raises(InputError, match="validation"):
        half_done(**keys)
    half_done(save_every=100, keep_checkpoints=5, eval_every=100)
    assert load_json(tmp_path / "out" / "metrics.json")["finished"]


def test_a_half_done_stage_of_an_older_version_says_what_is_not_verified(half_done, tmp_path, capsys):
    path = tmp_path / "out" / "state" / "config.json"
    settings = load_json(path)
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("model", "data")}))
    half_done()
    assert "not verified" in capsys.readouterr().out


def test_momenta_of_an_earlier_or_a_damaged_file_are_not_taken(world, train, tmp_path):  # noqa: F811
    run_base(world, tmp_path / "base", save_optimizer=True)
    base = tmp_path / "base"
    flip_byte(base / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer\.pt is not what its stage wrote"):
        train("sft", tmp_path / "out", model=base)
    (base / "metrics.json").unlink()
    run_base(world, base, seed=1)
    assert not (base / "optimizer.pt").exists()


def test_what_changed_in_a_half_done_base_stands_in_its_metrics(world, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="stop"):
        run_base(world, tmp_path / "out", save_every=5, core=stop_core, core_metric_every=7)
    metrics = run_base(world, tmp_path / "out", matrix_lr=0.3)
    [change] = metrics["changes"]
    assert change["after step"] == 7 and any("matrix_lr: 0.6 -> 0.3" in words for words in change["keys"])


CHANGES = {
    "mixture": {"mixture": [{"dataset": "primer", "rows": 30}]},
    "order": {"seed": 1},
    "length": {"max_seq_len": 64},
    "mask": {"assistant_only_loss": False},
    "packing": {"packing": False},
    "bad rows": {"on_bad_example": "error"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_made_for_another_config_are_made_again(tokenizer, tmp_path, change):
    def rows(config, folder):
        return sft.build_packed_dataset(config, config.mixture, tokenizer, config.max_seq_len, folder)[0].to_list()

    first = dataclasses.replace(SFT, max_seq_len=128)
    changed = dataclasses.replace(first, **CHANGES[change])
    before = rows(first, tmp_path / "rows")
    assert rows(changed, tmp_path / "rows") == rows(changed, tmp_path / "fresh")
    assert rows(first, tmp_path / "rows") == before


def test_rows_of_other_text_tokenizer_or_code_and_damaged_ones_are_made_again(tokenizer, tmp_path, monkeypatch):
    path, config = (
        tmp_path / "chats.jsonl",
        dataclasses.replace(SFT, mixture=[{"dataset": str(tmp_path / "chats.jsonl")}]),
    )

    def text(tokenizer=tokenizer) -> str:
        rows = sft.build_packed_dataset(config, config.mixture, tokenizer, 128, tmp_path / "rows")[0]
        return tokenizer.decode(rows[0]["input_ids"])

    write_rows(path, chats("alpha"))
    assert "alpha" in text()
    write_rows(path, chats("gamma"))
    assert "gamma" in text() and "alpha" not in text()
    other = train_bpe(iter(["say it gamma " * 50]), vocab_size=300)
    assert "gamma" in text(other)
    assert "gamma" in text()
    arrow = next((tmp_path / "rows").glob("*.arrow"))
    flip_byte(arrow)
    assert damage(tmp_path / "rows") and "gamma" in text() and damage(tmp_path / "rows") is None
    made = (tmp_path / "rows" / "made.json").read_text()
    monkeypatch.setattr(sft, "code_version", lambda: "newer")
    assert "gamma" in text() and (tmp_path / "rows" / "made.json").read_text() != made


# --- damaged state ------------------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
HARM = {
    "a flipped bit": flip_byte,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize(
    "file,harm",
    [*zip(FILES[:2], HARM), *slowly(*((file, harm) for file in FILES for harm in HARM))],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(half_done, tmp_path, capsys, file, harm):
    state = tmp_path / "out" / "state"
    assert [path.name for path in complete_checkpoints(state)] == ["checkpoint-2", "checkpoint-3"]  # two by default
    HARM[harm](state / "checkpoint-3" / file)
    content = {path.name: path.read_bytes() for path in (state / "checkpoint-3").iterdir()}
    seen = {}

    def look(trainer, *_):
        seen.update({path.name: path.read_bytes() for path in (state / "damaged_checkpoint-3").iterdir()})
        return False

    with pytest.MonkeyPatch.context() as patch:
        fail(patch, ChatTrainer, "training_step", KeyboardInterrupt(), look)
        half_done()
    assert f"checkpoint-3/{file}" in capsys.readouterr().out and seen == content
    assert [row["step"] for row in load_json(tmp_path / "out" / "metrics.json")["history"]] == [1, 2, 3, 4]


def test_without_any_intact_checkpoint_the_stage_is_refused_and_nothing_is_deleted(half_done, tmp_path):
    state = tmp_path / "out" / "state"
    for number in (2, 3):
        flip_byte(state / f"checkpoint-{number}" / "optimizer.pt")
    for _ in range(2):
        with pytest.raises(InputError, match=r"checkpoint-3/optimizer.pt is damaged.*bring that file back"):
            half_done()
        assert [path.name for path in complete_checkpoints(state)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_of_an_older_version_without_a_file_is_refused(half_done, tmp_path, file):
    for mark in (tmp_path / "out" / "state").glob("checkpoint-*/complete"):
        mark.write_bytes(b"")  # as the mark was before it was a manifest
    (tmp_path / "out" / "state" / "checkpoint-3" / file).unlink()
    with pytest.raises(InputError, match=f"checkpoint-3/{file} is missing"):
        half_done()


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", None])
def test_damaged_settings_of_a_half_done_stage_are_one_line(half_done, tmp_path, content):
    path = tmp_path / "out" / "state" / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is (not valid JSON|missing)"):
        half_done()


BASE_FILES = ["model.pt", "rank_00000.pt", "progress.pt"]


@pytest.mark.parametrize(
    "file,harm",
    [
        ("rank_00000.pt", "a flipped bit"),
        *slowly(
            ("manifest.json", "empty"),
            ("manifest.json", "cut"),
            *((file, harm) for file in BASE_FILES for harm in HARM),
        ),
    ],
)
def test_a_damaged_checkpoint_of_base_is_set_aside(world, tmp_path, capsys, file, harm):  # noqa: F811
    keys = {"save_every": 5, "num_iterations": 20}
    whole = run_base(world, tmp_path / "whole", **keys)
    with pytest.raises(InputError, match="stop"):
        run_base(world, tmp_path / "out", core=stop_core, core_metric_every=12, **keys)
    state = tmp_path / "out" / "state"
    newest = max(state.glob("step_*"))
    HARM[harm](newest / file)
    again = run_base(world, tmp_path / "out", **keys)
    assert f"{newest.name}/{file}" in capsys.readouterr().out
    assert [row["train_loss"] for row in again["history"]] == [row["train_loss"] for row in whole["history"]]


def test_a_source_whose_weights_are_not_those_of_its_metrics_is_refused(train, tiny_folder, tmp_path):
    train("sft", tmp_path / "sft")
    assert load_json(tmp_path / "sft" / "metrics.json")["weights"] == model_fingerprint(tmp_path / "sft")
    read_model(str(tmp_path / "sft"))
    flip_byte(tmp_path / "sft" / "model.safetensors")
    with pytest.raises(InputError, match=r"are not those that its metrics\.json names"):
        train("rl", tmp_path / "rl", model=tmp_path / "sft")
    for harm in ("cut", "empty", "gone"):
        folder = tmp_path / harm
        folder.mkdir()
        for path in tiny_folder.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        HARM[harm](folder / "model.safetensors")
        with pytest.raises(InputError, match="no model in"):
            train("sft", tmp_path / "next", model=folder)


# --- losses and weights that are not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("stage,rank", [("sft", 0), *slowly(("sft", 4), ("rl", 0), ("rl", 4), ("dpo", 0), ("dpo", 4))])
def test_a_step_that_is_not_finite_stops_the_stage_with_the_weights_before_it(
    train, tmp_path, monkeypatch, stage, rank
):
    real = TRAINERS[stage].training_step

    def step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return loss

    keys = {"lora_r": rank, "save_every": -1, "eval_every": -1}
    with monkeypatch.context() as patch:
        patch.setattr(TRAINERS[stage], "training_step", step)
        with pytest.raises(
            FloatingPointError, match=rf"{stage}: the gradients of step 3 are not finite.*checkpoint-3"
        ):
            train(stage, tmp_path / stage, **keys)
    saved = list((tmp_path / stage / "state" / "checkpoint-3").glob("*.safetensors"))
    assert saved and all(value.isfinite().all() for value in load_file(saved[0]).values())
    assert not (tmp_path / stage / "metrics.json").exists()
    train(stage, tmp_path / stage, **keys)  # goes on with the rows after it
    assert load_json(tmp_path / stage / "metrics.json")["finished"]
    text = (tmp_path / stage / "metrics.json").read_text()
    json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize("stage", TRAINERS)
def test_weights_that_are_not_finite_are_refused_before_training(train, tiny_folder, tmp_path, stage):
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.layers.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"values in model\.layers\.0\.mlp\.fc1\.weight that are not finite"):
        train(stage, tmp_path / "out")


def test_a_validation_loss_that_is_not_finite_is_no_result(train, tmp_path, monkeypatch):
    real = Trainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        return real(self, model, inputs, *args, **kwargs) * (1 if model.training else float("nan"))

    monkeypatch.setattr(Trainer, "compute_loss", loss)
    with pytest.raises(FloatingPointError, match=r"the validation loss is nan at step 2.*checkpoint-2"):
        train("sft", tmp_path / "out")


def test_a_run_that_diverged_is_never_finished_by_running_it_again(train, tmp_path):
    """Every rerun would skip one step more, up to the end."""
    keys = {"validation": [], "save_every": 1, "matrix_lr": 1e30, "embedding_lr": 1e30, "eval_every": -1}
    messages = set()
    for _ in range(6):
        with pytest.raises(FloatingPointError) as caught:
            train("sft", tmp_path / "out", **keys)
        messages.add(str(caught.value))
        assert not (tmp_path / "out" / "metrics.json").exists()
        for folder in complete_checkpoints(tmp_path / "out" / "state"):
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    assert len(messages) <= 2 and all("checkpoint" in message for message in messages)


def test_a_skipped_step_is_named_in_the_result(train, tmp_path, monkeypatch):
    real = ChatTrainer.training_step

    def step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            model.lm_head.weight.grad[0, 0] = float("inf")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(ChatTrainer, "training_step", step)
        with pytest.raises(FloatingPointError, match="step 2 are not finite"):
            train("sft", tmp_path / "out")
    train("sft", tmp_path / "out")
    assert load_json(tmp_path / "out" / "metrics.json")["skipped_steps"] == [2]


# --- disk, lock, permissions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", *slowly(("rl",), ("dpo",))])
def test_a_signal_saves_and_the_rerun_changes_nothing(train, tmp_path, monkeypatch, stage):
    train(stage, tmp_path / "whole")
    real = TRAINERS[stage].training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TRAINERS[stage], "training_step", step)
        with pytest.raises(SystemExit) as stopped:
            train(stage, tmp_path / "out", save_every=-1)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert complete_checkpoints(tmp_path / "out" / "state")[-1].name == "checkpoint-3"
    train(stage, tmp_path / "out", save_every=-1)
    assert result(tmp_path / "whole") == result(tmp_path / "out")


def test_what_is_somebody_elses_in_the_state_folder_is_left_alone(half_done, tmp_path):
    state = tmp_path / "out" / "state"
    (state / "checkpoint-3.bak").mkdir()
    (state / "checkpoint-9").write_text("a file")
    elsewhere = tmp_path / "elsewhere"
    (state / "checkpoint-2").rename(elsewhere)
    (state / "checkpoint-2").symlink_to(elsewhere)
    half_done()
    assert elsewhere.is_dir() and load_json(tmp_path / "out" / "metrics.json")["finished"]


def test_a_half_written_line_of_samples_does_not_stop_a_resume(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail(patch, RLTrainer, "training_step", KeyboardInterrupt(), after(3))
        with pytest.raises(KeyboardInterrupt):
            train("rl", tmp_path / "rl")
    samples = tmp_path / "rl" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-20])
    train("rl", tmp_path / "rl")
    assert [json.loads(line)["step"] for line in samples.read_text().splitlines()] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("stage", TRAINERS)
def test_no_steps_is_no_training(train, tmp_path, stage):
    with pytest.raises(InputError, match="num_iterations is 0"):
        train(stage, tmp_path / "out", num_iterations=0)


@pytest.mark.parametrize("stage", ["sft", *slowly(("rl",), ("dpo",))])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(train, tmp_path, monkeypatch, stage):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = TRAINERS[stage]._save_checkpoint

    def save(self, *args):
        if self.state.global_step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes of a file, as on a disk that is full
        try:
            real(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(TRAINERS[stage], "_save_checkpoint", save)
    with pytest.raises(InputError, match=r"cannot write .*checkpoint-4.*the checkpoint before it is .*checkpoint-2"):
        train(stage, tmp_path / "out")
    state = tmp_path / "out" / "state"
    assert [path.name for path in state.glob("checkpoint-*")] == ["checkpoint-2"] and not damage(
        state / "checkpoint-2", "complete"
    )


def test_a_full_disk_in_base_is_one_line_and_the_last_checkpoint_stays(world, tmp_path, monkeypatch):  # noqa: F811
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = pretrain.checkpoint.save

    def save(folder, step, *args):
        if step > 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            return real(folder, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(pretrain.checkpoint, "save", save)
    with pytest.raises(InputError, match=r"cannot write .*the checkpoint before it is .*step_000005"):
        run_base(world, tmp_path / "out", save_every=5)
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["step_000005"]


def test_the_second_process_on_a_run_folder_is_refused(tmp_path):
    second = pytest.raises(InputError, match="another process works on")
    with Run(tmp_path / "run").lock(), second, Run(tmp_path / "run").lock():
        pass
    with Run(tmp_path / "run").lock():
        pass


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), *slowly((0o077, 0o600), (0o002, 0o664))])
def test_weights_get_the_permissions_of_the_umask(train, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        train("sft", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert set(modes.values()) == {mode} and "model.safetensors" in modes


def test_an_old_checkpoint_goes_only_when_the_new_one_is_complete(train, tmp_path, monkeypatch):
    """A kill after transformers has written, and before all ranks have said so, leaves the one before."""
    with monkeypatch.context() as patch:
        fail(patch, trainer, "write_manifest", KeyboardInterrupt(), lambda folder, *_: folder.name == "checkpoint-3")
        with pytest.raises(KeyboardInterrupt):
            train("sft", tmp_path / "out", save_every=1, keep_checkpoints=1)
    assert [path.name for path in complete_checkpoints(tmp_path / "out" / "state")] == ["checkpoint-2"]
    train("sft", tmp_path / "out", save_every=1, keep_checkpoints=1)
    assert [row["step"] for row in load_json(tmp_path / "out" / "metrics.json")["history"]] == [1, 2, 3, 4]


def test_rl_refuses_to_sample_from_another_distribution_than_its_gradient_assumes(train, tmp_path):
    with pytest.raises(InputError, match="top_k is 50, and the gradient is that of sampling among all tokens"):
        train("rl", tmp_path / "out", top_k=50)
