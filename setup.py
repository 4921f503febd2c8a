"""Adds to a wheel the folders that lie beside the package in a checkout; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("recipes", "configs", "scripts", "evals/tasks", "evals/texts", "spaces")  # found by run.project_folder


class BuildWithFolders(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in FOLDERS:
                target = Path(self.build_lib, "nanochat_hf", "shipped", folder)
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithFolders})
