"""What every flag of every command does: the calls that a command line leads to, and no key without a reader."""

import ast
import re
import socket
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from nanochat_hf import cli, jobs
from nanochat_hf.errors import InputError
from nanochat_hf.hub.model_card import Push
from nanochat_hf.optim import overview
from nanochat_hf.optim.scaling import HyperparameterDefaults
from nanochat_hf.run import Run, save_json
from nanochat_hf.series import SeriesConfig
from nanochat_hf.serve.terminal_chat import Options
from nanochat_hf.stage_configs import STAGE_CONFIGS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanochat_hf"
DEMO = ROOT / "recipes" / "cpu-demo"
INFO = {"generation": 2, "parameters": 1234, "step": 7}
CPU_YAML, FSDP2_YAML = (str(ROOT / "configs" / "accelerate" / f"{name}.yaml") for name in ("cpu", "fsdp2"))
PUSH = "--private --space --dry-run --revision b --force --model-code folder --license apache-2.0 --language en,ko "
PUSH += "--base-model me/y --with mlx,vllm"
PUSHED = Push(
    "me/x", "sft", True, True, True, "b", True, "folder", "apache-2.0", ["en", "ko"], "me/y", ["mlx", "vllm"]
)
PREPARE = "--min-chars 3 --decontaminate arc_easy --core-bundle c --chat-data d --validation .1 --seed 4 "
PREPARE += "--skip-bad-files --dedup null"
PREPARED = {
    "min_chars": 3, "max_chars": 9, "languages": ["en", "ko"], "dedup": None, "decontaminate": ["arc_easy"],
    "core_bundle": "c", "chat_data": "d", "validation": 0.1, "seed": 4,
    "skip_bad_files": True,
}  # fmt: skip
SERVE = "--port 8001 --device cpu --max-new-tokens 7 --temperature 0.5 --top-k 11"


def served(name, host, port, *limits):
    """The calls of `nanochat serve`: the port is tried, the workers open, the server begins."""
    rows, queue, device, temperature, top_k, tokens, seconds = limits
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    calls = [("create_server", ((host, port),), {"family": family}), ("open_workers", (name, rows, queue, device), {})]
    calls += [("Server", ("open_workers", name, temperature, top_k, tokens, seconds), {})]
    return [*calls, ("run", ("app", host, port), {})]


def converted(*arguments):
    return [("convert", (*arguments, ANY), {})]


def script(name, *words):
    return [("execv", (sys.executable, [sys.executable, f"{ROOT}/scripts/{name}.py", *words]), {})]


def launched(before: list, words: str):
    return [("launch", ([*before, "--module", "nanochat_hf.cli", "speedrun", *words.split()],), {})]


def staged(stage, **options):
    return [("syncing", (options.pop("sync", None), ANY), {}), ("run_stage", (stage, ANY, ANY), options)]


def shown(stages, *arguments, **options):
    return [("show_plan", (stages, ANY, *arguments), options)]


ALL = ["tokenizer", "base", "mid", "sft", "rl", "eval", "report"]
CHAT = "--prompt a --system Be --temperature 0.5 --top-k 3 --top-p 0.9 --max-new-tokens 7 --seed 5 --language ko"
PIPELINE = "--repo me/x --sync memory://y --stages base,eval base.push_every=5"
PASSED = "base.push_every=5 --run-dir={run} --repo=me/x --sync=memory://y --node-hourly-rate=24.0 --stages=base,eval"
CALLS = {  # command line -> the calls that it leads to: name of the function, arguments, keywords
    f"chat --model m --device cpu {CHAT}": [
        ("open_model", ("m", None, "cpu"), {}),
        ("Chat", ("open_model", Options(0.5, 3, 0.9, 7, 5), "Be"), {"language": "ko"}),
        ("ask", ("a",), {}),
    ],
    "chat --endpoint http://h --model n": [
        ("open_model", ("n", "http://h", None), {}),
        ("Chat", ("open_model", Options(0.6, 50, 1.0, 512, None), ""), {"language": "en"}),
        ("run", (), {}),
    ],
    "chat --model m --prompt=0": [ANY, ANY, ("ask", ("0",), {})],
    "chat --run-dir {run} --prompt a": [("open_model", ("{run}/sft", None, None), {}), ANY, ANY],
    "chat --run-dir {run} --stage base --prompt a": [("open_model", ("{run}/base", None, None), {}), ANY, ANY],
    f"serve --model x {SERVE} --host ::1 --max-batch-size 3 --max-queue-size 5 --request-timeout 9": served(
        "x", "::1", 8001, 3, 5, "cpu", 0.5, 11, 7, 9.0
    ),
    "serve --model x --rows 3 --max-waiting 5 --max-seconds 9": served(
        "x", "127.0.0.1", 8000, 3, 5, None, 0.6, 50, 512, 9.0
    ),
    "serve --run-dir {run} --stage base": served(
        "{run}/base", "127.0.0.1", 8000, 16, 64, None, 0.6, 50, 512, 120.0
    ),
    f"push --run-dir {{run}} --repo me/x --stage sft {PUSH}": [("push", ("{run}", PUSHED), {})],
    "push --run-dir {run} --repo me/x": [("push", ("{run}", Push("me/x", language=["en"], engines=[])), {})],
    "convert --source s --output o": converted("s", "o", "hf", None, None),
    "convert --source s --output o --to native --tokenizer t --step 3": converted("s", "o", "native", "t", 3),
    "export --model {run}/sft --output o --to nanochat": converted("{run}/sft", "o", "nanochat", None, None),
    "export --run-dir {run} --stage base --output o --to native": converted("{run}/base", "o", "native", None, None),
    "export --run-dir {run} --output o --to mlx": [("export", ("{run}/sft", "o", "mlx"), {})],
    "export --run-dir {run} --output o --to gguf --outtype q8_0 --allow-inexact": [
        ("export", ("{run}/sft", "o", "gguf"), {"outtype": "q8_0", "allow_inexact": True}),
    ],
    "identity --identity {me} --output o": [("conversations", (ANY, "train", 0, 1000), {})],
    "identity --facts {me} --output o --rows 3 --split test --seed 4": [("conversations", (ANY, "test", 4, 3), {})],
    "identity --identity {me} --output o --endpoint http://h --model n --seed 4": [
        ("RemoteModel", ("http://h", "n"), {}),
        ("generate_with_model", (ANY, ANY, 1000, 4), {}),
        ("answer", ([{"role": "user"}], Options(temperature=1.0, max_new_tokens=1024)), {}),
    ],
    "compare a b": [("compare", (["a", "b"], None), {})],
    "compare a b c --output o": [("compare", (["a", "b", "c"], "o"), {})],
    f"data prepare a b --output o --workers 3 --max-chars 9 --languages en,ko {PREPARE}": [
        ("prepare", (["a", "b"], PREPARED, Path("o"), 3, ANY), {})
    ],
    "bench": script("bench"),
    "bench --seconds 2": script("bench", "--seconds", "2"),
    "bench cpu": script("bench"),
    "bench gpu": script("bench_gpu"),
    "bench decoding": script("bench_decoding"),
    "bench scaling": script("bench_scaling"),
    f"tokenizer --config {DEMO}/tokenizer.yaml --run-dir {{run}} --vocab-size 300": staged("tokenizer"),
    f"pretrain --config {DEMO}/base.yaml --run-dir {{run}} --push-every 3 --tokenizer t --model m --repo me/x": staged(
        "base", tokenizer="t", model="m", repo="me/x"
    ),
    f"pretrain --config {DEMO}/base.yaml --run-dir {{run}} --sync s3://b": staged("base", sync="s3://b"),
    f"midtrain --config {DEMO}/mid.yaml --run-dir {{run}} --eval {DEMO}/eval.yaml --chatcore-every 1": staged(
        "mid", tasks=ANY, required=True
    ),
    f"midtrain --config {DEMO}/mid.yaml --run-dir {{run}} --sync s3://b": staged("mid", sync="s3://b"),
    f"midtrain --config {DEMO}/mid.yaml --run-dir {{run}} --model m --stage sft": staged("sft", model="m"),
    f"sft --config {DEMO}/sft.yaml --run-dir {{run}} --model m --stage mid": staged("mid", model="m"),
    f"sft --config {DEMO}/sft.yaml --run-dir {{run}} --eval {DEMO}/eval.yaml --chatcore-every 9 --sync s3://b": staged(
        "sft", tasks=ANY, required=True, sync="s3://b"
    ),
    f"rl --config {DEMO}/rl.yaml --run-dir {{run}} --model m --sync s3://b": staged("rl", model="m", sync="s3://b"),
    f"dpo --config {ROOT}/recipes/d12/dpo.yaml --run-dir {{run}} --model m --sync s3://b": staged(
        "dpo", model="m", sync="s3://b"
    ),
    f"eval --config {DEMO}/eval.yaml --run-dir {{run}} --stages base,sft": staged("eval", stages=["base", "sft"]),
    f"eval --config {DEMO}/eval.yaml --run-dir {{run}} --model m": staged("eval", model="m"),
    f"speedrun --recipe cpu-demo --run-dir {{run}} --node-hourly-rate 24 {PIPELINE}": [
        ("syncing", ("memory://y", ANY), {}),
        ("run_stages", (ANY, ["base", "eval"], ANY, "me/x", 24.0), {}),
    ],
    "scaling scaling/cpu --run-dir s --depths 2,3 --ratios 8 --gpus 1 base.seed=3": [
        ("train", (ANY, ANY, SeriesConfig(depths=[2, 3], ratios=[8.0]), 1), {}),
        ("make_report", (Path("s"), 24, 8.0, ANY), {}),
    ],
    "scaling d12 --run-dir s --depths 4 --budgets 1e16,3e16 --dry-run": [
        ("show_cells", (ANY, SeriesConfig(depths=[4], budgets=[1e16, 3e16]), None), {}),
    ],
    "scaling --run-dir s --fit-only --predict-depth 20 --predict-ratio 12": [
        ("make_report", (Path("s"), 20, 12.0, None), {}),
    ],
    "speedrun cpu-demo": [("syncing", (None, ANY), {}), ("run_stages", (ANY, ALL, ANY, None, None), {})],
    f"run cpu-demo --run-dir {{run}} --hourly-rate 24 {PIPELINE}": launched([], f"--recipe=cpu-demo {PASSED}"),
    "run --recipe cpu-demo --config-file fsdp2 --num-processes 1": launched(
        ["--config_file", FSDP2_YAML, "--num_processes", "1"], "--recipe=cpu-demo"
    ),
    "demo base.depth=3": launched(["--config_file", CPU_YAML], "--recipe=cpu-demo base.depth=3"),
    "demo --config_file=single_gpu": launched(["--config_file", ANY], "--recipe=cpu-demo"),
    "run cpu-demo --gpus 1 --node-hourly-rate 2": launched(
        ["--num_processes", "1"], "--recipe=cpu-demo --node-hourly-rate=2.0"
    ),
    "plan --recipe cpu-demo": shown(ALL, 1, "CPU", None, rate=None),
    "plan cpu-demo --stages base --gpus 8 --node-hourly-rate 9": shown(["base"], 8, "H200", None, rate=9.0),
    "plan cpu-demo --num-processes 2 --gpu L4": shown(ALL, 2, "H200", "L4", rate=None),
    "run cpu-demo --dry-run --hourly-rate 3": shown(ALL, 1, "CPU", None, None, 3.0),
    "run cpu-demo --dry-run --gpus 8": shown(ALL, 8, "H200", None, None, None),
    "run cpu-demo --dry-run --config-file cpu": shown(ALL, 1, "H200", "CPU", None, None),
    "run cpu-demo --dry-run --config-file multi_node": shown(ALL, 16, "H200", None, None, None),
    "run cpu-demo --dry-run --config-file zero2": shown(ALL, 8, "H200", None, "ZeRO; pretraining: FSDP2", None),
    "run cpu-demo --dry-run --config-file fsdp2 --num-processes 4": shown(ALL, 4, "H200", None, "FSDP2", None),
    "speedrun --recipe=cpu-demo --dry-run --hourly-rate 3": shown(ALL, rate=3.0),
    f"sft --config {DEMO}/sft.yaml --run-dir {{run}} --dry-run": shown(["sft"]),
}  # fmt: skip
TARGETS = "serve.terminal_chat.open_model serve.terminal_chat.Chat serve.terminal_chat.RemoteModel jobs.show_plan "
TARGETS += "serve.worker.open_workers serve.server.Server serve.limits.run hub.push.push convert.upstream.convert "
TARGETS += "series.train series.show_cells eval.scaling_fit.make_report "
TARGETS += "export.export data.identity.conversations data.identity.generate_with_model eval.compare.compare "
TARGETS += "data.prepare.prepare "
TARGETS += "stages.run_stage stages.run_stages sync.syncing jobs.launch cli.os.execv cli.socket.create_server"


def finished_stages(folder: Path) -> Path:
    for stage in ("base", "sft"):
        save_json(folder / stage / "metrics.json", {"finished": True})
    return folder


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Runs a command with all that it calls replaced by a note of the call; {run} is a folder with base and sft."""
    calls, run = [], finished_stages(tmp_path / "run")
    (tmp_path / "me.yaml").write_text("{name: A, owner: B}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.setattr("nanochat_hf.run.Run.require_whole", lambda *_: None)  # these stages have no files
    counts = SimpleNamespace(most_common=list)
    results = {"convert": INFO | {"tokenizer_ids": 300}, "conversations": [], "generate_with_model": ([], counts)}
    results["prepare"] = {"read": [3, 5, 7]}
    results["create_server"] = SimpleNamespace(close=lambda: None)
    answer = lambda *words: calls.append(("answer", words, {})) or ["a", "b"]  # noqa: E731
    results["RemoteModel"] = SimpleNamespace(answer=answer)
    results["train"] = []
    results["Server"], results["syncing"] = SimpleNamespace(app="app"), nullcontext()
    results["Chat"] = SimpleNamespace(
        ask=lambda *words: calls.append(("ask", words, {})), run=lambda: calls.append(("run", (), {}))
    )

    def replace(name, result):
        def note(*arguments, **options):
            calls.append((name, arguments, options))
            return result

        return note

    for target in TARGETS.split():
        name = target.rsplit(".", 1)[1]
        monkeypatch.setattr(f"nanochat_hf.{target}", replace(name, results.get(name, name)))

    def words_of(line):
        return [word.replace("{run}", str(run)).replace("{me}", f"{tmp_path}/me.yaml") for word in line.split()]

    def dispatch(line):
        calls.clear()
        cli.dispatch(None, words_of(line))
        return calls

    dispatch.run = str(run)
    return dispatch


def filled(value, run: str):
    """`value` with the run's folder in the place of {run}."""
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, list | tuple):
        return type(value)(filled(one, run) for one in value)
    return value


@pytest.mark.parametrize("line", CALLS)
def test_a_command_line_leads_to_these_calls(record, line):
    calls = record(line)
    for name, arguments, _ in list(calls):
        if name in ("run_stage", "run_stages"):
            (run,) = (one for one in arguments if isinstance(one, Run))
            assert str(run.path) in (record.run, "runs/cpu-demo")
            config = arguments[2]["base"] if name == "run_stages" else arguments[1]
            for key, value in re.findall(r"(?:--|base\.)(vocab.size|push.every|chatcore.every)[ =](\d+)", line):
                assert getattr(config, key.replace("-", "_")) == int(value)
        elif name == "generate_with_model":
            assert arguments[1]([{"role": "user"}]) == "ab"
        elif name == "convert":
            assert sum(1 for _ in arguments[-1]) == 5000  # texts to compare the tokenizers on
    assert calls == filled(CALLS[line], record.run)


def test_every_flag_is_in_the_table():
    """But those of jobs (test_jobs.py), of the report (test_report.py), of copies, and keys of stages."""
    elsewhere = {"--help", "--job", "--submit", "--gpu", "--hours", "--image", "--copy", "--dry-run"}
    for command in sorted({*cli.COMMANDS, *jobs.STAGE_COMMANDS} - {"report", "demo"}):
        used = {word.partition("=")[0] for line in CALLS if line.split()[0] == command for word in line.split()}
        flags = {flag for flag in cli.completions([command, "--"]) if "_" not in flag}
        keys = STAGE_CONFIGS[jobs.STAGE_COMMANDS[command][0]] if command in jobs.STAGE_COMMANDS else None
        keys = {f"--{field.name}" for field in fields(keys)} if keys else set()
        assert flags <= elsewhere | used | keys, command
        assert flags or command in ("bench", "completion"), command


def test_what_is_converted_is_said_and_the_record_of_a_stage_follows_its_folder(record, capsys, monkeypatch):
    for ids, line in ((300, "tokenizer: 300 ids compared, .*\n"), (0, ""), (None, "weights only: give --token.*\n")):
        info = INFO | {"tokenizer_ids": ids}
        monkeypatch.setattr("nanochat_hf.convert.upstream.convert", lambda *_, info=info: info)
        record("convert --source s --output o")
        assert re.fullmatch(r"o: generation 2, 1,234 parameters, step 7\n" + line, capsys.readouterr().out)
    info["step"] = 0  # unknown
    record("convert --source s --output o")
    assert capsys.readouterr().out.startswith("o: generation 2, 1,234 parameters\n")


def test_an_adapter_is_refused_by_export(record, tmp_path):
    save_json(tmp_path / "lora" / "adapter_config.json", {})
    with pytest.raises(InputError, match="lora is an adapter: merge it first"):
        record(f"export --model {tmp_path}/lora --to mlx --output o")


def test_the_lines_of_serve_and_of_a_run_name_what_they_work_on(record, capsys):
    for host, shown_host in (("::1", "[::1]"), ("127.0.0.2", "127.0.0.2")):
        record(f"serve --model x --host {host} --port 8001")
        out, err = capsys.readouterr()
        assert f"serving x on http://{shown_host}:8001 " in out and "loading x ..." in err
        assert "routes: /v1/chat/completions, /v1/completions, /v1/models, /generate, /health" in out
    record("speedrun cpu-demo")
    assert capsys.readouterr().err == "recipe cpu-demo: loading PyTorch ...\n"
    record("chat --model m --prompt a")
    assert capsys.readouterr().err == "loading m ...\n"


def test_help_version_and_completion_are_what_the_program_has(capsys, monkeypatch):
    def output(*words) -> str:
        try:
            cli.dispatch(None, list(words))
        except SystemExit as ended:
            assert not ended.code
        return capsys.readouterr().out

    listed = re.findall(r"^  (\w+) +(\S.*)$", output().partition("options:")[2], re.M)
    assert {*cli.COMMANDS, *jobs.STAGE_COMMANDS} <= {name for name, _ in listed} and output() == output("--help")
    assert output("help", "chat") == output("chat", "--help") and re.fullmatch(r"\d+\.\d+.*\n", output("--version"))
    for shell in ("bash", "zsh", "fish"):
        assert output("completion", shell) == (ROOT / "configs" / "completion" / shell).read_text()
    assert "of tokenizer, base, mid, sft, rl, dpo, eval, report (default" in " ".join(output("plan", "--help").split())
    monkeypatch.setenv("COMP_LINE", "nanochat recipes ")  # the word after it: a flag
    assert output("completion", "words").split() == ["--copy", "--help"]
    assert cli.completions(["run", "--recipe", "d2"]) == ["d20", "d20-ko", "d24", "d26"]
    monkeypatch.setattr(cli.os, "execv", lambda *_: pytest.fail("completion starts another program"))
    assert cli.completions(["bench", "--s"]) == []
    for command in ("demo", "run", "plan", "speedrun", "chat"):
        assert cli.completions([command, "dpo.be"]) == ["dpo.beta="] * (command != "chat")


DEVICES = [  # of show_plan: arguments, environment, GPU of this machine -> the plan's devices, and whether it is shown
    ({}, {}, None, ("CPU", 1, None, None), True),
    ({}, {"WORLD_SIZE": "4"}, "NVIDIA H100", ("NVIDIA H100", 4, None, None), True),
    (
        {"ranks": 2, "device": "L4", "rate": 5.0, "sharding": "FSDP2"}, {"WORLD_SIZE": "4"}, "X",
        ("L4", 2, 5.0, "FSDP2"), True,
    ),
    ({"otherwise": "H200"}, {"RANK": "1"}, None, ("H200", 1, None, None), False),
]  # fmt: skip


@pytest.mark.parametrize("options,environment,gpu,devices,is_shown", DEVICES)
def test_a_plan_is_for_these_devices(monkeypatch, capsys, options, environment, gpu, devices, is_shown):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(overview, "gpu_here", lambda: gpu)
    monkeypatch.setattr(overview, "pipeline_text", lambda stages, configs, where: f"{stages} {tuple(where)}")
    jobs.show_plan(["base"], {"tokenizer": None}, **options)
    assert capsys.readouterr().out == (f"['base'] {devices}\n" if is_shown else "")
    with pytest.raises(InputError, match="recipe has no tokenizer"):
        jobs.show_plan(["base"], {})
    monkeypatch.setattr("nanochat_hf.eval.tasks.known_tasks", lambda _: capsys.readouterr() and print("looked up"))
    for names, task, shown in ((["eval"], "arc_easy", True), (["eval"], "nanochat_x", False), ([], "arc_easy", False)):
        jobs.show_plan(names, {"tokenizer": None, "eval": SimpleNamespace(tasks=["nanochat_y", task])}, **options)
        assert ("looked up" in capsys.readouterr().out) == shown


ONE, NINE = {"num_processes": 1}, {"num_processes": 9}
PROCESSES = [  # --num-processes, keys of the config file, GPUs, ACCELERATE_USE_CPU -> what is refused
    (None, {}, 0, "", ""), (8, {"num_processes": 2}, 8, "", ""), (None, NINE, 8, "", "9 processes need 9 GPUs"),
    (None, {"num_processes": 16, "num_machines": 2}, 8, "", ""), (18, {"num_machines": 2}, 8, "", "9 processes need"),
    (2, {"use_cpu": True, **ONE}, 0, "", ""), (2, {"distributed_type": "NO"}, 2, "", "not 2: name --config"),
    (1, {"distributed_type": "NO"}, 0, "", ""), (2, {}, 0, "true", "not 2: name"), (2, ONE, 0, "yes", ""),
    (2, ONE, 1, "no", "2 processes need 2 GPUs, and this machine has 1: lower --num-processes"),
    (8, {}, 0, "", "this machine has 0: take --config-file cpu"),
]  # fmt: skip


@pytest.mark.parametrize("number,launch,gpus,use_cpu,message", PROCESSES)
def test_processes_need_as_many_gpus_or_a_cpu_that_was_asked_for(monkeypatch, number, launch, gpus, use_cpu, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        jobs.check_gpus(number, launch)


TRAINING = ("train/trainer.py", "train/model_setup.py", "optim/scaling.py", "optim/overview.py")
CODE = {  # stage -> the modules in which its keys are read
    "tokenizer": ("data/tokenizer.py",),
    "base": ("train/pretrain.py", "optim/scaling.py"),
    **{
        stage: (f"train/{name}.py", "data/mixture.py", *TRAINING)
        for stage, name in (("sft", "sft"), ("rl", "grpo"), ("dpo", "dpo"))
    },
    "eval": ("eval/harness.py", "eval/tasks.py", "eval/lm_eval_model.py"),
}


@pytest.mark.parametrize("stage", CODE)
def test_every_key_of_a_stage_is_read_where_it_works(stage):
    """Of `config` or `stage`, or by its name in text: a key that nothing reads does nothing."""
    names = {field.name for field in fields(HyperparameterDefaults)} | {"enabled", "top_k"}  # rl's top_k is 0 only
    for node in (node for name in CODE[stage] for node in ast.walk(ast.parse((PACKAGE / name).read_text()))):
        if isinstance(node, ast.Attribute) and re.search(r"(^|\.)(config|stage|options)$", ast.unparse(node.value)):
            names.add(node.attr)
        elif isinstance(node, ast.Constant):
            names.add(node.value)
    unread = {field.name for field in fields(STAGE_CONFIGS[stage])} - names
    assert not unread, f"keys of {stage} that its code does not read: {unread}"
