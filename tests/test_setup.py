"""What `make setup` would install, and a wheel that works without a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_pipeline import SHORT

ROOT = Path(__file__).parents[1]


def installed(folder: Path, answer: str | None) -> str:
    """The extras that a dry run names, where nvidia-smi answers this, or is not there."""
    for name in ("make", "python3", "grep", "sh"):
        (folder / name).symlink_to(shutil.which(name))
    if answer is not None:
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=compute_cap ] || exit 1\nprintf '{answer}'\n")
        script.chmod(0o755)
    command = ["make", "-n", "setup", f"VENV={folder}/none"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": str(folder)}, check=True, capture_output=True, text=True
    )
    return re.search(r"-e '\.\[(.*)\]'", done.stdout)[1]


@pytest.mark.parametrize("answer, kernels", [
    (None, False), ("9.0", True), ("12.0\\n12.0", True), ("8.9", False), ("7.5", False), ("8.0\\n9.0", True),
    ("NVIDIA-SMI has failed because it could not communicate with driver 9.9", False),
])  # fmt: skip
def test_setup_installs_the_kernels_where_a_gpu_takes_them(tmp_path, answer, kernels):
    assert installed(tmp_path, answer) == ("dev,kernels" if kernels else "dev")


def test_every_package_of_the_kernels_is_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    names = "triton flash-attn-4 quack-kernels nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base apache-tvm-ffi einops "
    names += "nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13 cuda-python cuda-bindings torch_c_dlpack_ext"
    for name in names.split():
        assert re.search(rf"^{name}==", pins, re.M), name


@pytest.mark.slow
def test_a_wheel_trains_and_evaluates_far_from_a_checkout(tmp_path):
    """Recipes, Accelerate config files, lm-eval tasks and the Space come from the installed package."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    for name in ("nanochat_hf", "recipes", "configs", "scripts", "evals", "spaces"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    python, pip = tmp_path / "venv" / "bin" / "python", [sys.executable, "-m", "pip", "-q"]

    def run(*words) -> str:
        options = {"cwd": elsewhere, "env": environment, "capture_output": True, "text": True, "timeout": 900}
        done = subprocess.run([*map(str, words)], check=False, **options)
        assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    shutil.rmtree(source)
    run(sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", tmp_path / "venv")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # dependencies, already installed
    nanochat = python.with_name("nanochat")
    assert "nanochat COMMAND" in run(nanochat, "--help") and "cpu-demo" in run(nanochat, "recipes")
    tasks = re.search(r"lm-eval tasks +(\S+)", run(nanochat, "env"))[1]
    assert Path(tasks).expanduser() == site / "nanochat_hf" / "shipped" / "evals"
    assert "train step" in run(nanochat, "bench", "--seconds=.2") and "complete" in run(nanochat, "completion", "fish")
    assert f"{site}/nanochat_hf/shipped/recipes/slurm.sh" in run(nanochat, "run", "d12", "--job", "slurm")
    run(nanochat, "demo", "--run-dir", "run", "--stages", "tokenizer,base,sft,eval,report", *SHORT)
    assert (elsewhere / "run" / "report.html").is_file()
    model = f"pretrained={elsewhere}/run/sft,trust_remote_code=True"
    words = ["--tasks", "nanochat_demo_facts", "--include_path", Path(tasks).expanduser(), "--apply_chat_template"]
    words += ["--metadata", "chat_data=run/eval/questions"]
    table = run(python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, *words, "--limit", 2)
    assert "facts" in table and "|acc" in table
    assert "files" in run(nanochat, "push", "--run-dir", "run", "--repo", "me/x", "--space", "--dry-run")
