"""The shape of the project: who imports whom, docstrings and sizes, thin scripts."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "nanochat_hf").rglob("*.py") if path.name != "__init__.py")
MAY_IMPORT = {  # folder or file below nanochat_hf -> what of the project it may import besides itself and errors
    "errors": "",
    "metrics": "",
    "run": "metrics",
    "config": "run",
    "loading": "metrics run model",
    "stage_configs": "config run data.transforms demo",
    "stages": "loading config stage_configs run distributed data demo eval hub optim serve train",
    "sync": "run data.hub_files distributed hub.push train.checkpoint",
    "jobs": "config data run stage_configs stages sync optim eval",
    "series": "config stage_configs stages run data eval optim train.runtime",
    "cli": "config stage_configs run jobs series convert data demo eval export hub loading serve train.model_setup",
    "tools": "",
    "tool_loop": "tools",
    "sandbox": "",
    "distributed": "",
    "model": "",
    "convert": "data loading model run tool_loop",
    "export": "convert data loading model run",
    "kernels": "",
    "optim": "model kernels distributed run",
    "demo": "run",
    "data": "config demo run stage_configs",
    "eval": "data demo kernels.decode loading run sandbox stage_configs tools tool_loop distributed optim.scaling",
    "train": "data demo distributed eval.bpb kernels loading metrics model optim run stage_configs tools tool_loop",
    "serve": "config data loading run stage_configs kernels model tools tool_loop",
    "hub": "config convert data eval.plots eval.report eval.weights export loading model run stage_configs tool_loop",
}
EVAL_HELPERS = {"data", "data.grading", "data.tokenizer", "data.transforms"}  # what evals/ may import
EVAL_HELPERS |= {"eval", "eval.bpb", "eval.core", "sandbox", "tools"}
BUDGET = 500  # lines


@cache
def project_imports(path: Path) -> set[str]:
    """The project's modules that a file imports, as dotted names below nanochat_hf."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from ..data import primer` names a module, `from ..run import Run` a thing inside one
            folder = ROOT / module.replace(".", "/")
            names |= {f"{module}.{n.name}" for n in node.names if (folder / f"{n.name}.py").exists()}
            names.add(module)
    return {name.removeprefix("nanochat_hf.") for name in names if name.startswith("nanochat_hf.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "nanochat_hf")))
def test_package_imports_go_one_way(path):
    home = path.relative_to(ROOT / "nanochat_hf").with_suffix("").parts[0]
    allowed = {home, "errors", *MAY_IMPORT[home].split()}
    for name in project_imports(path):  # an allowed module, what is in it, or the package that it is in
        fits = any(f"{name}.".startswith(f"{ok}.") or ok.startswith(f"{name}.") for ok in allowed)
        assert fits, f"{path.name} may not import {name}"


def test_the_model_folder_stands_alone():
    for path in (ROOT / "nanochat_hf" / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name} reaches outside its folder"


@pytest.mark.parametrize("first,second", [("pretrain", "sft"), ("pretrain", "grpo"), ("sft", "grpo")])
def test_training_stages_never_import_each_other(first, second):
    for one, other in ((first, second), (second, first)):
        assert f"train.{other}" not in project_imports(ROOT / "nanochat_hf" / "train" / f"{one}.py")


def test_the_space_needs_no_package():
    for path in (ROOT / "spaces").rglob("*.py"):
        assert not project_imports(path), f"{path} must work from the Hub artifact alone"


def test_task_helpers_import_only_readers_answers_and_tools():
    for path in (ROOT / "evals").rglob("*.py"):
        assert project_imports(path) <= EVAL_HELPERS, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_has_a_docstring_and_a_bounded_length(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "say what the file is for"
    assert len(path.read_text().splitlines()) <= BUDGET, "split or cut"
    assert path.stem not in ("utils", "common", "misc", "helpers")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_thin(path):
    tree = ast.parse(path.read_text())
    assert "python scripts/" in ast.get_docstring(tree), "the docstring shows the command"
    assert len(path.read_text().splitlines()) <= 60 or path.stem.startswith("bench")
    imports = {name.split(".")[0] for name in re.findall(r"^from (\S+) import", path.read_text(), re.M)}
    assert "tests" not in imports


def test_functions_and_classes_are_short_enough_to_read():
    too_long = []
    for path in [*MODULES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "spaces").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                too_long.append(f"{path.stem}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
            if isinstance(node, ast.ClassDef):
                targets = [t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets]
                names = {t.attr for n in targets for t in ast.walk(n) if isinstance(t, ast.Attribute)
                         and isinstance(t.ctx, ast.Store) and getattr(t.value, "id", "") == "self"}  # fmt: skip
                if len(names) > 25:
                    too_long.append(f"{path.stem}.{node.name}: {len(names)} attributes")
    assert not too_long, too_long


def test_no_module_imports_itself_in_a_circle():
    names = {str(path.relative_to(ROOT / "nanochat_hf").with_suffix("")).replace("/", "."): path for path in MODULES}
    graph = {name: {other for other in project_imports(path) if other in names} for name, path in names.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"import circle among {sorted(graph)}"
