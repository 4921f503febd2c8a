"""Train a small ChatGPT from nothing, measure it, talk to it, share it.

    nanochat demo                                              # a model in minutes, on this CPU
    nanochat plan d24 --gpus 8                                 # what a recipe would do and cost
    nanochat run d24 --config-file multi_gpu base.depth=18     # the whole recipe, with one key changed
    nanochat chat --run-dir runs/d24

`nanochat COMMAND --help` explains the flags, and all keys of a recipe or stage.
"""

import io
import logging
import os
import re
import shutil
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, StringConstraints

from .config import (
    Count,
    Dir,
    Fraction,
    Length,
    NotNegative,
    Parser,
    Place,
    RepoId,
    Seed,
    Size,
    TopK,
    Unique,
    Word,
    check_value,
    each_once,
)
from .errors import InputError, guarded, in_a_line
from .jobs import ACCELERATE, STAGE_COMMANDS, demo, keys_by_name, plan, run, run_stage_command, speedrun
from .run import MODEL_STAGES, Run, load_json, nearest, or_shipped, project_folder, save_json, save_jsonl, writing
from .series import scaling
from .stage_configs import RECIPES, find_recipe

Temperature = Annotated[float, Ge(0), Le(5)]
Device = Annotated[str, StringConstraints(pattern=r"^(cpu|mps|cuda(:\d+)?)$")]
TEST_TASKS = [f"nanochat_{name}" for name in ("core", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")]
STAGE_HELP = "stage of the run folder whose model is taken (default: the last finished one)"
ENGINES = {  # nanochat export --to: what is written
    "native": "transformers' own nanochat, generation 1",
    "nanochat": "files of karpathy/nanochat",
    "mlx": "for mlx-lm on a Mac",
    "vllm": "nothing, vLLM takes the folder itself",
    "int8": "for transformers with int8 weights",
    "gguf": "for llama.cpp, Ollama and LM Studio, generation 1",
    "onnx": "for onnxruntime, transformers.js and browsers",
}


def matching(what: str, pattern: str):
    """The annotation of text that is all of a pattern; `what` it is follows "no"."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"no {what}")
        return text

    return Annotated[str, AfterValidator(check)]


Branch = matching("name of a branch", r"(?!.*(\.\.|//|@\{|\.lock$|[/.]$))\w[\w./@+-]*")
License = matching("license of the Hub, as apache-2.0", "[a-z0-9][a-z0-9.-]*")
LANGUAGE = r"[a-z]{2,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|\d{3}))?(-[A-Za-z\d]{5,8})*"  # -script, -region, -variant
Language = matching("ISO code, as en or pt-BR", f"{LANGUAGE}|multilingual|code")


def model_options(parser: Parser) -> None:
    parser.option("--run-dir", Place, help="run folder, for example runs/cpu-demo")
    parser.option("--stage", Literal[MODEL_STAGES], help=STAGE_HELP)
    parser.option("--model", Place, help="checkpoint folder or Hub id, in place of --run-dir")


def chosen_model(args, what: str) -> str:
    """The folder or Hub id that `model_options` name. Raises InputError, with `what` to name, if there is none."""
    if bool(args.model) == bool(args.run_dir) or (args.stage and args.model):
        raise InputError(f"name {what}: --run-dir DIR [--stage STAGE] or --model FOLDER_OR_HUB_ID")
    return args.model or str(Run(args.run_dir).model(args.stage))


def chat(parser: Parser, words: list[str]) -> None:
    """Chat in the terminal with a trained model, or with any TGI or OpenAI-compatible server."""
    model_options(parser)
    parser.option("--endpoint", help="URL of a server to talk to; --model is then a name there")
    parser.option("--prompt", str, "-p", help="answer this message and leave; text from a pipe is put below it")
    parser.option("--system", default="", help="system message")
    parser.option("--temperature", Temperature, default=0.6, help="from 0, which is greedy, to 5")
    parser.option("--top-k", TopK, default=50, help="sample among this many tokens; 0: all")
    parser.option("--top-p", Fraction, default=1.0, help="sample among the tokens of this total probability")
    parser.option("--max-new-tokens", Length, default=512, help="most tokens of an answer")
    parser.option("--seed", Seed, help="seed of sampling (default: another one each time)")
    parser.option("--device", Device, help="cpu, mps, cuda or cuda:N (default: the GPU if there is one)")
    parser.option("--language", Literal["en", "ko"], help="language of the interface (default: that of the terminal)")
    args = parser.parse_args(words)
    name = args.model
    if args.endpoint is None:
        name = chosen_model(args, "what to talk to (or --endpoint URL)")
        print(f"loading {name} ...", file=sys.stderr, flush=True)
    elif args.run_dir or args.stage or args.device:
        raise InputError("--endpoint names what to talk to: leave --run-dir, --stage and --device out")
    from .serve.terminal_chat import Chat, Options, open_model, system_language, with_piped

    model = open_model(name, args.endpoint, args.device)
    options = Options(args.temperature, args.top_k, args.top_p, args.max_new_tokens, args.seed)
    conversation = Chat(model, options, args.system, language=args.language or system_language())
    conversation.run() if args.prompt is None else conversation.ask(with_piped(args.prompt))


def serve(parser: Parser, words: list[str]) -> None:
    """Serve a trained model over HTTP: a chat page for browsers, OpenAI's and TGI's routes for programs."""
    model_options(parser)
    parser.option("--host", Place, default="127.0.0.1", help="address; 0.0.0.0 admits the network")
    parser.option("--port", Annotated[int, Ge(1), Le(65535)], default=8000, help="port to listen on")
    parser.option("--max-batch-size", Size, "--rows", default=16, help="requests at a time on each GPU")
    parser.option("--max-queue-size", Size, "--max-waiting", default=64, help="requests that may wait")
    parser.option("--max-new-tokens", Length, default=512, help="most tokens of a completion")
    seconds = Annotated[float, Gt(0), Le(10**6)]
    parser.option("--request-timeout", seconds, "--max-seconds", default=120.0, help="seconds of a completion at most")
    parser.option("--temperature", Temperature, default=0.6, help="temperature of a request without one")
    parser.option("--top-k", TopK, default=50, help="top-k of a request without one")
    parser.option("--device", Device, help="one device (default: a replica on each GPU, else the CPU)")
    args = parser.parse_args(words)
    name = chosen_model(args, "the model")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except (OSError, ValueError, TypeError) as error:  # the last two of a host that cannot be encoded
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {args.host}, port {args.port}: {reason}; choose another --port") from None
    print(f"loading {name} ...", file=sys.stderr, flush=True)
    from .serve.limits import run as serve_app
    from .serve.server import Server
    from .serve.worker import open_workers

    workers = open_workers(name, args.max_batch_size, args.max_queue_size, args.device)
    server = Server(workers, name, args.temperature, args.top_k, args.max_new_tokens, args.request_timeout)
    routes = "/v1/chat/completions, /v1/completions, /v1/models, /generate, /health"
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {name} on http://{host}:{args.port}  (chat page; Ctrl-C stops it)\nroutes: {routes}", flush=True)
    serve_app(server.app, args.host, args.port)


def push(parser: Parser, words: list[str]) -> None:
    """Push a finished stage of a run to the Hub, with its card, and check it by loading it back."""
    parser.option("--run-dir", Place, required=True, help="run folder, for example runs/cpu-demo")
    parser.option("--repo", RepoId, required=True, help="owner/name on the Hub")
    parser.option("--stage", Literal[MODEL_STAGES], help=STAGE_HELP)
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--space", action="store_true", help="also make a Gradio Space that talks to the model")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, send nothing")
    parser.option("--revision", Branch, help="push to this branch")
    parser.add_argument("--force", action="store_true", help="replace other contents of the repo")
    what = "whose model code to push, where the folder's differs from this version's"
    parser.option("--model-code", Literal["package", "folder"], help=what)
    parser.option("--license", License, default="mit", help="license of the model, as the Hub writes it")
    parser.option("--language", Unique[Language], default=["en"], help="comma-separated ISO codes (default: en)")
    parser.option("--base-model", RepoId, help="Hub id of the model that this one continues")
    engines = "comma-separated engines of nanochat export, for example mlx: their files go beside the weights"
    parser.option("--with", Unique[Literal[tuple(ENGINES)]], default=[], dest="engines", help=engines)
    args = vars(parser.parse_args(words))
    from .hub import push as hub

    hub.push(args.pop("run_dir"), hub.Push(**args))


def convert(parser: Parser, words: list[str]) -> None:
    """Convert checkpoints between karpathy/nanochat, this project and transformers' own `nanochat`."""
    parser.option("--source", Place, required=True, help="folder of any of the three")
    parser.option("--output", Place, required=True, help="folder to write: a new one, or --source, to renew it")
    parser.option("--tokenizer", Place, help="folder of the tokenizer (default: --source)")
    parser.option("--step", Annotated[int, Ge(0), Le(10**9)], help="which model_NNNNNN.pt to take (default: the last)")
    kinds = "hf: this project's, native: transformers' own, nanochat: karpathy's"
    parser.option("--to", Literal["hf", "native", "nanochat"], default="hf", help=kinds)
    args = parser.parse_args(words)
    from .convert import upstream
    from .demo import corpus as primer
    from .run import model_fingerprint

    texts = islice(primer.documents("train", seed=0), 5000)
    try:
        record = Path(args.output) / "metrics.json"  # of a run's stage, with the fingerprint of the folder
        describes = record.exists() and load_json(record).get("weights") == model_fingerprint(args.output)
        info = upstream.convert(args.source, args.output, args.to, args.tokenizer, args.step, texts)
        if describes:
            save_json(record, load_json(record) | {"weights": model_fingerprint(args.output)})
    except Exception as error:  # of damaged files: safetensors', json's, tokenizers' have no common type
        says = isinstance(error, InputError | OSError) or type(error) is ValueError  # its subclasses name no file
        what = "" if says else f"{args.source} cannot be read: "
        raise InputError(what + in_a_line(error)) from None
    step = f", step {info['step']}" if info["step"] else ""  # a folder of transformers names none
    print(f"{args.output}: generation {info['generation']}, {info['parameters']:,} parameters{step}")
    if info["tokenizer_ids"] is None:
        print("weights only: give --tokenizer DIR to convert the tokenizer too")
    elif info["tokenizer_ids"]:
        print(f"tokenizer: {info['tokenizer_ids']:,} ids compared, all equal")


def export(parser: Parser, words: list[str]) -> None:
    """Write a model for other software: `nanochat export --run-dir RUN --to mlx --output FOLDER`."""
    model_options(parser)
    parser.option("--output", Place, required=True, help="folder to write; must not exist")
    targets = "; ".join(f"{name}: {what}" for name, what in ENGINES.items())
    parser.option("--to", Literal[tuple(ENGINES)], required=True, help=targets)
    parser.option("--outtype", Literal["f32", "f16", "bf16", "q8_0"], help="of gguf: type of matrices (default: f16)")
    inexact = "of gguf: write a model also where sampling or tokens differ there; its card says how"
    parser.add_argument("--allow-inexact", action="store_const", const=True, help=inexact)
    args = parser.parse_args(words)
    options = {name: value for name in ("outtype", "allow_inexact") if (value := getattr(args, name)) is not None}
    if options and args.to != "gguf":
        raise InputError("--outtype and --allow-inexact are for --to gguf only")
    from .loading import download

    source = download(chosen_model(args, "the model"))
    if Path(source, "adapter_config.json").is_file():
        raise InputError(f"{source} is an adapter: merge it first, with PEFT's merge_and_unload, and save the model")
    if args.to in ("native", "nanochat"):
        dispatch("convert", ["--source", source, "--output", args.output, "--to", args.to])
    else:
        from .export import export as export_model

        print(args.output, *export_model(source, args.output, args.to, **options), sep="\n")


def report(parser: Parser, words: list[str]) -> None:
    """Write a run's report card (report.md, report.html, report.json, plots/), or compare runs."""
    parser.option("--run-dir", Place, help="run folder, for example runs/d12")
    price = "price of the machine in dollars per hour"
    parser.option("--node-hourly-rate", NotNegative, "--hourly-rate", dest="hourly_rate", help=price)
    parser.option("--compare", Place, nargs="+", metavar="RUN", help="as nanochat compare: two run folders or more")
    parser.add_argument("--row", action="store_true", help="only print the run's row of evals/RESULTS.md")
    parser.option("--collection", nargs="+", metavar="REPO=RUN", help="print a Hub collection's text instead")
    args = parser.parse_args(words)
    named = [word.partition("=") for word in args.collection or ()]
    if not all(repo and folder for repo, _, folder in named):
        raise InputError("--collection expects REPO=RUN, for example you/nanochat-d12=runs/d12")
    each_once([check_value(RepoId, repo, "--collection") for repo, _, _ in named])
    if [bool(args.run_dir), bool(args.compare), bool(named)].count(True) != 1:
        raise InputError("name one run with --run-dir, or two or more with --compare")
    if (args.row or args.hourly_rate is not None) and not args.run_dir:
        raise InputError("--row and --node-hourly-rate are for one run: name it with --run-dir")
    if args.compare:
        return dispatch("compare", args.compare)
    from .eval.report import collect, make_report, markdown, results_row
    from .hub.model_card import collection_table

    if named:
        print(collection_table({repo: Run(folder) for repo, _, folder in named}))
    elif args.row:
        path, facts = Path(args.run_dir) / "report.md", collect(Run(args.run_dir))
        print(*(f"note: {note}\n" for note in facts["notes"]), sep="", end="", file=sys.stderr)
        print(results_row(facts, f"[report]({path})" if path.is_file() else "-"))
    else:
        path = make_report(args.run_dir, args.hourly_rate)
        text = markdown(load_json(path.with_suffix(".json")), macro="summary")
        print(text, path, path.with_suffix(".html"), sep="\n")


def identity(parser: Parser, words: list[str]) -> None:
    """Write conversations of an identity to a .jsonl that a recipe can mix in."""
    parser.option("--identity", Place, "--facts", required=True, help="YAML such as recipes/identity.yaml")
    parser.option("--output", Place, required=True, help="the .jsonl to write")
    parser.option("--rows", Size, help="number of conversations (default: 1000)")
    parser.option("--split", Literal["train", "test"], default="train", help="phrasings; those of test are held out")
    parser.option("--endpoint", help="URL of a server whose model writes them")
    parser.option("--model", help="the model's name there")
    parser.option("--seed", Seed, default=0, help="seed of all that is drawn at random")
    args = parser.parse_args(words)
    if args.model and args.endpoint is None:
        raise InputError("--model is the name of a model at --endpoint: give that, too")
    if args.split == "test" and args.endpoint is not None:
        raise InputError("--split selects phrasings, and --endpoint uses none: leave one of them out")
    from .data import identity as library

    person, num = library.read_identity(args.identity), args.rows or library.NUM_CONVERSATIONS
    if Path(args.output).resolve() == or_shipped(args.identity).expanduser().resolve():
        raise InputError(f"{args.output} is the identity itself: choose another --output")
    if args.endpoint is not None:
        from .serve.terminal_chat import Options, RemoteModel

        writer, options = RemoteModel(args.endpoint, args.model), Options(temperature=1.0, max_new_tokens=1024)
        rows, refused = library.generate_with_model(
            person, lambda messages: "".join(writer.answer(messages, options)), num, args.seed
        )
        for reason, count in refused.most_common():
            print(f"left out {count}: {reason}")
    else:
        rows = list(library.conversations(person, args.split, args.seed, num))
    save_jsonl(args.output, rows)
    print(f"{len(rows)} conversations of {person.name} in {args.output}; mix them in: {{dataset: {args.output}}}")


def data(parser: Parser, words: list[str]) -> None:
    """Filter, de-duplicate, shuffle and split text: `nanochat data prepare SOURCE [...] --output DIR`."""
    parser.option("action", Literal["prepare"], help="prepare")
    parser.option("sources", Place, nargs="+", metavar="SOURCE", help="Hub id, folder or file: parquet, jsonl or text")
    parser.option("--output", Dir, required=True, help="folder to write; the same command resumes")
    parser.option("--workers", Size, help="processes, which change nothing in the output (default: one per core)")
    parser.option("--min-chars", Count, default=200, help="drop shorter documents")
    parser.option("--max-chars", Count, help="drop longer documents (default: none)")
    parser.option(
        "--languages", Unique[Word] | None, help="keep these only, as en,ko, by 500 characters of each (default: all)"
    )
    dedup, tasks = Unique[Literal["exact", "near"]] | None, Unique[Place] | None
    parser.option(
        "--dedup", dedup, default=["exact", "near"], help="duplicates to drop (default: exact,near), or null"
    )
    against = "drop documents that share 13 words in a row with test rows of these tasks, or null"
    parser.option("--decontaminate", tasks, default=TEST_TASKS, help=f"{against} (default: {','.join(TEST_TASKS)})")
    parser.option("--core-bundle", Place, default="download", help="folder of CORE's data, or download")
    parser.option("--chat-data", Place, help="folder with local files of the chat tasks; others come from the Hub")
    parser.option("--validation", Annotated[float, Gt(0), Le(0.5)], default=0.01, help="share of the documents")
    parser.option("--seed", Seed, default=0, help="seed of the order, and so of the validation split")
    parser.add_argument("--skip-bad-files", action="store_true", help="leave out and name what cannot be read")
    settings = vars(parser.parse_args(words))
    _, sources, output, workers = (settings.pop(name) for name in ("action", "sources", "output", "workers"))

    def eval_rows():
        from .eval.tasks import eval_rows  # which imports lm-eval

        return eval_rows(settings["decontaminate"], settings["core_bundle"], settings["chat_data"])

    from .data.prepare import prepare

    try:
        workers = workers or len(os.sched_getaffinity(0))
        counts = prepare(each_once(sources), settings, Path(output), workers, eval_rows)
    except ModuleNotFoundError as error:
        raise InputError(f"nanochat data needs the package {error.name}: pip install 'nanochat_hf[data]'") from None
    for step, (documents, chars, _) in counts.items():
        print(f"{step:<15} {documents:>12,} documents {chars:>16,} characters")
    print(f"{output}: finished; train on it with base.dataset={output}")


def compare(parser: Parser, words: list[str]) -> None:
    """Compare runs: `nanochat compare runs/a runs/b [runs/c ...] [--output FOLDER]`."""
    parser.option("runs", Place, nargs="+", metavar="RUN", help="two run folders or more; the first is the reference")
    parser.option("--output", Place, help="folder for the comparison as a page with curves")
    args = parser.parse_args(words)
    if len(args.runs) < 2:
        raise InputError("a comparison needs two runs or more")
    each_once([str(Path(run).resolve()) for run in args.runs])
    from .eval.compare import compare as compare_runs

    print(compare_runs(args.runs, args.output))


def recipes(parser: Parser, words: list[str]) -> None:
    """List the recipes; `nanochat recipes --copy d24 mine/` copies one to edit, for `nanochat run mine/`."""
    parser.option("--copy", Place, nargs=2, metavar=("NAME", "FOLDER"), help="copy a recipe into a new folder")
    if copy := parser.parse_args(words).copy:
        source, target = find_recipe(copy[0]), Path(copy[1])
        if target.exists():
            raise InputError(f"{target} exists already: choose another folder")
        with writing(target):
            shutil.copytree(source, target)
        print(f"{target}: edit its YAML files, then: nanochat run {target}")
        return
    for path in sorted(RECIPES.glob("*/base.yaml")):
        print(f"{path.parent.name:<12} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def env(parser: Parser, words: list[str]) -> None:
    """Print what is installed, which kernels this machine gets and what is missing, for a bug report."""
    parser.parse_args(words)
    from .run import hardware, missing_packages, source, versions
    from .train.model_setup import describe_machine

    facts = {"nanochat_hf": metadata.version("nanochat_hf"), **source(), **versions(), **hardware()}
    facts |= {"training": describe_machine(), "recipes": RECIPES, "lm-eval tasks": project_folder("evals")}
    home = os.path.join(os.path.expanduser("~"), "")
    home = home if os.path.isabs(home) and home != "/" else "~/"  # as in a container
    for name, value in facts.items():
        if value is not None:
            value = f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else str(value)
            print(f"{name.removesuffix('_bytes'):<20} {value.replace(home, '~/')}")
    for requirement in missing_packages():
        name, _, extra = requirement.partition("; extra == ")
        print(f'{"missing":<20} {"of the extra " + extra if extra else "needed"}: pip install "{name}"')


def bench(_: Parser, words: list[str]) -> None:
    """Measure this machine: `nanochat bench [cpu|gpu|decoding|scaling] [...]` runs scripts/bench*.py."""
    kinds = {"cpu": "bench", "gpu": "bench_gpu", "decoding": "bench_decoding", "scaling": "bench_scaling"}
    kind, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("cpu", words)
    if kind not in kinds:
        raise InputError(f"no benchmark {kind!r}; {nearest(kind, kinds)}")
    script = project_folder("scripts", f"{kinds[kind]}.py")
    os.execv(sys.executable, [sys.executable, str(script), *words])


def completion(parser: Parser, words: list[str]) -> None:
    """Complete commands, flags and keys in a shell: `source <(nanochat completion bash)`; fish: `... | source`."""
    if words[:1] == ["words"] and "COMP_LINE" in os.environ:  # a shell's question
        print(*completions(os.environ["COMP_LINE"].split(" ")[1:]), sep="\n")
        return
    parser.option("shell", Literal["bash", "zsh", "fish"], help="bash, zsh or fish")
    shell = parser.parse_args(words).shell
    print(project_folder("configs", "completion", shell).read_text(encoding="utf-8"), end="")


def completions(words: list[str]) -> list[str]:
    """Candidates for the last word: commands, recipes, and what `--help` lists."""
    *before, current = words or [""]
    recipes = [path.parent.name for path in RECIPES.glob("*/base.yaml")]
    files = [path.stem for path in ACCELERATE.glob("*.yaml")]
    values = {"--recipe": recipes, "--stage": MODEL_STAGES, "--config-file": files}
    if not before:
        names = [*COMMANDS, *STAGE_COMMANDS]
    elif before[-1] in values:
        names = values[before[-1]]
    else:
        names = ["prepare"] if before == ["data"] else []
        if before[0] in ("run", "plan", *STAGE_COMMANDS) and not {*recipes} & {*before}:
            names = recipes
        if before[0] in ("demo", "run", "plan", "speedrun"):
            names = [*names, *(f"{name}=" for places in keys_by_name().values() for name in places)]
        with redirect_stdout(io.StringIO()) as output, suppress(SystemExit, InputError):
            dispatch(before[0], ["--help"] if before[0] != "bench" else ["help"])  # else another program takes over
        listed = " ".join(re.findall("^ +-.*", output.getvalue(), re.M))  # texts name flags of other commands
        names = [*names, *re.findall(r"(?<![\w-])--[a-z][\w-]*", listed)]
    return sorted({name for name in names if name.startswith(current)})


COMMANDS: dict[str, Callable] = {
    "demo": demo, "plan": plan, "run": run, "recipes": recipes, "chat": chat, "serve": serve, "report": report,
    "compare": compare, "push": push, "export": export, "convert": convert, "identity": identity, "data": data,
    "scaling": scaling, "env": env, "bench": bench, "completion": completion, "speedrun": speedrun,
}  # fmt: skip


def main(command: str | None = None) -> None:
    """Run `command` with the words of the command line; None: the first of them is the command."""
    if "OMP_WAIT_POLICY" not in os.environ:  # else a thread that waits keeps the core that another one needs
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
    warnings.filterwarnings("ignore", "Argument .* JitArgument")  # of FlashAttention-4 about itself, 300 characters
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        logging.getLogger("DeepSpeed").disabled = True  # Accelerate and transformers import it also where unused
    guarded(lambda: dispatch(command, sys.argv[1:]))


def dispatch(command: str | None, words: list[str]) -> None:
    texts = {name: function.__doc__ for name, function in COMMANDS.items()}
    texts |= {name: text for name, (_, text, _) in STAGE_COMMANDS.items()}
    if command is None:
        parser = Parser(__doc__, prog="nanochat", usage="nanochat COMMAND [--help] [...]")
        parser.epilog = "\n".join(f"  {name:<12} {text}" for name, text in texts.items())
        if words == ["--version"]:
            return print(metadata.version("nanochat_hf"))
        if not words or words in (["-h"], ["--help"], ["help"]):
            return parser.print_help()
        command, words = (words[1], ["--help"]) if words[0] == "help" else (words[0], words[1:])
    if command not in texts:
        raise InputError(f"no command {command!r}; {nearest(command, texts)}")
    parser = Parser(texts[command], prog=f"nanochat {command}")
    if command in COMMANDS:
        COMMANDS[command](parser, words)
    else:
        run_stage_command(parser, command, words)


if __name__ == "__main__":
    main()
