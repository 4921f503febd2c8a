"""Interrupted stages: whatever stops one, no training is lost, no step runs twice, and the result is the same."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutations import mutations
from safetensors.torch import load_file, save_file
from test_optim import OPTIONS
from transformers import Trainer

from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.run import Run, load_json, model_fingerprint, save_json
from nanochat_hf.train import checkpoint, trainer
from nanochat_hf.train.checkpoint import complete_checkpoints, damage
from nanochat_hf.train.dpo import DPOStageConfig, PreferenceTrainer, train_dpo
from nanochat_hf.train.grpo import RLConfig, RLTrainer, train_rl
from nanochat_hf.train.model_setup import read_model
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining, pretrain
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

EVERY_2 = {"num_iterations": 4, "save_every": 2, "eval_every": 2}
CONFIGS = {
    "sft": ChatConfig(
        mixture=[{"dataset": "primer", "rows": 60}], device_batch_size=4, **EVERY_2,
        validation=[{"dataset": "primer", "split": "test", "rows": 8}],
    ),
    "rl": RLConfig(
        dataset="primer:problem", examples_per_step=2, num_samples=4, device_batch_size=8, max_new_tokens=12,
        eval_examples=6, eval_samples=2, **EVERY_2,
    ),
    "dpo": DPOStageConfig(examples_per_step=4, device_batch_size=4, num_eval_pairs=8, **EVERY_2),
}  # fmt: skip
BASE = PretrainConfig(
    dataset="primer", depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=8, total_batch_size=512,
    device_batch_size=8, warmup_steps=2, eval_every=-1, eval_tokens=256, sample_every=-1, save_every=3,
)  # fmt: skip
TRAINERS = {"sft": ChatTrainer, "rl": RLTrainer, "dpo": PreferenceTrainer}
uninterrupted: dict[str, tuple] = {}  # stage -> its result; the model of every test is the same


@pytest.fixture
def train(tiny_folder, tiny_model, tmp_path):
    """(stage, output, **changes of its config) -> None: train a chat stage from the tiny model, after a step of it."""
    optimizer = MuonAdamW(param_groups(tiny_model, OPTIONS))
    tiny_model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    checkpoint.save_optimizer_state(tiny_folder / "optimizer.pt", tiny_model, optimizer)
    question = [{"role": "user", "content": "Is it so?"}]
    pairs = [{"prompt": question, "chosen": answer(f"yes {i}"), "rejected": answer("no")} for i in range(24)]
    write_rows(tmp_path / "pairs.jsonl", pairs)

    def train(stage: str, output: Path, model: Path = tiny_folder, **changes) -> None:
        chatcore = changes.pop("chatcore", None)
        config = dataclasses.replace(CONFIGS[stage], **changes)
        if stage == "sft":
            train_chat(config, str(model), output, chatcore)
        elif stage == "rl":
            train_rl(config, str(model), output, engine=Generator)
        else:
            train_dpo(dataclasses.replace(config, dataset=str(tmp_path / "pairs.jsonl")), str(model), output)

    return train


@pytest.fixture
def train_base(tokenizer, tmp_path):
    """(output, hooks=..., **changes of its config) -> metrics: pretrain."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def train_base(output: Path, tokenizer: Path = tmp_path / "tokenizer", core=None, **changes) -> dict:
        return pretrain(dataclasses.replace(BASE, **changes), str(tokenizer), output, core=core)

    return train_base


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, word: str, number: int = 40) -> Path:
    question = {"role": "user", "content": "Say it"}
    return write_rows(path, [{"messages": [question, *answer(f"{word} {i}")]} for i in range(number)])


def change_weights(folder: Path, name: str = "lm_head.weight", value: float = 1.0) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] += value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fail(monkeypatch, owner, name: str, error: BaseException, when=lambda *args: True):
    """`owner.name` raises `error` the first time that when(*its arguments)."""
    real, raised = getattr(owner, name), []

    def method(*args, **kwargs):
        if not raised and when(*args):
            raised.append(1)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def interrupt(train, stage: str, output: Path, step: int = 3, **keys) -> None:
    """Train a stage up to the middle of a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail(patch, TRAINERS[stage], "training_step", KeyboardInterrupt(), after(step))
        train(stage, output, **keys)


def after(step: int):
    return lambda trainer, *_: trainer.state.global_step == step


def terminate(trainer, step: int) -> None:
    if trainer.state.global_step == step:
        os.kill(os.getpid(), signal.SIGTERM)


def result(folder: Path) -> tuple:
    """What an interruption must not change: history without times, evaluations, samples, weights."""
    metrics, samples = load_json(folder / "metrics.json"), folder / "samples.jsonl"
    history = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in metrics["history"]]
    ends = {key: metrics.get(key) for key in ("val_loss", "before", "after", "val_bpb", "skipped_steps")}
    weights = {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}
    return history, ends, samples.read_text() if samples.exists() else None, weights


def slowly(*cases) -> list:
    """Parameters of tests that only `make test-slow` runs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


# --- interruptions, by stage and place ---------------------------------------------------------------------------

MEASURED = "interrupted/state/checkpoint-4/measured.json"
PLACES = {  # place -> (owner, method, the error, when, further keys, last checkpoint, steps that run after it)
    "a step": (None, "training_step", KeyboardInterrupt, after(3), {}, 2, 2),
    "an evaluation": (None, "evaluate", KeyboardInterrupt, after(2), {}, 2, 2),
    "an evaluation without memory": (None, "evaluate", torch.OutOfMemoryError, after(2), {"save_every": -1}, 2, 2),
    "the evaluation of the last step": (None, "evaluate", KeyboardInterrupt, after(4), {}, 4, 0),
    "the same without memory": (None, "evaluate", torch.OutOfMemoryError, after(4), {"save_every": -1}, 4, 0),
    "the final evaluation": (None, "evaluate", KeyboardInterrupt, MEASURED, {}, 4, 0),
    "a signal": (None, "training_step", SystemExit, lambda *args: terminate(args[0], 2), {"save_every": -1}, 3, 1),
    "writing the model": (checkpoint, "save_model", KeyboardInterrupt, None, {}, 4, 0),
    "writing metrics.json": (trainer, "write_metrics", KeyboardInterrupt, None, {}, 4, 0),
    "writing the mark of a checkpoint": (
        checkpoint, "write_manifest", KeyboardInterrupt, lambda folder, *_: folder.name == "checkpoint-4",
        {"keep_checkpoints": 1}, 2, 2,
    ),
}  # fmt: skip
QUICK = [
    *(("sft", place) for place in ("a step", "a signal", "writing the model", "writing the mark of a checkpoint")),
    *[("rl", "a step"), ("dpo", "an evaluation without memory")],
]


@pytest.mark.parametrize(
    "stage,place", QUICK + slowly(*((s, p) for s in TRAINERS for p in PLACES if (s, p) not in QUICK))
)
def test_an_interruption_anywhere_changes_nothing(train, tmp_path, monkeypatch, capsys, stage, place):
    if stage not in uninterrupted:
        train(stage, tmp_path / "whole")
        uninterrupted[stage] = result(tmp_path / "whole")
    owner, name, error, when, keys, step, steps_after = PLACES[place]
    if isinstance(when, str):
        path = tmp_path / when
        when = lambda *_: path.exists()  # noqa: E731
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(error) as caught:
        fail(patch, owner or TRAINERS[stage], name, error(), when or (lambda *_: True))
        train(stage, out, **keys)
    assert getattr(caught.value, "code", 143) == 128 + signal.SIGTERM and not (out / "metrics.json").exists()
    assert complete_checkpoints(out / "state")[-1].name == f"checkpoint-{step}"
    if stage == "rl":  # interrupted while it wrote a line
        samples = out / "samples.jsonl"
        whole = place != "a step"  # else the last line is of a step after the checkpoint
        samples.write_bytes(samples.read_bytes() + b'{"step": 3, "pr' if whole else samples.read_bytes()[:-20])
    steps, real = [], TRAINERS[stage].training_step
    monkeypatch.setattr(TRAINERS[stage], "training_step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    torch.manual_seed(123)
    train(stage, out, **keys)
    assert len(steps) == steps_after and f"[interrupted] resuming at step {step}" in capsys.readouterr().out
    assert result(out) == uninterrupted[stage]


def test_a_failing_chatcore_costs_no_training(train, tmp_path):
    def broken(model, questions):
        raise InputError("arc_easy_test.jsonl, line 7: not JSON")

    with pytest.raises(InputError, match="line 7"):
        train("sft", tmp_path / "out", chatcore=broken, chatcore_every=3, save_every=-1)
    assert complete_checkpoints(tmp_path / "out" / "state")[-1].name == "checkpoint-3"


def stop_core(model, limit):
    raise InputError("copa.jsonl, line 1: not JSON")


@pytest.mark.parametrize("step,save_every", [(8, -1), *slowly((3, -1), (3, 3), (8, 3))])
@pytest.mark.slow
def test_a_failing_core_costs_no_pretraining(train_base, tmp_path, step, save_every):
    keys = {"core_metric_every": 3, "save_every": save_every}
    calls = iter([0.1] * {3: 0, 8: 2}[step])
    with pytest.raises(InputError, match="line 1"):
        train_base(tmp_path / "out", core=lambda *args: next(calls, None) or stop_core(*args), **keys)
    assert max(path.name for path in (tmp_path / "out" / "state").glob("step_*")) == f"step_{step:06d}"
    for name in ("out", "whole"):
        train_base(tmp_path / name, core=lambda model, limit: 0.1, **keys)
    assert result(tmp_path / "whole") == result(tmp_path / "out")


# --- what changed under a half-done stage ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("half_done")


@pytest.fixture
def half_done(train, half_done_folder, tmp_path):
    """(**changes) -> None: resume a copy of an SFT that was interrupted after its checkpoints of steps 2 and 3."""
    files = {name: str(half_done_folder / f"{name}.jsonl") for name in ("chats", "val")}
    keys = {"mixture": [{"dataset": files["chats"]}], "validation": [{"dataset": files["val"]}], "save_every": 1}
    write_chats(Path(files["chats"]), "alpha")
    write_chats(Path(files["val"]), "alpha", 8)
    if not (half_done_folder / "out").exists():
        interrupt(train, "sft", half_done_folder / "out", **keys)
    shutil.copytree(half_done_folder / "out", tmp_path / "out")
    return lambda **changes: train("sft", tmp_path / "out", **keys | changes)


def make_older(state: Path) -> None:
    """Settings as written before weights and data were recorded, and with the keys of November 2026."""
    settings = load_json(state / "config.json")
    del settings["model"], settings["data"]
    for old, new in (("bad_rows", "on_bad_example"), ("rows of a step", "sequences per step")):
        settings[old] = settings.pop(new)
    save_json(state / "config.json", settings)


OTHER = r"written with another recipe, input or launch \("
REFUSED = {  # what differs -> (change of the world, changes of the config, the error)
    "conversations": (lambda files, *_: write_chats(files / "chats.jsonl", "gamma"), {}, OTHER + "data:"),
    "validation": (lambda files, *_: write_chats(files / "val.jsonl", "gamma", 8), {}, OTHER + "validation data:"),
    "model": (lambda files, state, model: change_weights(model), {}, OTHER + "model:"),
    "a learning rate": (None, {"matrix_lr": 0.001}, OTHER + "matrix_lr: None -> 0.001"),
    "sequences per step": (None, {"device_batch_size": 2}, OTHER + "sequences per step: 4 -> 2"),
    "settings cut": (lambda _, state, model: (state / "config.json").write_bytes(b"{"), {}, "is not valid JSON"),
    "settings gone": (lambda _, state, model: (state / "config.json").unlink(), {}, r"config\.json is missing"),
    "older settings": (
        lambda _, state, model: make_older(state), {"on_bad_example": "error", "device_batch_size": 2},
        OTHER + "on_bad_example: 'skip' -> 'error', sequences per step: 4 -> 2",
    ),
    "no steps": (None, {"num_iterations": 0}, "num_iterations is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_half_done_stage_refuses_other_inputs(half_done, half_done_folder, tmp_path, tiny_folder, case):
    change, keys, message = REFUSED[case]
    if change:
        change(half_done_folder, tmp_path / "out" / "state", tiny_folder)
    with pytest.raises(InputError, match=message):
        half_done(**keys)
    assert [path.name for path in complete_checkpoints(tmp_path / "out" / "state")] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("stage", ["rl", "dpo"])
def test_half_done_rl_and_dpo_refuse_another_model(train, tiny_folder, tmp_path, stage):
    interrupt(train, stage, tmp_path / "out")
    change_weights(tiny_folder)
    with pytest.raises(InputError, match=OTHER + "model:"):
        train(stage, tmp_path / "out")


@pytest.mark.parametrize("keys", [{"save_every": 100, "keep_checkpoints": 5, "eval_every": 100}, {}])
def test_intervals_may_change_and_settings_of_an_older_version_resume(half_done, tmp_path, capsys, keys):
    if not keys:
        make_older(tmp_path / "out" / "state")
    half_done(**keys)
    assert load_json(tmp_path / "out" / "metrics.json")["finished"]
    assert ("not verified" in capsys.readouterr().out) == (not keys)


def test_a_half_done_base_refuses_another_tokenizer_and_notes_another_rate(train_base, tmp_path):
    with pytest.raises(InputError, match="copa"):
        train_base(tmp_path / "out", core=stop_core, core_metric_every=5)
    other = train_bpe(iter(["other words " * 50]), vocab_size=300)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=OTHER + "tokenizer:"):
        train_base(tmp_path / "out", tmp_path / "other")
    metrics = train_base(tmp_path / "out", matrix_lr=0.3)
    [change] = metrics["changes"]
    assert change["after step"] == 5 and any("matrix_lr: None -> 0.3" in words for words in change["keys"])


def test_the_optimizer_state_of_a_damaged_or_an_earlier_file_is_not_loaded(train_base, train, tmp_path):
    base = tmp_path / "base"
    train_base(base, save_optimizer=True, num_iterations=2)
    flip_bit(base / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer\.pt is not what its stage wrote"):
        train("sft", tmp_path / "out", model=base)
    (base / "metrics.json").unlink()
    train_base(base, seed=1, num_iterations=2)
    assert not (base / "optimizer.pt").exists()


# --- damaged state -----------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
DAMAGE = {
    "a flipped bit": flip_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize(
    "file,kind", [*zip(FILES, [*DAMAGE, "cut", "gone"]), *slowly(*((file, kind) for file in FILES for kind in DAMAGE))]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(half_done, tmp_path, capsys, file, kind):
    state = tmp_path / "out" / "state"
    if file == "scheduler.pt":
        for manifest in state.glob("*/manifest.json"):
            manifest.rename(manifest.with_name("complete"))  # its name before December 2026
    DAMAGE[kind](state / "checkpoint-3" / file)
    content = {path.name: path.read_bytes() for path in (state / "checkpoint-3").iterdir()}
    aside = {}

    def look(trainer, *_):
        aside.update({path.name: path.read_bytes() for path in (state / "damaged_checkpoint-3").iterdir()})
        return False

    with pytest.MonkeyPatch.context() as patch:
        fail(patch, ChatTrainer, "training_step", KeyboardInterrupt(), look)
        half_done()
    assert f"checkpoint-3/{file}" in capsys.readouterr().out and aside == content
    assert [row["step"] for row in load_json(tmp_path / "out" / "metrics.json")["history"]] == [1, 2, 3, 4]


def test_without_any_intact_checkpoint_the_stage_is_refused_and_nothing_is_deleted(half_done, tmp_path):
    state = tmp_path / "out" / "state"
    for number in (2, 3):
        flip_bit(state / f"checkpoint-{number}" / "optimizer.pt")
    for _ in range(2):
        with pytest.raises(InputError, match=r"checkpoint-3/optimizer.pt is damaged.*bring that file back"):
            half_done()
        assert [path.name for path in complete_checkpoints(state)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_of_an_older_version_without_a_file_is_refused(half_done, tmp_path, file):
    for manifest in (tmp_path / "out" / "state").glob("checkpoint-*/manifest.json"):
        manifest.rename(manifest.with_name("complete")).write_bytes(b"")  # as it was in November 2026
    (tmp_path / "out" / "state" / "checkpoint-3" / file).unlink()
    with pytest.raises(InputError, match=f"checkpoint-3/{file} is missing"):
        half_done()


def test_other_peoples_files_in_the_state_folder_are_left_alone(half_done, tmp_path):
    state, elsewhere = tmp_path / "out" / "state", tmp_path / "elsewhere"
    (state / "checkpoint-3.bak").mkdir()
    (state / "checkpoint-9").write_text("a file")
    (state / "checkpoint-2").rename(elsewhere)
    (state / "checkpoint-2").symlink_to(elsewhere)
    half_done()
    assert elsewhere.is_dir() and load_json(tmp_path / "out" / "metrics.json")["finished"]


BASE_FILES = ["model.pt", "rank_00000.pt", "progress.pt"]


@pytest.mark.parametrize(
    "file,kind",
    [
        ("rank_00000.pt", "a flipped bit"),
        *slowly(("manifest.json", "empty"), ("manifest.json", "cut"), *((f, k) for f in BASE_FILES for k in DAMAGE)),
    ],
)
def test_a_damaged_checkpoint_of_base_is_set_aside(train_base, tmp_path, capsys, file, kind):
    whole = train_base(tmp_path / "whole")
    with pytest.raises(InputError, match="copa"):
        train_base(tmp_path / "out", core=stop_core, core_metric_every=5)
    newest = max((tmp_path / "out" / "state").glob("step_*"))
    DAMAGE[kind](newest / file)
    again = train_base(tmp_path / "out")
    assert f"{newest.name}/{file}" in capsys.readouterr().out
    assert [row["train_loss"] for row in again["history"]] == [row["train_loss"] for row in whole["history"]]


def restore_damaged(state: Path, file: str, restore, count: int = 30) -> list[str]:
    """What happened to `count` damaged versions of a file of a stage's state: "resumed", or the line of an error."""
    outcomes, intact = [], shutil.copytree(state, state.with_name("intact"))
    for data in mutations((state / file).read_bytes(), count):
        (state / file).write_bytes(data)
        try:
            restore()
            outcomes.append("resumed")
        except InputError as error:
            outcomes.append(str(error))
        shutil.rmtree(state)
        shutil.copytree(intact, state)
    assert not [line for line in outcomes if "\n" in line or len(line) > 3000]
    return outcomes


CHECKED = {  # file of a chat stage's state -> what a refusal says
    "config.json": "config.json is not valid JSON|written with another recipe",
    "skipped.json": "skipped.json.*delete it to count none as skipped",
    "checkpoint-3/measured.json": "measured.json.*delete it to repeat that evaluation",
    "checkpoint-3/manifest.json": "resumed",
    "checkpoint-3/trainer_state.json": "resumed",  # from the checkpoint before it, as the others in the manifest
    "checkpoint-3/rng_state.pth": "resumed",
    "checkpoint-3/optimizer.pt": "resumed",
}


@pytest.mark.parametrize("file", [*list(CHECKED)[:3], *slowly(*((file,) for file in list(CHECKED)[3:]))])
def test_a_damaged_file_of_a_chat_stages_state_is_one_line(half_done, tmp_path, monkeypatch, file):
    state, real, outcomes = tmp_path / "out" / "state", ChatTrainer.train_with_resume, []
    save_json(state / "skipped.json", {"steps": [1]})
    log = [{"step": 1, "time": 0.5, "loss": 2.0, "epoch": 0.1}, {"step": 3, "time": 1.0, "eval_loss": 2.0}]
    save_json(state / "checkpoint-3" / "measured.json", {"log": log})

    def attack(trainer, data):
        def train(resume_from_checkpoint):
            trainer.state.log_history, trainer.schedule = trainer.resumed_log, SimpleNamespace(lr=lambda step: 1.0)
            trainer.history()

        trainer.train = train
        outcomes.extend(restore_damaged(state, file, lambda: real(trainer, data)))
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatTrainer, "train_with_resume", attack)
    with pytest.raises(KeyboardInterrupt):
        half_done()
    assert len(outcomes) == 30 and all(re.search(f"^resumed$|{CHECKED[file]}", line) for line in outcomes), [
        line[-300:] for line in outcomes
    ]


@pytest.mark.parametrize("file", ["measured.json", *slowly(*((file,) for file in ("manifest.json", *BASE_FILES)))])
def test_a_damaged_file_of_base_is_one_line(train_base, tmp_path, monkeypatch, file):
    with pytest.raises(InputError, match="copa"):
        train_base(tmp_path / "out", core=stop_core, core_metric_every=5)
    state, real, outcomes = tmp_path / "out" / "state", Pretraining.restore, []
    newest = max(state.glob("step_*"))
    row = {"step": 1, "train_loss": 2.0}
    save_json(newest / "measured.json", {"history": [row], "samples": [{"prompt": "a", "text": "b"}]})

    def attack(training, path):
        outcomes.extend(
            restore_damaged(state, f"{newest.name}/{file}", lambda: real(training, checkpoint.latest(state)))
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretraining, "restore", attack)
    with pytest.raises(KeyboardInterrupt):
        train_base(tmp_path / "out")
    words = "^resumed$|delete it to repeat that evaluation"
    assert len(outcomes) == 30 and all(re.search(words, line) for line in outcomes), outcomes


def test_a_source_whose_weights_are_not_those_of_its_metrics_is_refused(train, tiny_folder, tmp_path):
    source = shutil.copytree(tiny_folder, tmp_path / "sft")
    save_json(source / "metrics.json", {"weights": model_fingerprint(source)})
    read_model(str(source))
    flip_bit(source / "model.safetensors")
    with pytest.raises(InputError, match=r"are not those that its metrics\.json names"):
        train("rl", tmp_path / "rl", model=source)


# --- losses and weights that are not finite ----------------------------------------------------------------------


def spoil_gradients(patch, stage: str, at: int, value: float) -> None:
    """The gradients of the step after `at` steps get a value that is not finite."""
    real = TRAINERS[stage].training_step

    def step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == at:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = value
        return loss

    patch.setattr(TRAINERS[stage], "training_step", step)


@pytest.mark.parametrize(
    "stage,rank,value", [("sft", 0, float("inf")), *slowly(*((s, r, float("nan")) for s in TRAINERS for r in (0, 4)))]
)
def test_a_step_that_is_not_finite_stops_the_stage_and_a_rerun_skips_it(train, tmp_path, stage, rank, value):
    keys, out = {"lora_r": rank, "save_every": -1, "eval_every": -1}, tmp_path / stage
    with pytest.MonkeyPatch.context() as patch:
        spoil_gradients(patch, stage, 2, value)
        message = rf"{stage}: the gradients of step 3 are not finite.*checkpoint-3"
        with pytest.raises(FloatingPointError, match=message):
            train(stage, out, **keys)
    saved = list((out / "state" / "checkpoint-3").glob("*.safetensors"))
    assert saved and all(value.isfinite().all() for value in load_file(saved[0]).values())
    assert not (out / "metrics.json").exists()
    train(stage, out, **keys)  # with the data after it
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["finished"] and metrics["skipped_steps"] == [3]


@pytest.mark.parametrize("stage", TRAINERS)
def test_weights_that_are_not_finite_are_refused_before_training(train, tiny_folder, tmp_path, stage):
    change_weights(tiny_folder, "model.layers.0.mlp.fc1.weight", float("nan"))
    with pytest.raises(InputError, match=r"not finite \(NaN or infinity in model\.layers\.0\.mlp\.fc1\.weight\)"):
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
    keys = {"validation": [], "save_every": 1, "matrix_lr": 1e14, "embedding_lr": 1e14, "eval_every": -1}
    messages = set()
    for _ in range(5):
        with pytest.raises(FloatingPointError) as caught:
            train("sft", tmp_path / "out", **keys)
        messages.add(str(caught.value))
        assert not (tmp_path / "out" / "metrics.json").exists()
        for folder in complete_checkpoints(tmp_path / "out" / "state"):
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    assert len(messages) <= 2 and all("checkpoint" in message for message in messages)


# --- disk, lock, permissions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "base", *slowly(("rl",), ("dpo",))])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(train, train_base, tmp_path, monkeypatch, stage):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner, name = (checkpoint, "save") if stage == "base" else (TRAINERS[stage], "_save_checkpoint")
    real = getattr(owner, name)

    def save(*args):
        if (args[1] if stage == "base" else args[0].state.global_step) > (3 if stage == "base" else 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes per file, as on a disk that is full
        try:
            return real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(owner, name, save)
    first = "step_000003" if stage == "base" else "checkpoint-2"
    with pytest.raises(InputError, match=rf"cannot write .*the checkpoint before it is .*{first}"):
        train_base(tmp_path / "out") if stage == "base" else train(stage, tmp_path / "out")
    state = tmp_path / "out" / "state"
    assert [path.name for path in state.iterdir() if path.name.lstrip(".")[:4] in ("step", "chec")] == [first]
    assert damage(state / first) is None


def test_the_second_process_on_a_run_folder_is_refused(tmp_path):
    second = pytest.raises(InputError, match="another process works on")
    with Run(tmp_path / "run").lock(), second, Run(tmp_path / "run").lock():
        pass
    with Run(tmp_path / "run").lock():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"), Run(tmp_path / "file" / "run").lock():
        pass


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), *slowly((0o077, 0o600), (0o002, 0o664))])
def test_weights_get_the_permissions_of_the_umask(train, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        train("sft", tmp_path / "out", num_iterations=1, validation=[], save_every=-1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert set(modes.values()) == {mode} and "model.safetensors" in modes
