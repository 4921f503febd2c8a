"""Jobs for rented GPUs and clusters are read by the programs that they are for; completion answers in real shells."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml

from nanochat_hf import cli, jobs
from nanochat_hf.errors import InputError

ROOT = Path(__file__).parent.parent
HF = Path(sys.executable).parent / "hf"


def job(capsys, *words: str) -> str:
    cli.dispatch("run", [*words])
    return capsys.readouterr().out


CONFIG_FILES = [
    ("num_processes: two", "whole numbers of at least 1"), ("num_machines: 0", "whole numbers of at least 1"),
    ("use_cpu: true", "Accelerate cannot launch: A .distributed_type. must be"),
    ("distributed_type: MANY", "Accelerate cannot launch: 'MANY' is not a valid DistributedType"),
]  # fmt: skip


@pytest.mark.parametrize("text,message", CONFIG_FILES)
def test_a_wrong_accelerate_config_file_is_one_line(tmp_path, monkeypatch, text, message):
    for name in ("logging.disable", "signal.signal"):  # the launcher has its process for itself
        monkeypatch.setattr(f"nanochat_hf.jobs.{name}", lambda *_: None)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        cli.dispatch("run", ["cpu-demo", f"--config-file={tmp_path}/mine.yaml", f"--run-dir={tmp_path}/run"])


def test_completion_of_nothing_is_the_commands():
    assert "pretrain" in cli.completions([])


def test_hugging_faces_own_parser_takes_the_command_line_and_has_every_flavor(capsys, tmp_path):
    text = job(capsys, "d24", "--job", "hf", "--gpus", "4", "--sync", "hf://me/d24", "base.depth=20", "--image=me/x")
    script = text.replace("hf jobs run", f"{shlex.quote(str(HF))} jobs run --dry-run")
    environment = {**os.environ, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^ +(\w+) +(.+)$", done.stdout, re.M))
    assert (rows["image"], rows["flavor"], rows["timeout"]) == ("me/x", "h200x4", "4h")
    command = "nanochat run --recipe=d24 base.depth=20 --sync=hf://me/d24 --config-file=multi_gpu --num-processes=4"
    assert rows["command"] == command
    options = subprocess.run([HF, "jobs", "run", "--help"], capture_output=True, text=True, check=True).stdout
    for flavors in yaml.safe_load((ROOT / "configs" / "jobs" / "flavors.yaml").read_text()).values():
        assert all(flavor in re.split(r"[|\[\]\s]+", options) for flavor in flavors.values())


def test_the_command_of_a_job_is_one_of_this_program(capsys, monkeypatch):
    task = yaml.safe_load(job(capsys, "d24", "--job", "sky", "--sync", "s3://b/x", "sft.mixture=[{dataset: a b}]"))
    calls = []
    monkeypatch.setattr(jobs, "launch", calls.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    limit, hours, program, *words = shlex.split(task["run"])
    assert (limit, hours, program) == ("timeout", "5h", "nanochat")
    cli.dispatch(None, words)
    assert calls[0][-4:] == ["speedrun", "--recipe=d24", "sft.mixture=[{dataset: a b}]", "--sync=s3://b/x"]
    assert calls[0][calls[0].index("--num_processes") + 1] == "8" and "multi_gpu.yaml" in " ".join(calls[0])
    one = job(capsys, "d12", "--job", "hf", "--gpus", "1", "--sync", "hf://me/x")
    assert "--config-file=single_gpu --num-processes=1" in one and " --name d12 you/nanochat_hf \\\n" in one
    jobs.check_gpus(None, {"num_processes": 16, "num_machines": 2})  # 8 on each


@pytest.mark.parametrize("gpus,nodes,per_node", [(1, 1, 1), (8, 1, 8), (16, 2, 8)])
def test_a_slurm_script_asks_for_nodes_and_starts_the_launcher_of_the_recipes(capsys, tmp_path, gpus, nodes, per_node):
    words = ["--run-dir", "/shared/my run", "--gpus", str(gpus)]
    (tmp_path / "job.sh").write_text(job(capsys, "d32", "--job", "slurm", *words))
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    text = (tmp_path / "job.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n" in text and f"#SBATCH --gpus-per-node={per_node}\n" in text
    script = text.replace("exec bash", "exec printf '%s\\n'")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(ROOT / "recipes/slurm.sh"), "--recipe=d32", "--run-dir=/shared/my run"]


@pytest.mark.parametrize("kind", ["hf", "sky", "slurm"])
def test_a_job_is_submitted_by_its_own_program_or_refused(capsys, tmp_path, monkeypatch, kind):
    program = {"hf": "hf", "sky": "sky", "slurm": "sbatch"}[kind]
    words = ["d12", "--job", kind, "--hours", "3", "--submit", "--sync", "hf://me/x"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=f"no program '{program}'; the job above is complete"):
        job(capsys, *words)
    capsys.readouterr()
    for name in ("bash", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))
    (tmp_path / program).write_text(
        '#!/bin/bash\necho "$@" > $OUT\n[ -f "${@: -1}" ] && cat "${@: -1}" >> $OUT; exit $CODE\n'
    )
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("CODE", "0")
    text = job(capsys, *words)
    submitted = (tmp_path / "out").read_text()
    assert re.search(r"timeout 3h|--time=0?3:", text) and submitted.splitlines()[0].endswith(
        (".yaml" if kind == "sky" else ".sh") if kind != "hf" else ""
    )
    assert ("jobs run --detach --flavor h200x8" in submitted) if kind == "hf" else submitted.endswith(text)
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(InputError, match="refused the job: exit code"):
        job(capsys, *words)


def test_a_recipe_that_the_image_lacks_is_refused(tmp_path, capsys):
    shutil.copytree(ROOT / "recipes" / "d12", tmp_path / "mine")
    with pytest.raises(InputError, match=r"the image has no .*mine"):
        job(capsys, str(tmp_path / "mine"), "--job", "hf")
    assert "--recipe=d12 " in job(capsys, str(ROOT / "recipes" / "d12"), "--job", "hf")
    (tmp_path / "mine" / "tokenizer.yaml").unlink()
    with pytest.raises(InputError, match="give --hours: the recipe has no"):
        job(capsys, str(tmp_path / "mine"), "--job", "slurm")
    shutil.copy(ROOT / "recipes" / "d12" / "tokenizer.yaml", tmp_path / "mine")
    assert f"--recipe={tmp_path}/mine" in job(capsys, str(tmp_path / "mine"), "--job", "slurm")


def test_the_image_gets_every_folder_that_a_wheel_ships_and_the_pins():
    text = (ROOT / "Dockerfile").read_text()
    sources = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()}
    assert all((ROOT / name).exists() for name in sources)
    folders = re.search(r"FOLDERS = \((.*?)\)", (ROOT / "setup.py").read_text())[1]
    assert {name.split("/")[0] for name in re.findall(r'"(.*?)"', folders)} <= sources
    assert "pip install --no-cache-dir -c constraints.txt" in text and {"pyproject.toml", "constraints.txt"} <= sources


@pytest.mark.parametrize(
    "line,expected",
    [
        ("nanochat pre", ["pretrain"]), ("nanochat run d2", ["d20", "d20-ko", "d24", "d26"]),
        ("nanochat run d24 base.win", ["base.window_pattern="]),
        ("nanochat run d24 --config-file m", ["mps", "multi_gpu", "multi_node"]),
        ("nanochat pretrain --tot", ["--total_batch_size"]), ("nanochat sft cpu", ["cpu-demo", "cpu-demo-ko"]),
        ("nanochat chat --stage ", ["base", "dpo", "mid", "rl", "sft"]),
        ("nanochat serve --max-b", ["--max-batch-size"]), ("nanochat nosuch --x", []),
        ("nanochat data p", ["prepare"]), ("nanochat data prepare x --wor", ["--workers"]),
        ("nanochat run --dry-run d3", ["d32"]), ("nanochat run d12 --dry-run d3", []),
    ],
)  # fmt: skip
def test_completions(line, expected):
    assert cli.completions(line.split(" ")[1:]) == expected


def test_bash_asks_for_completions(tmp_path):
    (tmp_path / "nanochat").write_text(f'#!/bin/bash\nexec {sys.executable} -m nanochat_hf.cli "$@"\n')
    (tmp_path / "nanochat").chmod(0o755)
    script = '. <(nanochat completion bash); complete -p nanochat; COMP_LINE="nanochat exp" nanochat completion words'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    registered, *names = done.stdout.splitlines()
    assert "nanochat completion words" in registered and names == ["export"]


@pytest.mark.parametrize("stages,bundle,checks", [("sft", "x", 0), ("base", "x", 1), ("eval", "x", 1),
                                                  ("eval", None, 0), ("eval", "download", 0)])  # fmt: skip
def test_a_dry_run_checks_the_bundle_that_its_stages_measure(monkeypatch, stages, bundle, checks):
    for name in ("jobs.show_plan", "data.mixture.check_data", "eval.harness.check_bundle"):
        monkeypatch.setattr(f"nanochat_hf.{name}", check := Mock())
    jobs.print_dry_run([stages], {"eval": SimpleNamespace(core_bundle=bundle)})
    assert check.call_count == checks
