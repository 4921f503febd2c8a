"""What `make setup` would install: the kernels on machines with a GPU for them, and their pins."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
