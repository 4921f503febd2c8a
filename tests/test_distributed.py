"""Several processes on this machine, over gloo: the number changes speed and not the result.

Everything is launched as a user would launch it, with the files of configs/accelerate; ACCELERATE_USE_CPU=true puts it
on the CPU. The machines that run this are small: each launch does several jobs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_standin import Hub, Repo
from test_optim import free_port
from workers import ROOT, command, environment, launch

from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.demo import corpus as primer
from nanochat_hf.distributed import main_process_first, monitored_barrier
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.run import load_json

SHAPE = {"depth": 3, "aspect_ratio": 24, "head_dim": 24, "max_seq_len": 64, "dataset": "primer"}  # 3 matrices a kind
QUICK = {"eval_every": -1, "eval_tokens": 1024, "sample_every": -1, "save_every": -1}
# Rates that rise all through the run: the full ones make so small a batch chaotic, and rounding grows a hundredfold.
RUN = {**SHAPE, **QUICK, "num_iterations": 20, "total_batch_size": 512, "device_batch_size": 2, "warmup_steps": 80}
STOPPED, ODD = 8, 509


def launch_zero(processes: int, config: str, jobs: list[dict]):
    """As `launch`, with DeepSpeed itself on the CPU."""
    words = command(2, config, "--mixed_precision", "no", "--num_processes", str(processes))
    environ = environment(DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="false", TORCH_COMPILE_DISABLE="1")
    return subprocess.run(
        [*words, str(ROOT / "tests" / "workers.py"), json.dumps(jobs, default=str)],
        env=environ, capture_output=True, check=False, text=True, timeout=300,
    )  # fmt: skip


def losses(folder) -> list[float]:
    return [point["train_loss"] for point in load_json(folder / "metrics.json")["history"]]


def weights(folder) -> dict:
    return NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tokenizer/, whose number of tokens no number of processes divides."""
    folder = tmp_path_factory.mktemp("distributed")
    texts = [text for _, text in zip(range(500), primer.documents("train", seed=0))]
    train_bpe(iter(texts), vocab_size=ODD).save_pretrained(folder / "tokenizer")
    return folder


def job(place, name: str, **keys) -> dict:
    return {"do": "pretrain", "output": place / name, "tokenizer": place / "tokenizer", **RUN, **keys}


@pytest.fixture(scope="module")
def alone(place):
    """The runs of one process, four micro-batches a step, that all others must equal."""
    jobs = [job(place, "alone", generation=2), job(place, "alone-1", generation=1)]
    assert launch(1, "", jobs).returncode == 0
    assert load_json(place / "alone" / "metrics.json")["gradient_accumulation"] == 4
    assert weights(place / "alone-1")["lm_head.weight"].shape == (ODD, 72)
    return place


def same(place, name: str, other: str, accumulation: int) -> None:
    metrics, expected = load_json(place / name / "metrics.json"), load_json(place / other / "metrics.json")
    assert metrics["gradient_accumulation"] == accumulation
    assert losses(place / name) == pytest.approx(losses(place / other), abs=1e-5)
    assert metrics["val_bpb"] == pytest.approx(expected["val_bpb"], abs=1e-5)
    one, two = weights(place / other), weights(place / name)
    assert set(one) == set(two)
    # AdamW's first steps turn rounding into whole steps where a gradient is all but zero: norms and not elements.
    for key in one:
        assert (one[key] - two[key]).norm() <= 1e-3 * one[key].norm() + 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_products_that_add_to_the_gradients_by_themselves_give_the_same_on_two_processes(alone, config):
    name = f"products-{config}"
    assert launch(2, config, [job(alone, name, generation=2, as_on_a_gpu=True)]).returncode == 0
    same(alone, name, "alone", accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_two_and_four_processes_equal_one_and_each_other_after_a_stop(alone, config):
    """20 steps of both generations; the second stopped after step 8, and resumed by 2, by 4 and (DDP) by 1 process."""
    place, stopped = alone, alone / f"{config}-stopped"
    jobs = [
        job(place, f"{config}-2", generation=2),
        job(place, f"{config}-2-1", generation=1),
        job(place, stopped.name, generation=2, stop_at=STOPPED - 1, eval_every=STOPPED),  # evaluates, then saves
    ]
    assert launch(2, config, jobs).returncode == 0
    same(place, f"{config}-2", "alone", 2)
    same(place, f"{config}-2-1", "alone-1", 2)
    saved = stopped / "state" / f"step_{STOPPED:06d}"
    assert [path.name for path in stopped.glob("state/*")] == [saved.name]
    files = {path.name for path in saved.iterdir()}
    weights_at = "model.pt" if config == "multi_gpu" else "shards"
    assert files == {weights_at, "progress.pt", "manifest.json", "rank_00000.pt", "rank_00001.pt"}
    for name in ("again-2", "again-4", "again-1"):
        shutil.copytree(stopped, place / f"{config}-{name}")
    jobs = [
        job(place, f"{config}-4", generation=2),
        job(place, f"{config}-4-1", generation=1),
        job(place, f"{config}-again-4", generation=2),
    ]
    assert launch(4, config, jobs).returncode == 0
    same(place, f"{config}-4", "alone", 1)
    same(place, f"{config}-4-1", "alone-1", 1)
    same(place, f"{config}-again-4", "alone", 1)
    assert launch(2, config, [job(place, f"{config}-again-2", generation=2)]).returncode == 0
    assert losses(place / f"{config}-again-2") == losses(place / f"{config}-2")
    if config == "multi_gpu":
        assert launch(1, "", [job(place, f"{config}-again-1", generation=2)]).returncode == 0
        same(place, f"{config}-again-1", "alone", 4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(place, config):
    """Communications in a step of 1 and of 4 micro-batches, counted by the profiler; and what the optimizer's hide."""
    keys = {**SHAPE, **QUICK, "num_iterations": 4, "device_batch_size": 2}
    counting = {"do": "count", "output": place / f"{config}-count", "tokenizer": place / "tokenizer", **keys}
    assert launch(2, config, [{**counting, "accumulations": [1, 4]}]).returncode == 0
    found = load_json(place / f"{config}-count" / "count.json")
    one, four = found["counted"]["1"], found["counted"]["4"]
    if config == "multi_gpu":
        # Every gradient once: those with an owner to it, all others together.
        assert one == four and one["gloo:reduce"] == found["owned"] and one["gloo:all_reduce"] > 0
        # Every stack is on its way before the first one that came back is applied.
        order = found["order"]
        assert order.index("apply") > max(i for i, what in enumerate(order) if what == "send")
        assert [what for what in order if what != "apply"] == ["compute", "send"] * order.count("send")
    else:
        reduced = [name for name in one if "reduce" in name]
        assert reduced and all(one[name] == four[name] for name in reduced)
        gathered = [name for name in one if "gather" in name]
        assert gathered and all(one[name] == four[name] for name in gathered)  # weights stay until the step is done


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_a_rerun_goes_on(alone):
    run = job(alone, "killed", generation=2, save_every=4)
    start = time.time()
    done = launch(2, "multi_gpu", [{**run, "die": [1, 10]}])
    assert done.returncode != 0 and time.time() - start < 200
    assert "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
    assert max(path.name for path in (alone / "killed" / "state").glob("step_*")) == "step_000008"
    assert not (alone / "killed" / "metrics.json").exists()
    done = launch(2, "multi_gpu", [run])
    assert done.returncode == 0 and "going on after step 8" in done.stdout + done.stderr
    same(alone, "killed", "alone", 2)


@pytest.mark.slow
def test_two_machines_equal_one_process(alone):
    """configs/accelerate/multi_node.yaml by two launchers with machine ranks of their own, here on one machine."""
    port, jobs = str(free_port()), json.dumps([job(alone, "machines", generation=2)], default=str)
    more = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launched = []
    for rank in ("1", "0"):
        words = [*command(2, "multi_node", *more, "--machine_rank", rank), str(ROOT / "tests" / "workers.py"), jobs]
        launched.append(
            subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    texts = [process.communicate(timeout=400)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n".join(texts)[-6000:]
    same(alone, "machines", "alone", 2)


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"
first=$?; wait $!; exit $((first + $?))
"""


@pytest.mark.slow
def test_the_slurm_script_runs_the_pipeline_on_two_machines(tmp_path):
    """With stand-ins for Slurm's own two commands, which start two machines of one process each here."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    base = {"num_iterations": 3, "depth": 2, "eval_tokens": 4096, "device_batch_size": 8, "save_every": -1}
    words = [f"base.{key}={value}" for key, value in base.items()]
    done = subprocess.run(
        [str(ROOT / "recipes" / "slurm.sh"), "--recipe", "cpu-demo", "--run-dir", str(tmp_path / "run"),
         "--stages", "tokenizer,base", *words],
        env=environment(PATH=path, MASTER_PORT=str(free_port()), **slurm),
        capture_output=True, check=False, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = load_json(tmp_path / "run" / "base" / "metrics.json")
    assert metrics["finished"] and metrics["hardware"]["num_processes"] == 2
    assert done.stdout.count("[tokenizer]") == 2  # one process of each machine speaks


@pytest.mark.slow
def test_who_waits_says_for_whom_and_gives_up(tmp_path):
    job = {"do": "wait", "output": tmp_path, "missing": 2, "seconds": 2}
    assert launch(3, "multi_gpu", [job]).returncode == 0
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    first, *others = (entry[0].split() for entry in said)
    assert first[0] == "True" and all(name == "False" and float(at) > float(first[1]) + 0.4 for name, at in others)
    assert said[0][1] == "of the main process"
    assert said[1][1] == "the main process failed at 'a failure'; see there"
    assert said[1][2] == "rank 1 waited 0:00:02 at 'the end' for rank 2; look at the output of these"
    assert said[0][2].startswith("rank 0 waited") and len(said[2]) == 2


def test_one_process_waits_for_nobody():
    with main_process_first("anything") as main:
        assert main
    monitored_barrier("anything")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_pretrains_like_one_process_by_fsdp2_and_hands_over_to_deepspeed(alone, config):
    """One launch for all stages, as recipes/speedrun.py makes it; evaluation loads whole weights again."""
    base = job(alone, f"{config}-2", generation=2)
    sft = {"do": "sft", "model": base["output"], "output": alone / f"{config}-sft", "device_batch_size": 4}
    sft |= {"mixture": [{"dataset": "primer", "rows": 60}], "num_iterations": 2}
    asked = {"do": "evaluate", "models": {"sft": sft["output"]}, "output": alone / f"{config}-eval", **ASKED}
    done = launch_zero(2, config, [base, sft, asked])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"pretraining: FSDP2 in place of ZeRO-{config[-1]}") == 1
    same(alone, f"{config}-2", "alone", 2)
    assert "DeepSpeed's own Muon" in done.stdout and len(losses(sft["output"])) == 2
    assert len(load_json(asked["output"] / "metrics.json")["results"]["sft"]) == 6


ASKED = {"limit": 6, "bpb_tokens": 512, "max_new_tokens": 8, "batch_size": 8, "tasks": ["nanochat_demo"]}


@pytest.fixture
def chat(tmp_path, tiny_model, tokenizer):
    """A folder with an untrained chat model, sft/, whose head is not all but zero."""
    torch.nn.init.normal_(tiny_model.lm_head.weight, std=0.05)
    tiny_model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return tmp_path


@pytest.mark.slow
def test_the_other_stages_on_two_processes(chat):
    """Evaluation gives the numbers of one process; RL trains, and measures every question once."""
    asked = {"do": "evaluate", "models": {"sft": chat / "sft"}, **ASKED}
    rl = {"dataset": "primer:problem", "examples_per_step": 4, "num_samples": 4, "device_batch_size": 8}
    rl |= {"max_new_tokens": 8, "eval_examples": 5, "eval_samples": 2, "num_iterations": 2, "trl": True}
    assert launch(1, "", [{**asked, "output": chat / "one"}]).returncode == 0
    two = [{**asked, "output": chat / "two"}, {"do": "rl", "model": chat / "sft", "output": chat / "rl", **rl}]
    assert launch(2, "multi_gpu", two).returncode == 0
    one, two = (load_json(chat / name / "metrics.json")["results"]["sft"] for name in ("one", "two"))
    assert set(one) == set(two) and len(one) == 6
    for name in one:
        assert two[name]["n"] == one[name]["n"]
        assert two[name]["value"] == pytest.approx(one[name]["value"], abs=1e-6), name
    metrics = load_json(chat / "rl" / "metrics.json")
    assert metrics["before"]["questions"] == metrics["after"]["questions"] == 5
    assert [row["step"] for row in metrics["history"]] == [1, 2]
    assert NanoChatForCausalLM.from_pretrained(chat / "rl").config.num_hidden_layers == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_trains_sft_like_one_process_and_leaves_a_folder_that_loads(chat, config):
    """DeepSpeed itself, on the CPU: 2 processes against 1, with small rates (AdamW's first steps enlarge rounding).

    Its own Muon takes about the steps of ours, which AdamW would not.
    """
    common = {"do": "sft", "model": chat / "sft", "mixture": [{"dataset": "primer", "rows": 60}], "num_iterations": 6}
    common["init_lr_frac"] = 0.02
    for processes, name in ((1, "one"), (2, "two")):
        job = {**common, "output": chat / name, "device_batch_size": 8 // processes}
        done = launch_zero(processes, config, [job])
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = losses(chat / "one"), losses(chat / "two")
    assert two == pytest.approx(one, abs=1e-5) and two[-1] < two[0]
    assert launch(1, "", [{**common, "output": chat / "plain", "device_batch_size": 8}]).returncode == 0
    before, after, plain = (weights(chat / name) for name in ("sft", "two", "plain"))
    assert set(before) == set(after)
    for name in (name for name in before if name.endswith("_proj.weight") or "fc" in name):
        step, ours = (found[name] - before[name] for found in (after, plain))
        assert step.norm().item() == pytest.approx(ours.norm().item(), rel=0.15), name
        assert torch.nn.functional.cosine_similarity(step.flatten(), ours.flatten(), dim=0) > 0.85, name


@pytest.mark.slow
def test_fsdp2_trains_sft_like_one_process_evaluates_saves_and_resumes(chat):
    common = {"do": "sft", "model": chat / "sft", "mixture": [{"dataset": "primer", "rows": 60}], "num_iterations": 6}
    common |= {"validation": [{"dataset": "primer", "rows": 10}], "init_lr_frac": 0.02}
    common |= {"eval_every": 2, "save_every": 2}
    assert launch(1, "", [{**common, "output": chat / "one", "device_batch_size": 8}]).returncode == 0
    two = {**common, "device_batch_size": 4}
    assert launch(2, "fsdp2", [{**two, "output": chat / "two"}]).returncode == 0
    assert launch(2, "fsdp2", [{**two, "output": chat / "again", "die_at": 5}]).returncode != 0
    shards = list((chat / "again" / "state" / "checkpoint-4").glob("*/__*_0.distcp"))
    assert {path.parent.name for path in shards} == {"optimizer_0", "pytorch_model_fsdp_0"} and len(shards) == 4
    assert launch(2, "fsdp2", [{**two, "output": chat / "again"}]).returncode == 0
    assert losses(chat / "two") == pytest.approx(losses(chat / "one"), abs=2e-5)
    assert losses(chat / "again") == losses(chat / "two")
    one, two, again = (weights(chat / name) for name in ("one", "two", "again"))
    for name in one:
        assert torch.equal(again[name], two[name])
        if one[name].ndim == 2:  # AdamW's first steps on a scalar follow the sign of a gradient that is all but zero
            assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm() + 1e-6, name


@pytest.mark.slow
def test_two_processes_stream_from_the_hub_through_a_stalled_and_a_failing_download(place, tmp_path):
    """Each file is fetched once for both; the run is that on the same files from a folder."""
    texts = [text for _, text in zip(range(900), primer.documents("train", seed=1))]
    files, folder = {}, tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        rows = [json.dumps({"text": text}) for text in texts[300 * number : 300 * (number + 1)]]
        files[f"{number}.jsonl"] = "\n".join(rows).encode()
        (folder / f"{number}.jsonl").write_bytes(files[f"{number}.jsonl"])
    keys = {"num_iterations": 4, "generation": 2, "eval_every": 4}
    with Hub() as hub:
        hub.repos["datasets", "you/texts"] = Repo(commits={"0" * 40: files})
        hub.fail("GET", "resolve/.*/0.jsonl", 0)
        hub.fail("GET", "resolve/.*/1.jsonl", 503)
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        online |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
        jobs = [job(place, "hub", dataset="you/texts", **keys)]
        done = launch(2, "multi_gpu", jobs, **online)
        assert done.returncode == 0
        fetched = [path.rsplit("/", 1)[1] for path in hub.requests if path.startswith("GET") and "resolve" in path]
    assert sorted(fetched) == ["0.jsonl", "0.jsonl", "1.jsonl", "1.jsonl", "2.jsonl"]
    jobs = [job(place, "folder", dataset=str(folder), **keys)]
    assert launch(1, "", jobs).returncode == 0
    assert losses(place / "hub") == pytest.approx(losses(place / "folder"), abs=1e-5)


@pytest.mark.slow
def test_the_scaling_benchmark_prints_its_table(tmp_path):
    words = [sys.executable, str(ROOT / "scripts" / "bench_scaling.py"), "--cpu", "--steps", "3", "--warmup", "1"]
    words += ["--configs", "fsdp2", "--work", str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, check=False, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "fp32" in line]
    assert [row[:2] for row in rows] == [["one GPU, fp32", "1"], ["fsdp2, fp32", "2"]]
    one, two = (float(row[2].replace(",", "")) for row in rows)
    assert rows[0][4] == "100.0%" and float(rows[1][4][:-1]) == pytest.approx(50 * two / one, abs=0.5)
    assert "projected, not run" in done.stdout
