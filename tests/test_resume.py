"""Interrupted stages: whatever stops one, no training is lost, no step runs twice, and the result is the same."""

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_optim import OPTIONS

from nanochat_hf.data import grading
from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.run import Progress, Run, load_json, model_fingerprint, save_json
from nanochat_hf.sync import syncing
from nanochat_hf.train import checkpoint
from nanochat_hf.train import pretrain as pretraining
from nanochat_hf.train.checkpoint import complete_checkpoints, damage
from nanochat_hf.train.dpo import DPOStageConfig, PreferenceTrainer, train_dpo
from nanochat_hf.train.grpo import RLConfig, RLTrainer, train_rl
from nanochat_hf.train.model_setup import read_model
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

EVERY_2 = {"num_iterations": 4, "save_every": 2, "eval_every": 2}
CONFIGS = {
    "base": PretrainConfig(
        dataset="primer", depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=6, save_every=2,
        total_batch_size=512, device_batch_size=8, warmup_steps=2, eval_every=-1, eval_tokens=256, sample_every=-1,
    ),
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
OWNERS = {"base": Pretraining, "sft": ChatTrainer, "rl": RLTrainer, "dpo": PreferenceTrainer}
uninterrupted: dict[str, tuple] = {}  # stage -> its result; the model of every test is the same


@pytest.fixture
def train(tiny_folder, tiny_model, tmp_path):
    """(stage, output, **changes of its config): train a chat stage from the tiny model after a step, or pretrain.

    source: folder of the model; of the tokenizer for base. measure: CORE or ChatCORE.
    """
    optimizer = MuonAdamW(param_groups(tiny_model, OPTIONS))
    tiny_model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    checkpoint.save_optimizer_state(tiny_folder / "optimizer.pt", tiny_model, optimizer)
    question = [{"role": "user", "content": "Is it so?"}]
    pairs = [{"prompt": question, "chosen": answer(f"yes {i}"), "rejected": answer("no")} for i in range(24)]
    write_rows(tmp_path / "pairs.jsonl", pairs)

    def train(stage: str, output: Path, source: Path = tiny_folder, measure=None, **changes) -> None:
        config = dataclasses.replace(CONFIGS[stage], **changes)
        if stage == "base":
            pretraining.pretrain(config, str(source), output, core=measure)
        elif stage == "sft":
            train_chat(config, str(source), output, measure)
        elif stage == "rl":
            train_rl(config, str(source), output, engine=Generator)
        else:
            train_dpo(dataclasses.replace(config, dataset=str(tmp_path / "pairs.jsonl")), str(source), output)

    return train


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, word: str, number: int = 40) -> Path:
    question = {"role": "user", "content": "Say it"}
    return write_rows(path, [{"messages": [question, *answer(f"{word} {i}")]} for i in range(number)])


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def step_method(stage: str) -> str:
    return "train_step" if stage == "base" else "training_step"


def step_of(trainer) -> int:
    return trainer.step if isinstance(trainer, Pretraining) else trainer.state.global_step


def after(step: int):
    return lambda trainer, *_: step_of(trainer) == step


def fail(patch, owner, name: str, error: BaseException, when=lambda *args: True):
    """`owner.name` raises `error` the first time that when(*its arguments)."""
    real, raised = getattr(owner, name), []

    def method(*args, **kwargs):
        if not raised and when(*args):
            raised.append(1)
            raise error
        return real(*args, **kwargs)

    patch.setattr(owner, name, method)


def interrupt(train, stage: str, output: Path, step: int = 3, **keys) -> None:
    """Train a stage up to the middle of a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail(patch, OWNERS[stage], step_method(stage), KeyboardInterrupt(), after(step))
        train(stage, output, **keys)


def terminate(step: int):
    """A signal to this process in the step after `step` steps."""

    def when(trainer, *_) -> bool:
        if step_of(trainer) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    return when


def result(folder: Path) -> tuple:
    """What an interruption must not change: history without times, evaluations, samples, weights."""
    metrics, samples = load_json(folder / "metrics.json"), folder / "samples.jsonl"
    times = [row["time"] for row in metrics["history"]]
    assert times == sorted(times)
    if metrics["config"].get("depth"):
        assert times[-1] == metrics["training_time_s"]
        assert metrics["tokens_per_second"] == pytest.approx(metrics["total_tokens"] / times[-1])
    drop = ("time", "tokens_per_second")
    history = [{k: v for k, v in row.items() if k not in drop} for row in metrics["history"]]
    names = ("start_val_loss", "val_loss", "before", "after", "val_bpb", "skipped_steps", "samples")
    ends = {name: metrics.get(name) for name in names}
    weights = {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}
    return history, ends, samples.read_text() if samples.exists() else None, weights


def slowly(*cases) -> list:
    """Parameters of tests that only `make test-slow` runs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


# --- interruptions, by stage and moment --------------------------------------------------------------------------

STEP, BREAK, MEMORY = "step", KeyboardInterrupt, torch.OutOfMemoryError
KILL = type("Killed", (BaseException,), {})  # by SIGKILL, in a process of its own
RARE = {"save_every": -1}


def half_written(value, path) -> bool:
    """While the last file of the second checkpoint is written."""
    return path.name == "progress.pt" and path.parent.name == ".step_000004" and path.write_bytes(b"half") > 0


CHAT = {  # moment -> (owner, method, the error, when, further keys, last checkpoint, steps that run after it)
    "a step": (None, STEP, BREAK, after(3), {}, 2, 2),
    "a signal": (None, STEP, SystemExit, terminate(2), RARE, 3, 1),
    "an evaluation": (None, "evaluate", BREAK, after(2), {}, 2, 2),
    "an evaluation without memory": (None, "evaluate", MEMORY, after(2), RARE, 2, 2),
    "the evaluation of the last step": (None, "evaluate", BREAK, after(4), {}, 4, 0),
    "the final evaluation": (None, "evaluate", BREAK, lambda self, *_: self.measured == (), {}, 4, 0),
    "writing the model": (checkpoint, "save_model", BREAK, None, {}, 4, 0),
    "writing a manifest": (checkpoint, "write_manifest", BREAK, lambda path: "4" in path.name, {}, 2, 2),
}
BASE = {
    "a step": (None, STEP, BREAK, after(3), {}, 2, 4),
    "a signal": (None, STEP, SystemExit, terminate(2), RARE, 5, 1),
    "an evaluation": (None, "measure", BREAK, after(4), {}, 4, 2),
    "an evaluation without memory": (None, "measure", MEMORY, after(3), {"save_every": -1, "push_every": 3}, 3, 3),
    "the evaluation of the last step": (None, "measure", BREAK, after(6), {}, 6, 0),
    "a tracker, while a step is enqueued": (None, "measure", MEMORY, after(5), {}, 4, 2),
    "writing the model": (checkpoint, "save_model", BREAK, None, {}, 6, 0),
    "writing a manifest": (checkpoint, "write_manifest", BREAK, lambda path: "4" in path.name, {}, 2, 4),
    "a kill in a step": (None, STEP, KILL, after(3), {}, 2, 4),
    "a kill while a file is written": (checkpoint, "write", KILL, half_written, {}, 2, 4),
}
MOMENTS = [("base", moment) for moment in BASE] + [(stage, m) for stage in ("sft", "rl", "dpo") for m in CHAT]
QUICK = [("base", "a step"), ("base", "a signal"), ("base", "an evaluation without memory"), ("sft", "a signal")]
QUICK += [("sft", "the final evaluation"), ("rl", "a step"), ("dpo", "an evaluation without memory")]


def train_and_be_killed(train) -> None:
    """Raise `KILL` when a process of its own, where `train` raises it, has ended by SIGKILL."""

    def main():
        try:
            train()
        except KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    child = mp.get_context("fork").Process(target=main)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    raise KILL


@pytest.mark.parametrize("stage, moment", QUICK + slowly(*(case for case in MOMENTS if case not in QUICK)))
def test_an_interruption_anywhere_changes_nothing(train, tmp_path, monkeypatch, stage, moment):
    if stage not in uninterrupted:
        train(stage, tmp_path / "whole")
        uninterrupted[stage] = result(tmp_path / "whole")
    owner, name, error, when, keys, step, steps_after = (BASE if stage == "base" else CHAT)[moment]
    out, method, handler = tmp_path / "interrupted", step_method(stage), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(error) as caught:
        fail(patch, owner or OWNERS[stage], method if name == STEP else name, error(), when or (lambda *_: True))
        if error is KILL:
            train_and_be_killed(lambda: train(stage, out, **keys))
        train(stage, out, **keys)
    assert getattr(caught.value, "code", 143) == 128 + signal.SIGTERM and not (out / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoint.step_of(complete_checkpoints(out / "state")[-1]) == step
    if stage == "rl":  # interrupted while it wrote a line
        samples = out / "samples.jsonl"
        whole = moment != "a step"  # else the last line is of a step after the checkpoint
        samples.write_bytes(samples.read_bytes() + b'{"step": 3, "pr' if whole else samples.read_bytes()[:-20])
    steps, real = [], getattr(OWNERS[stage], method)
    monkeypatch.setattr(OWNERS[stage], method, lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    torch.manual_seed(123)
    train(stage, out, **keys)
    assert len(steps) == steps_after and result(out) == uninterrupted[stage]
    assert load_json(out / "metrics.json")["earlier_wall_time_s"] > 0


STOP_EARLY = {"early_stopping_patience": 1, "eval_every": 1, "keep_checkpoints": 1, "num_iterations": 20}
TWICE = {"updates_per_batch": 2, "save_every": 1, "eval_every": 1, "keep_checkpoints": 1}
IN_A_BATCH = {"updates_per_batch": 2, "save_every": -1, "eval_every": -1}


@pytest.mark.parametrize("keys", [TWICE, STOP_EARLY, *slowly((IN_A_BATCH,))])
def test_rl_that_reuses_batches_or_stops_early_resumes_to_the_same_result(train, tmp_path, monkeypatch, keys):
    monkeypatch.setattr(grading, "is_correct", lambda row, text: sum(map(ord, text)) % 2 == 0)
    keys, state = {"num_iterations": 6} | keys, tmp_path / "out" / "state"
    train("rl", tmp_path / "whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        fail(patch, RLTrainer, "training_step", SystemExit(), terminate(2))
        train("rl", tmp_path / "out", **keys)
    steps = [checkpoint.step_of(path) for path in complete_checkpoints(state)]
    assert steps == [4] if "updates_per_batch" in keys else steps[-1] == 3
    if "early_stopping_patience" in keys:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fail(patch, RLTrainer, "_load_best_model", KeyboardInterrupt())
            train("rl", tmp_path / "out", **keys)
        (state / "checkpoint-3").rename(tmp_path / "best")
        with pytest.raises(InputError, match=r"checkpoint-3.* is missing; it has the best weights: restore it"):
            train("rl", tmp_path / "out", **keys)
        (tmp_path / "best").rename(state / "checkpoint-3")
    train("rl", tmp_path / "out", **keys)
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    metrics = load_json(tmp_path / "out" / "metrics.json")
    if keys.get("updates_per_batch") and keys["eval_every"] == 1:  # whole batches only
        assert [row["step"] for row in metrics["history"] if "pass@1" in row] == [2, 4, 6]
    if "early_stopping_patience" in keys:
        assert metrics["num_iterations"] == metrics["best_step"] + 1 < 20
        assert metrics["after"]["pass@1"] == max(row["pass@1"] for row in metrics["history"])


STOPS = [(3, 5), (4, 4), (1, 3, 4, 5), (2, 2, 4, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_bare_machines_resume_a_synced_run_to_the_same_result(train, tmp_path, stage, stops):
    url, keys = f"file://{tmp_path}/remote", {"num_iterations": 6}
    train(stage, tmp_path / "whole", **keys)
    for machine, stop in enumerate(stops):
        run, lost = Run(tmp_path / f"machine {machine}"), pytest.raises(KeyboardInterrupt)
        with pytest.MonkeyPatch.context() as patch, lost, syncing(url, run):
            fail(patch, OWNERS[stage], step_method(stage), KeyboardInterrupt(), after(stop))
            train(stage, run.path / stage, **keys)
    with pytest.raises(InputError, match=OTHER), syncing(url, run := Run(tmp_path / "other")):
        train(stage, run.path / stage, seed=7, **keys)
    with syncing(url, run := Run(tmp_path / "last")):
        assert complete_checkpoints(run.path / stage / "state")
        train(stage, run.path / stage, **keys)
    assert result(run.path / stage) == result(tmp_path / "whole")
    assert len(list(Path(tmp_path / "remote").glob(f"{stage}--finished--*"))) == 1


def test_a_signal_in_the_last_step_loses_nothing(train, tmp_path, monkeypatch):
    fail(monkeypatch, ChatTrainer, "training_step", SystemExit(), terminate(3))
    train("sft", tmp_path / "out", validation=[], **RARE)
    assert load_json(tmp_path / "out" / "metrics.json")["finished"]


# --- what changed under a half-done stage ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("half_done")


@pytest.fixture
def half_done(train, half_done_folder, tmp_path):
    """(stage) -> a function that resumes a copy of it that was interrupted after its checkpoints of steps 2 and 3."""

    def prepare(stage: str):
        files = {name: str(half_done_folder / f"{name}.jsonl") for name in ("chats", "val")}
        keys = {"mixture": [{"dataset": files["chats"]}], "validation": [{"dataset": files["val"]}]}
        keys = (keys if stage == "sft" else {}) | {"save_every": 1}
        write_chats(Path(files["chats"]), "alpha")
        write_chats(Path(files["val"]), "alpha", 8)
        if not (half_done_folder / stage).exists():
            interrupt(train, stage, half_done_folder / stage, **keys)
        shutil.copytree(half_done_folder / stage, tmp_path / "out")
        return lambda **changes: train(stage, tmp_path / "out", **keys | changes)

    return prepare


def numbers(state: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in complete_checkpoints(state)]


OTHER = r"written with another recipe, input or launch \("
REFUSED = {  # what differs -> (change of the world, changes of the config, the error)
    "conversations": (lambda files, *_: write_chats(files / "chats.jsonl", "gamma"), {}, OTHER + "data:"),
    "validation": (lambda files, *_: write_chats(files / "val.jsonl", "gamma", 8), {}, OTHER + "validation data:"),
    "model": (lambda files, state, model: change_weights(model), {}, OTHER + "model:"),
    "a rate and the seed": (None, {"matrix_lr": 0.001, "seed": 1}, OTHER + "matrix_lr: None -> 0.001, seed: 0 -> 1"),
    "sequences per step": (None, {"device_batch_size": 2}, OTHER + "sequences per step: 4 -> 2"),
    "settings cut": (lambda _, state, model: (state / "config.json").write_bytes(b"{"), {}, "is not valid JSON"),
    "settings gone": (lambda _, state, model: (state / "config.json").unlink(), {}, r"config\.json is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_half_done_stage_refuses_other_inputs(half_done, half_done_folder, tmp_path, tiny_folder, case):
    change, keys, message = REFUSED[case]
    resume = half_done("sft")
    if change:
        change(half_done_folder, tmp_path / "out" / "state", tiny_folder)
    with pytest.raises(InputError, match=message):
        resume(**keys)
    assert numbers(tmp_path / "out" / "state") == [2, 3]


def test_intervals_may_change_and_files_of_others_are_left_alone(half_done, tmp_path):
    resume, state, elsewhere = half_done("sft"), tmp_path / "out" / "state", tmp_path / "elsewhere"
    (state / "checkpoint-3.bak").mkdir()
    (state / "checkpoint-9").write_text("a file")
    (state / "checkpoint-2").rename(elsewhere)
    (state / "checkpoint-2").symlink_to(elsewhere)
    resume(save_every=100, keep_checkpoints=5, eval_every=100)
    assert elsewhere.is_dir() and load_json(tmp_path / "out" / "metrics.json")["finished"]


def test_a_half_done_base_refuses_another_tokenizer_shape_or_seed_and_notes_another_rate(half_done, tmp_path):
    resume = half_done("base")
    train_bpe(iter(["other words " * 50]), vocab_size=300).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=OTHER + "tokenizer:"):
        resume(source=tmp_path / "other")
    for changes in ({"depth": 3}, {"seed": 1}, {"total_batch_size": 1024}, {"window_pattern": "L"}):
        with pytest.raises(InputError, match=rf"{OTHER}{next(iter(changes))}: .* -> "):
            resume(**changes)
    for steps in (2, 3):  # which are done, without decay
        with pytest.raises(InputError, match=f"{OTHER}num_iterations: 6 -> {steps}"):
            resume(num_iterations=steps)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail(patch, Pretraining, "train_step", KeyboardInterrupt(), after(4))
        resume(matrix_lr=0.3)
    resume(matrix_lr=0.2)
    changes = [(one["after step"], *one["keys"]) for one in load_json(tmp_path / "out" / "metrics.json")["changes"]]
    assert changes == [(3, "matrix_lr: None -> 0.3"), (4, "matrix_lr: 0.3 -> 0.2")]


def test_the_optimizer_state_of_a_damaged_or_an_earlier_file_is_not_loaded(train, tmp_path):
    base = tmp_path / "base"
    train("base", base, save_optimizer=True, num_iterations=1)
    flip_bit(base / "optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer\.pt is not what its stage wrote"):
        train("sft", tmp_path / "out", source=base)
    (base / "metrics.json").unlink()
    train("base", base, seed=1, num_iterations=1)
    assert not (base / "optimizer.pt").exists()


def test_a_source_whose_weights_are_not_those_of_its_metrics_is_refused(train, tiny_folder, tmp_path):
    save_json(tiny_folder / "metrics.json", {"weights": model_fingerprint(tiny_folder)})
    read_model(str(tiny_folder))
    flip_bit(tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"are not those that its metrics\.json names"):
        train("rl", tmp_path / "rl")


# --- damaged state -----------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = {
    "sft": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"],
    "base": ["model.pt", "rank_00000.pt", "progress.pt"],
}
DAMAGE = {
    "a flipped bit": flip_bit, "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""), "gone": Path.unlink,
}  # fmt: skip
DAMAGED = [(stage, file, kind) for stage, files in FILES.items() for file in files for kind in DAMAGE]
DAMAGED += [("base", "manifest.json", "empty"), ("base", "manifest.json", "cut")]
SOME = [("base", "rank_00000.pt", "a flipped bit"), ("sft", "optimizer.pt", "gone"), ("sft", "config.json", "cut")]


@pytest.mark.parametrize("stage, file, kind", SOME + slowly(*(case for case in DAMAGED if case not in SOME)))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(half_done, tmp_path, capsys, stage, file, kind):
    resume, state, aside, firsts = half_done(stage), tmp_path / "out" / "state", {}, []
    newest = complete_checkpoints(state)[-1]
    (state / f"damaged_{newest.name}").mkdir()  # an earlier one
    start = Progress.__init__
    DAMAGE[kind](newest / file)
    content = {path.name: path.read_bytes() for path in newest.iterdir()}

    def look(*_):
        aside.update({path.name: path.read_bytes() for path in (state / f"damaged_{newest.name}.1").iterdir()})
        return False

    def started(*words, **options):
        firsts.append(words[3:])
        start(*words, **options)

    with pytest.MonkeyPatch.context() as patch:
        fail(patch, OWNERS[stage], step_method(stage), KeyboardInterrupt(), look)
        patch.setattr(Progress, "__init__", started)
        resume()
    assert (2,) in firsts  # where the bar of the steps begins
    assert f"{newest.name}/{file}" in capsys.readouterr().out and aside == content
    steps = [row["step"] for row in load_json(tmp_path / "out" / "metrics.json")["history"]]
    assert steps == list(range(1, CONFIGS[stage].num_iterations + 1))


@pytest.mark.parametrize("file", FILES["sft"])
def test_a_file_of_another_kind_in_a_checkpoint_is_one_line(half_done, tmp_path, file):
    resume, newest = half_done("sft"), complete_checkpoints(tmp_path / "out" / "state")[-1]
    (newest / file).write_text("[1]")
    checkpoint.write_manifest(newest)
    with pytest.raises(InputError, match=rf"{newest.name}.*delete "):
        resume()


def test_without_any_intact_checkpoint_the_stage_is_refused_and_nothing_is_deleted(half_done, tmp_path):
    resume, state = half_done("sft"), tmp_path / "out" / "state"
    for number in (2, 3):
        flip_bit(state / f"checkpoint-{number}" / "optimizer.pt")
    with pytest.raises(InputError, match=r"checkpoint-3/optimizer.pt is damaged.*bring that file back"):
        resume()
    assert numbers(state) == [2, 3]


# --- disk and lock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "base"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(train, tmp_path, monkeypatch, stage):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner, name = (checkpoint, "save") if stage == "base" else (ChatTrainer, "_save_checkpoint")
    real = getattr(owner, name)

    def save(*args):
        if (args[1] if stage == "base" else args[0].state.global_step) > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes per file, as on a disk that is full
        try:
            return real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(owner, name, save)
    with pytest.raises(InputError, match=r"cannot write .*the checkpoint before it is .*2"):
        train(stage, tmp_path / "out")
    state = tmp_path / "out" / "state"
    [left] = [path for path in state.iterdir() if path.name.lstrip(".")[:4] in ("step", "chec")]
    assert checkpoint.step_of(left) == 2 and damage(left) is None
    with pytest.raises(InputError, match="cannot write"), checkpoint.writing_checkpoint(state / "step_000009"):
        raise OSError(28, "No space left on device")  # not even for the folder


def test_the_second_process_on_a_run_folder_is_refused(tmp_path):
    second = pytest.raises(InputError, match="another process works on")
    with Run(tmp_path / "run").lock(), second, Run(tmp_path / "run").lock():
        pass
    with Run(tmp_path / "run").lock():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"), Run(tmp_path / "file" / "run").lock():
        pass
