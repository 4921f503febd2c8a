"""Several ranks on this machine, over gloo: their number changes speed and not the result.

Everything is launched as a user launches it, with the files of configs/accelerate; ACCELERATE_USE_CPU=true puts it on
the CPU. Launches take long on small machines: each does several jobs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hub_standin import Hub, Repo
from servers import free_port
from test_grpo import untrained
from workers import ROOT, environment, launch, launch_zero

from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.demo import corpus as primer
from nanochat_hf.distributed import BarrierTimeoutError, main_process_first, monitored_barrier
from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.run import load_json

SHAPE = {"depth": 3, "aspect_ratio": 24, "head_dim": 24, "max_seq_len": 64, "dataset": "primer"}  # 3 matrices a kind
QUICK = {"eval_every": -1, "eval_tokens": 1024, "sample_every": -1, "save_every": -1}
# Warmup all through the run: at the peak learning rate so small a batch is chaotic, and rounding grows a hundredfold.
RUN = {**SHAPE, **QUICK, "num_iterations": 20, "total_batch_size": 512, "device_batch_size": 2, "warmup_steps": 80}
STOPPED, ODD = 8, 509
EVAL = {"max_per_task": 6, "bpb_tokens": 512, "max_new_tokens": 8, "batch_size": 8, "tasks": ["nanochat_demo"]}
SFT = {"do": "sft", "mixture": [{"dataset": "primer", "rows": 60}], "init_lr_frac": 0.02}


def losses(folder) -> list[float]:
    return [point["train_loss"] for point in load_json(folder / "metrics.json")["history"]]


def weights(folder) -> dict:
    return NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tokenizer/, whose number of tokens no number of ranks divides."""
    folder = tmp_path_factory.mktemp("distributed")
    texts = [text for _, text in zip(range(500), primer.documents("train", seed=0))]
    train_bpe(iter(texts), vocab_size=ODD).save_pretrained(folder / "tokenizer")
    return folder


def job(place, name: str, **keys) -> dict:
    return {"do": "pretrain", "output": place / name, "tokenizer": place / "tokenizer", **RUN, **keys}


@pytest.fixture(scope="module")
def alone(place):
    """The runs of one rank, four micro-batches per step, that all others must equal."""
    launch(1, "", [job(place, "alone", save_optimizer=True), job(place, "alone-1", generation=1)])
    assert load_json(place / "alone" / "metrics.json")["gradient_accumulation"] == 4
    assert weights(place / "alone-1")["lm_head.weight"].shape == (ODD, 72)
    return place


def equals(place, name: str, grad_accum_steps: int, other: str = "alone") -> None:
    metrics, expected = load_json(place / name / "metrics.json"), load_json(place / other / "metrics.json")
    assert metrics["gradient_accumulation"] == grad_accum_steps
    assert losses(place / name) == pytest.approx(losses(place / other), abs=1e-5)
    assert metrics["val_bpb"] == pytest.approx(expected["val_bpb"], abs=1e-5)
    one, two = weights(place / other), weights(place / name)
    assert set(one) == set(two)
    # AdamW's first steps turn rounding into whole steps where a gradient is almost zero: norms, not elements.
    for key in one:
        assert (one[key] - two[key]).norm() <= 1e-3 * one[key].norm() + 1e-6, key


def same_optimizer_state(one, two) -> None:
    theirs, ours = (torch.load(folder / "optimizer.pt") for folder in (one, two))
    assert {name: set(state) for name, state in ours.items()} == {name: set(state) for name, state in theirs.items()}
    for name, state in theirs.items():
        for key, value in state.items():
            near = 0.03 * value.abs().max().item() + 1e-8  # sums in another order
            torch.testing.assert_close(ours[name][key], value, rtol=0, atol=near, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_two_and_four_ranks_equal_one_also_after_a_stop(alone, config):
    """20 steps of both generations; a run stopped after step 8 is resumed by 2, 4 and (replicated) 1 ranks."""

    def name(suffix):
        return f"{config}-{suffix}"

    stopped = alone / name("stopped")
    two = [
        job(alone, name("2"), save_optimizer=True),
        job(alone, name("2-1"), generation=1),
        job(alone, stopped.name, stop_at=STOPPED - 2, eval_every=STOPPED),  # evaluates, then saves
        job(alone, name("in-place"), as_on_a_gpu=True),
    ]
    launch(2, config, two)
    equals(alone, name("2"), 2)
    same_optimizer_state(alone / "alone", alone / name("2"))
    equals(alone, name("2-1"), 2, "alone-1")
    equals(alone, name("in-place"), 2)
    saved = stopped / "state" / f"step_{STOPPED:06d}"
    assert [path.name for path in stopped.glob("state/*")] == [saved.name]
    weights_file = "model.pt" if config == "multi_gpu" else "shards"
    files = {weights_file, "progress.pt", "manifest.json", "rank_00000.pt", "rank_00001.pt"}
    assert {path.name for path in saved.iterdir()} == files
    for ranks in (1, 2, 4):
        shutil.copytree(stopped, alone / name(f"again-{ranks}"))
    launch(4, config, [job(alone, name("4")), job(alone, name("4-1"), generation=1), job(alone, name("again-4"))])
    equals(alone, name("4"), 1)
    equals(alone, name("4-1"), 1, "alone-1")
    equals(alone, name("again-4"), 1)
    launch(2, config, [job(alone, name("again-2"))])
    assert losses(alone / name("again-2")) == losses(alone / name("2"))
    if config == "multi_gpu":
        launch(1, "", [job(alone, name("again-1"))])
        equals(alone, name("again-1"), 4)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_a_rerun_resumes(alone):
    run, start = job(alone, "killed", save_every=4), time.time()
    done = launch(2, "multi_gpu", [{**run, "die": [1, 10]}], ok=False)
    assert time.time() - start < 200 and "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
    assert max(path.name for path in (alone / "killed" / "state").glob("step_*")) == "step_000008"
    assert not (alone / "killed" / "metrics.json").exists()
    done = launch(2, "multi_gpu", [run])
    assert "resuming at step 8" in done.stdout + done.stderr
    equals(alone, "killed", 2)


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"
first=$?; wait $!; exit $((first + $?))
"""


@pytest.mark.slow
def test_the_slurm_script_runs_the_pipeline_on_two_nodes(tmp_path):
    """With replacements of Slurm's own two commands, which start two nodes of one process each here."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": path, "MASTER_PORT": str(free_port())}
    base = {"num_iterations": 3, "depth": 2, "eval_tokens": 4096, "device_batch_size": 8, "save_every": -1}
    words = [str(ROOT / "recipes" / "slurm.sh"), "--recipe", "cpu-demo", "--run-dir", str(tmp_path / "run")]
    words += ["--stages", "tokenizer,base", *(f"base.{key}={value}" for key, value in base.items())]
    done = subprocess.run(words, env=environment(**slurm), capture_output=True, check=False, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = load_json(tmp_path / "run" / "base" / "metrics.json")
    assert metrics["finished"] and metrics["hardware"]["num_processes"] == 2
    assert done.stdout.count("\n[1/2] tokenizer") == 2  # one process of each node prints


def test_a_rank_does_not_go_on_where_the_main_process_failed(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    ranks = iter([0, 1])
    monkeypatch.setattr("nanochat_hf.distributed.get_dist_info", lambda: (next(ranks), 2))
    with pytest.raises(ZeroDivisionError), main_process_first("a division"):
        1 / 0  # noqa: B018
    with pytest.raises(InputError, match="the main process failed at 'a division'"), main_process_first("a division"):
        pytest.fail("the other rank went on")


def test_a_rank_waits_for_the_main_process_each_time(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for rank in (0, 1):
        monkeypatch.setattr("nanochat_hf.distributed.get_dist_info", lambda rank=rank: (rank, 2))
        monkeypatch.setattr("nanochat_hf.distributed._passed", Counter())  # each process has its own
        with main_process_first("loading") as main:
            assert main == (rank == 0)
    with pytest.raises(BarrierTimeoutError), main_process_first("loading", timedelta(seconds=0.01)):
        pytest.fail("the main process is not there yet")
    with pytest.raises(BarrierTimeoutError, match=r"rank 1 waited .* at 'the end' for rank 0"):
        monitored_barrier("the end", timedelta(seconds=0.01))


# --- the other stages


@pytest.fixture
def chat(tmp_path, tiny_model, tokenizer):
    """A folder with an untrained chat model, sft/, whose head is not almost zero."""
    torch.nn.init.normal_(tiny_model.lm_head.weight, std=0.05)
    tiny_model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_pretrains_like_one_rank_by_fsdp2_and_hands_over_to_deepspeed(alone, config):
    """One launch for all stages, as recipes/speedrun.py makes it; evaluation loads unsharded weights again."""
    base, sft = job(alone, f"{config}-2"), {**SFT, "output": alone / f"{config}-sft", "device_batch_size": 4}
    sft |= {"model": base["output"], "num_iterations": 2, "init_lr_frac": 1.0}
    evaluation = {"do": "evaluate", "models": {"sft": sft["output"]}, "output": alone / f"{config}-eval", **EVAL}
    done = launch_zero(2, config, [base, sft, evaluation])
    assert done.stdout.count(f"pretraining: FSDP2 in place of ZeRO-{config[-1]}") == 1
    equals(alone, f"{config}-2", 2)
    assert "DeepSpeed's own Muon" in done.stdout and len(losses(sft["output"])) == 2
    assert len(load_json(evaluation["output"] / "metrics.json")["results"]["sft"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_trains_sft_like_one_rank_and_leaves_a_folder_that_loads(chat, config):
    """DeepSpeed itself, on the CPU: 2 ranks against 1, small learning rates (AdamW enlarges rounding at first).

    Its own Muon makes about the steps of ours, which AdamW would not.
    """
    common = {**SFT, "num_iterations": 6, "model": chat / "sft"}
    for ranks, name in ((1, "one"), (2, "two")):
        launch_zero(ranks, config, [{**common, "output": chat / name, "device_batch_size": 8 // ranks}])
    one, two = losses(chat / "one"), losses(chat / "two")
    assert two == pytest.approx(one, abs=1e-5) and two[-1] < two[0]
    launch(1, "", [{**common, "output": chat / "plain", "device_batch_size": 8}])
    before, after, plain = (weights(chat / name) for name in ("sft", "two", "plain"))
    assert set(before) == set(after)
    for name in (name for name in before if name.endswith("_proj.weight") or "fc" in name):
        step, ours = (trained[name] - before[name] for trained in (after, plain))
        assert step.norm().item() == pytest.approx(ours.norm().item(), rel=0.15), name
        assert torch.nn.functional.cosine_similarity(step.flatten(), ours.flatten(), dim=0) > 0.85, name


DPO = {"do": "dpo", "examples_per_step": 8, "num_eval_pairs": 8, "num_iterations": 6, "init_lr_frac": 0.02}
MATRIX = {  # (stage, Accelerate config file): columns of the history that two ranks have as one
    ("sft", "multi_gpu"): ("train_loss", "val_loss", "grad_norm"), ("sft", "fsdp2"): ("train_loss", "val_loss"),
    ("rl", "multi_gpu"): ("train_loss", "grad_norm", "reward"), ("dpo", "multi_gpu"): ("train_loss", "grad_norm"),
    ("lora", "multi_gpu"): ("train_loss", "grad_norm"),
}  # fmt: skip


@pytest.mark.slow
def test_chat_stages_on_two_ranks_equal_one_also_after_a_stop(chat):
    """RL's two ranks have 4 of a step's 8 questions each, of which they leave out different ones."""
    answers = [[{"role": "assistant", "content": word}] for word in ("yes", "no")]
    pairs = [{"prompt": [{"role": "user", "content": f"Is it {i}?"}]} for i in range(40)]
    lines = [json.dumps(pair | {"chosen": answers[0], "rejected": answers[1]}) + "\n" for pair in pairs]
    (chat / "pairs.jsonl").write_text("".join(lines))
    sft = {**SFT, "num_iterations": 8, "save_every": 2, "eval_every": 2, "total_batch_size": 8 * 128}
    stages = {"sft": sft | {"validation": [{"dataset": "primer", "rows": 10}]}}
    stages |= {"dpo": DPO | {"dataset": chat / "pairs.jsonl"}}
    stages |= {"lora": stages["dpo"] | {"lora_r": 4}, "rl": {"do": "rl", **untrained(chat / "sft", chat)}}
    stages["rl"] |= {"model": chat / "guesses", "num_iterations": 12, "examples_per_step": 8, "num_samples": 4}
    stages["rl"]["updates_per_batch"] = 2

    def run(ranks: int, config: str, *names: str, ok: bool = True, **more):
        jobs = []
        for name in names:
            stage = name.partition("-")[0]
            size = (32 if stage == "rl" else 8) // ranks
            jobs.append(
                {"model": chat / "sft", **stages[stage], "output": chat / name, "device_batch_size": size, **more}
            )
        launch(ranks, config, jobs, ok=ok)

    run(1, "", *(f"{stage}-1" for stage in stages))
    for config in ("multi_gpu", "fsdp2"):
        run(2, config, *(f"{stage}-{config}" for stage, where in MATRIX if where == config))
        run(2, config, f"sft-again-{config}", ok=False, die_at=5)
        shutil.copytree(chat / f"sft-again-{config}", chat / f"sft-fewer-{config}")
        run(2, config, f"sft-again-{config}")
        assert losses(chat / f"sft-again-{config}") == losses(chat / f"sft-{config}")
    run(1, "", "sft-fewer-multi_gpu")
    assert losses(chat / "sft-fewer-multi_gpu") == pytest.approx(losses(chat / "sft-1"), abs=1e-4)
    for (stage, config), columns in MATRIX.items():
        one, two = (load_json(chat / f"{stage}-{name}" / "metrics.json") for name in ("1", config))
        for column in columns:
            expected, values = ([row[column] for row in metrics["history"] if column in row] for metrics in (one, two))
            near = pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert any(expected) and values == near, (stage, config, column)
        for end in ("before", "after", "val_loss"):
            if one.get(end) is not None:
                assert two[end] == pytest.approx(one[end], rel=1e-3, abs=1e-3), (stage, config, end)
    before, after = (load_json(chat / "rl-multi_gpu" / "metrics.json")[end]["pass@1"] for end in ("before", "after"))
    assert before < 0.45 and after > 0.65  # it learned what is rewarded


@pytest.mark.slow
def test_two_ranks_stream_from_the_hub_through_a_stalled_and_a_failing_download(place, tmp_path):
    """Each file is fetched once for both; the run is that on the same files from a folder."""
    texts = [text for _, text in zip(range(900), primer.documents("train", seed=1))]
    files, folder = {}, tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        rows = [json.dumps({"text": text}) for text in texts[300 * number : 300 * (number + 1)]]
        files[f"{number}.jsonl"] = "\n".join(rows).encode()
        (folder / f"{number}.jsonl").write_bytes(files[f"{number}.jsonl"])
    keys = {"num_iterations": 4, "eval_every": 4}
    with Hub() as hub:
        hub.repos["datasets", "you/texts"] = Repo(commits={"0" * 40: files})
        hub.fail("GET", "resolve/.*/0.jsonl", 0)
        hub.fail("GET", "resolve/.*/1.jsonl", 503)
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        online |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
        launch(2, "multi_gpu", [job(place, "hub", dataset="you/texts", **keys)], **online)
        fetched = [path.rsplit("/", 1)[1] for path in hub.requests if path.startswith("GET") and "resolve" in path]
    assert sorted(fetched) == ["0.jsonl", "0.jsonl", "1.jsonl", "1.jsonl", "2.jsonl"]
    launch(1, "", [job(place, "folder", dataset=str(folder), **keys)])
    assert losses(place / "hub") == pytest.approx(losses(place / "folder"), abs=1e-5)
