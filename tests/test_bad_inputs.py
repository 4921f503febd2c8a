"""Wrong input of every kind is one line that says what to do, exit code 2, and nothing is written.

KEYS are wrong values in a stage's YAML, COMMANDS wrong command lines, FILES broken YAML; then come damaged run
folders and identities. In a command, {run} is a folder that does not exist, {here} one with files. Data that cannot be
read has test_bad_data.py.
"""

import json
import os
import re
import runpy
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState

from nanochat_hf import cli
from nanochat_hf.errors import guarded
from nanochat_hf.run import save_text

ROOT = Path(__file__).parent.parent
COMMAND = {"tokenizer": "tokenizer", "base": "pretrain", "sft": "sft", "rl": "rl", "dpo": "dpo", "eval": "eval"}
LONG = "x" * 300
WHOLE, COUNT, OPTIONAL = "a whole number from 1 to 1000", "a whole number from 1 to 1e", "-1 or a whole number from"
BATCH, STEPS, TEXT = "a whole number from 1 to 100000$", "from 1 to 1000000000$", "from 1 to 100000000000$"

MULTIPLIED = "&a0 [x,x,x,x,x,x,x,x,x]"  # 9**8 texts, written out in an error line
for number in range(1, 8):
    MULTIPLIED = f"&a{number} [{MULTIPLIED}{f',*a{number - 1}' * 8}]"

KEYS = {
    "base": {
        WHOLE: ["depth: 0", "depth: null", "depth: [4]", "depth: 4.5", "depth: true", "depth: .nan", "depth: ''",
                "depth: 2026-01-01", "depth: '010'", "depth: '1:30'"],
        OPTIONAL: ["num_iterations: 0", "total_batch_size: true", "device_batch_size: auto"],
        "a number from 0 to 1000 or null": ["matrix_lr: -1e-3", "unembedding_lr: .nan", "scalar_lr: .inf",
                                            "weight_decay: high", "embedding_lr: 1e15"],
        BATCH: ["device_batch_size: 1e15", "keep_checkpoints: 1.5"],
        STEPS: ["num_iterations: 1e10", "total_batch_size: 2048e11"],
        TEXT: ["eval_tokens: 0", "eval_tokens: 1e15"],
        "from 0 to 1000000000 or null": ["warmup_steps: 1e15"],
        "a number from 0 to 1": ["warmdown_ratio: 2", "final_lr_frac: -0.1"],
        "must be 1 or 2": ["generation: 3", "generation: true"],
        "a multiple of 2 from 2": ["head_dim: 7"],
        "a whole number from 2 to": ["max_seq_len: 1"],
        "a whole number from -1 to": ["save_every: -2", "eval_every: 2.5", "log_every: null"],
        "a whole number from 0 to 4294967295": ["seed: -1", "seed: 1e12"],
        "a number above 0": ["target_flops: 0", "target_param_data_ratio: -1"],
        r"text that matches .*SL": ["window_pattern: SX", "window_pattern: ''"],
        "true or false": ["fp8: 2", "compile: null"],
        "none, trackio": ["report_to: paper"],
        "is not installed; pip install": ["report_to: wandb"],
        "no such attention; did you mean 'sdpa'": ["attn_implementation: sdpaa"],
        "no such attention; known": ["attn_implementation: ../.."],
        "multiple of max_seq_len": ["total_batch_size: 1000"],
        "must be text or a list": ["dataset: 3", "dataset: []", "dataset: {dataset: x}"],
        "it is empty": ["dataset: ''"],
        r"dataset is '[x가]{75} [.]{3}: .* at most 255 bytes": [f"dataset: {LONG}", "dataset: " + "가" * 86],
        r"dataset\[0\] needs a dataset": ["dataset: [{weight: 1}]"],
        r"dataset\[0\] is 'primer': it must be {dataset, weight}": ["dataset: [primer]"],
        r"unknown key 'wieght' in dataset\[0\]; did you mean 'weight'": ["dataset: [{dataset: primer, wieght: 1}]"],
        r"dataset\[1\].weight .* number above 0": ["dataset: [{dataset: a}, {dataset: b, weight: 0}]"],
        "unknown key 'dept' .*did you mean 'depth'": ["dept: 3"],
        "unknown key 1 ": ["1: 2"],
        "known: embedding_lr, .* [.][.][.]$": ["qqq: 1"],
        "occurs twice": ["depth: 3\ndepth: 4"],
        "max_loss_spike is named twice": ["max_spike: 1\nmax_loss_spike: 2"],
        "could not convert string to float: '1:30.5'": ["matrix_lr: 1:30.5", "dataset: [{weight: 1:30.5}]"],
        "aliases make it too large": [f"sample_every: {MULTIPLIED}", f"report_to: {MULTIPLIED}", f"x: {MULTIPLIED}"],
    },
    "tokenizer": {
        "a whole number from 265": ["vocab_size: 100"], "must be 1, 2 or 3": ["digit_group: 4"],
        "must be empty or nfc": ["normalization: nfd"], COUNT: ["doc_cap: -1"],
    },
    "sft": {
        "must be a list of": ["mixture: []", "mixture: primer", "validation: primer"],
        r"mixture\[0\] needs a dataset": ["mixture: [{split: train}]"],
        r"unknown key 'row' in mixture\[0\]; did you mean 'rows'": ["mixture: [{dataset: primer, row: 5}]"],
        r"mixture\[0\].transform is 'gsm9k': it must be messages": ["mixture: [{dataset: x, transform: gsm9k}]"],
        "give rows or epochs, not both": ["mixture: [{dataset: primer, rows: 5, epochs: 1}]"],
        r"rows is .*: it must be a whole number from 1 to": ["mixture: [{dataset: primer, rows: 0}]"],
        r"epochs is .*: it must be a number above 0": ["mixture: [{dataset: primer, epochs: .inf}]"],
        "no kind 'poetry'": ["mixture: [{dataset: 'primer:poetry'}]"],
        "names the kind fact twice": ["mixture: [{dataset: 'primer:fact+talk+fact'}]"],
        r"examples\[0\] is ' *': it must be text that matches": ["examples: ['']", "examples: [' ']"],
        "a number above 0": ["num_epochs: 0"],
        "must be skip or error": ["on_bad_example: stop", "bad_rows: stop"],
        "with packing it must be a multiple": ["max_seq_len: 128\ntotal_batch_size: 1000"],
        "a whole number from 0 to 10000": ["lora_rank: x"],
    },
    "rl": {
        "a whole number from 2 to": ["num_samples: 1"],
        BATCH: ["examples_per_step: 1e9", "device_batch_size: 1e15"],
        "from 1 to 10000$": ["eval_samples: 1e9"],
        "from 1 to 16777216$": ["max_new_tokens: 1e9"],
        "top_k is 50: it must be 0": ["top_k: 50"],
        "above 0 and of at most 5": ["temperature: 0"],
        "give eval_every, too": ["early_stopping_patience: 2"],
        "no kind 'problm'; did you mean 'problem'": ["dataset: 'primer:problm'"], "no kind ''": ["dataset: primer"],
        "enabled is": ["enabled: perhaps", "opt_in: perhaps"],
    },
    "dpo": {"a number above 0": ["beta: 0", "beta: 1e9"], "it is empty": ["split: ''"]},
    "eval": {
        "must be a list of text": ["tasks: nanochat_demo"], r"tasks\[0\] is 3: it must be text": ["tasks: [3]"],
        "unknown task; did you mean 'nanochat_demo_facts'": ["tasks: [nanochat_gsm8k, nanochat_demo_fact]"],
        "words is null: SpellingBee": ["tasks: [nanochat_chatcore]\ndataset: [{dataset: primer}]"],
        r"\[1\] is 'stf': it must be base, mid, sft, rl or dpo; did you mean 'sft'": ["chat_stages: [mid, stf]"],
        "sft is named twice": ["chat_stages: [sft, sft]"],
        "nanochat_demo is named twice": ["tasks: [nanochat_demo, nanochat_demo]"],
        "it needs a temperature": ["num_samples: 2"], "auto, float32 or bfloat16": ["dtype: float12"],
        COUNT: ["max_per_task: 0", "limit: 0", "batch_tokens: 0"],
        BATCH: ["batch_size: 1e15"],
        TEXT: ["bpb_tokens: 1e15"],
    },
}  # fmt: skip

CONFIG = "--config {root}/recipes/cpu-demo/"
slow = partial(pytest.param, marks=pytest.mark.slow)
COMMANDS = [
    ("pretrian", "no command 'pretrian'; did you mean 'pretrain'"),
    ("grpo", "no command 'grpo'; did you mean 'rl'"),
    (f"sft {CONFIG}sft.yaml --output_dir {{run}}", "did you mean '--run-dir'"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --model_name_or_path x", "did you mean '--model'"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --use-peft", "did you mean '--lora-r'"),
    ("run cpu-demo sft.learning_rate=1e-5", "unknown key 'learning_rate' .*did you mean 'matrix_lr'"),
    ("run cpu-demo --base.depth 3", "no dashes: base.depth=3$"),
    ("run d12 --depth 3", "no dashes: base.depth=3$"),
    ("demo --limit=3", "no dashes: eval.max_per_task=3$"),
    ("plan d12 --lora_r --dry-run", "no dashes: mid.lora_r=VALUE or sft.lora_r=VALUE or"),
    ("run cpu-demo --dept 3", "unknown flag '--dept'; did you mean 'depth'"),
    ("run cpu-demo --qqq 3", "unknown flag '--qqq'; known: --help"),
    ("completion words", "^error: shell: 'words': it must be bash, zsh or fish"),  # no shell asks
    ("completion bsh", "^error: shell: 'bsh': it must be bash, zsh or fish; did you mean 'bash'"),
    ("chat runs/d12", "unrecognized arguments: runs/d12; --help lists the flags"),
    (f"eval {CONFIG}eval.yaml --run-dir {{run}} --stages sft --model x", "leave --stages out"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --eval {CONFIG[9:]}eval.yaml", "chatcore_every steps: give"),
    ("run d24 --job slurm --image me/x", "--image is for hf and sky"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --sed 3", "unknown flag '--sed'; did you mean '--seed'"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --depth", "expected one argument"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --matrix_lr -1e-3", "base.matrix_lr is -0.001: .*from 0 to"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --dataset [{{{{dataset:", "no valid YAML list or mapping"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --repo me/x", "push_every and --repo go together"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --push_every 3 --repo x", "owner, as in you/x"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --sync bucket", "--sync: 'bucket'.*no URL"),
    ("run cpu-demo --run-dir {run} --sync hf://me/x/y", "no repo name"),
    ("run cpu-demo --run-dir {run} --sync s3://", "no URL, as s3://bucket/folder"),
    ("run cpu-demo --run-dir {run} --sync file:///", "as file:///mnt/runs"),
    *((f"run cpu-demo --run-dir {{run}} --sync {kind}://x.com/runs", "nothing can be written to a web page")
      for kind in ("https", "github", "zip", "data", "simplecache")),
    ("run cpu-demo --run-dir {run} --sync local://runs", "as file:///mnt/runs"),
    (f"pretrain {CONFIG}base.yaml", "name a recipe, as in nanochat pretrain d12, or --config YAML and --run-dir DIR"),
    (f"pretrain cpu-demo {CONFIG}base.yaml", "name a recipe, .* or --config YAML"),
    ("midtrain d12", "recipe d12 has no stage 'mid'; known: tokenizer, base, sft"),
    ("dpo cpu-demo", "no stage 'dpo'; .*; d12 has one: copy its dpo.yaml, or run that with --run-dir$"),
    ("pretrain cpu-demo --run-dir {run} --model {here} --depth 8", "--depth is not used, as --model has its own"),
    ("chat --model x --prompt \udce9", r"'.udce9' is not UTF-8"),
    ("pretrain d12 base.depth=3", "keys of one stage are flags: --depth=3$"),
    ("sft cpu-demo --run-dir {run}", "starts from a finished earlier stage"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --dataset {{here}} --dry-run", "has no .parquet or .jsonl files"),
    ("report --collection =runs/x", "--collection expects REPO=RUN"),
    ("run cpu-demo --run-dir /dev/null --dry-run", "--run-dir: '/dev/null': /dev/null is no folder"),
    (f"pretrain {CONFIG}base.yaml --run-dir /dev/null/x/y --dry-run", "/dev/null is no folder"),
    ("push --run-dir x --repo you/x --language en,e1", "no ISO code, as en or pt-BR"),
    ("convert --source {here} --output {here}/a/b", "lies inside of .*: choose a folder beside it"),
    ("pretrain --config {here}/none.yaml --run-dir {run}", "cannot read .*none.yaml: No such file"),
    (f"pretrain --config {LONG} --run-dir {{run}}", "at most 255 bytes"),
    (f"pretrain {CONFIG}sft.yaml --run-dir {{run}}", "unknown key 'mixture'"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --stage rl", "--stage: 'rl': it must be mid or sft"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --eval {{here}}/none.yaml", "cannot read .*none.yaml"),
    (f"eval {CONFIG}eval.yaml --run-dir {{run}} --model {{here}}", "it has no tokenizer.json"),
    (f"eval {CONFIG}eval.yaml --run-dir {{run}} --stages bas", r"--stages: \[0\] is 'bas': it must be base, mid"),
    ("speedrun --recipe cpu-dmo --run-dir {run}", "no recipe 'cpu-dmo'.*did you mean 'cpu-demo'"),
    ("speedrun --recipe d25 --run-dir {run}", "take d24, the nearest one, with base.depth=25"),
    ("speedrun --recipe cpu-demo --run-dir {run} --stages bas", "no stage 'bas'; did you mean 'base'"),
    ("speedrun --recipe cpu-demo --run-dir {run} --stages=", "--stages: .*it is empty"),
    ("speedrun --recipe cpu-demo --run-dir {run} bse.depth=3", "no stage 'bse'; did you mean 'base'"),
    ("speedrun --recipe cpu-demo --run-dir {run} depth=3", "expected STAGE.KEY=VALUE, .*, got 'depth=3'"),
    ("speedrun --recipe cpu-demo --run-dir {run} base.depth=", "base.depth is"),
    ("speedrun --recipe cpu-demo --run-dir {run} rl.max_new_tokens=128", "rl.max_new_tokens is 128.*base.max_seq_len"),
    ("speedrun --recipe cpu-demo --run-dir {run} --hourly-rate cheap", "it must be a number from 0 to"),
    ("run cpu-demo --config-file multigpu", "no Accelerate config file multigpu; did you mean 'multi_gpu'"),
    ("run cpu-demo --run-dir {run} --num-processes 64", "64 processes need 64 GPUs, and this machine has"),
    ("run cpu-demo --submit", "--submit is for a job: name --job"),
    ("run cpu-demo --gpu H100", "--gpu is for a job"),
    ("run d24 --job k8s", "--job: 'k8s': it must be hf, sky or slurm"),
    ("run d24 --job hf --dry-run", "leave --config-file and --dry-run out"),
    ("run d24 --job hf --hours 3 --sync file:///runs", "another machine cannot reach file:///runs"),
    ("run d24 --job slurm --hours 3 --sync memory://runs", "another machine cannot reach memory://runs"),
    ("run d24 --job hf --hours 3 --sync nfs4://runs", "no file system of fsspec is called nfs4"),
    ("run cpu-demo --run-dir {run} --stages tokenizer,tokenizer", "tokenizer is named twice"),
    ("scaling --run-dir {run}", "name one recipe, for example scaling/cpu"),
    ("scaling d12", "run-dir"),
    ("scaling d12 --run-dir {run}", "give --depths, for example 4,6,8: recipe d12 has no scaling.yaml"),
    ("scaling scaling/gpu --run-dir {run} --depths 4,x", r"--depths: \[1\] is 'x': it must be a whole number from 1"),
    ("scaling scaling/gpu --run-dir {run} --depths 4,4", "4 is named twice"),
    ("scaling scaling/gpu --run-dir {run} --budgets 0", "must be a number above 0"),
    ("scaling scaling/gpu --run-dir {run} --budgets 1e16 --ratios 8", "give --budgets or --ratios, not both"),
    ("scaling scaling/gpu --run-dir {run} base.depth=4", "base.depth=4: --depths, .* set this key, leave it out"),
    ("scaling scaling/gpu --run-dir {run} base.target_flops=1e9", "base.target_flops=1e9: .* leave it out"),
    ("scaling scaling/cpu --run-dir {run} base.eval_every=0", "base.eval_every is 0, so that no cell has a val bpb"),
    ("scaling scaling/cpu --run-dir {run} --gpus 9", "--gpus 9: this machine has"),
    ("scaling scaling/gpu --run-dir {run} base.dataset=primer", "no GPU found, and 1.0e.17 FLOPs would take this CPU"),
    ("scaling scaling/cpu --run-dir {run} --budgets 1e6 --dry-run", "d2-1e6: the horizon is shorter than one step"),
    *(
        (f"scaling {more} --run-dir {{here}} --fit-only", "--fit-only takes the cells that --run-dir has")
        for more in ("scaling/cpu", "--dry-run", "--depths=4")
    ),
    ("scaling --run-dir {here} --fit-only", "has no finished cell: train some first"),
    ("plan d12 base.dataset=primer:fact", "no such dataset: primer:fact is no file, no folder and no Hub id"),
    ("plan d12 base.dataset=s3://bucket/texts", "no such dataset: s3://bucket/texts is no file, no folder and no"),
    ("plan d24 --gpu CPU --gpus 8", "--gpus counts GPUs: leave it out"),
    ("report --collection me/x=a me/x=b", "me/x is named twice"),
    ("run d24 --job hf --gpus 16", "no machine of 16 x H200; it has 1 x H200, 2 x H200"),
    ("run d24 --job sky --gpus 16", "one machine of up to 8 GPUs; for several nodes use --job slurm"),
    ("run d24 --job sky --gpu H300", "no estimate for H300; give --hours"),
    ("run d24 --job slurm --gpus 12", "12 GPUs are no whole nodes"),
    ("run d24 --job sky --submit", "the run folder is lost with the machine: add --sync"),
    ("run d24 --job sky --hours 3 --gpu H100:{{}}", "--gpu: .*: it must be text that matches"),
    ("run d24 --job hf --image $(id)", "--image: .*: it must be text that matches"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --dry", "did you mean '--dry-run'"),
    (f"dpo {CONFIG}dpo.yaml --run-dir {{run}}", "cannot read .*dpo.yaml"),
    (f"eval {CONFIG}eval.yaml --run-dir {{run}} --words words.txt", "eval.words: none of its tasks uses it"),
    ("bench what", "no benchmark 'what'; known: cpu, gpu"),
    ("export --model me/x --to native --output out", "me/x is no folder, and cannot be downloaded from the Hub"),
    ("push --run-dir x --repo you/x --with mlx,mxl", "mxl"),
    ("export --model {here} --to int8 --output out", "needs the package torchao: pip install torchao|no checkpoint"),
    ("export --model {here} --to ggml --output out", "it must be native, nanochat"),
    ("convert --source {here} --output {here}/out --step 3", "--step chooses among model_NNNNNN.pt files"),
    ("chat --run-dir {here} --stage stf", "it must be base, mid, sft, rl or dpo"),
    ("chat --endpoint http://127.0.0.1:8000 --stage sft", "leave --run-dir, --stage and --device out"),
    ("chat", "name what to talk to"),
    ("chat --model {here}", "no model in"),
    ("chat --endpoint localhost:8000", "must be a URL"),
    ("chat --model x --max-new-tokens 0", "a whole number from 1 to"),
    ("chat --model x --max-new-tokens 1e15", "a whole number from 1 to 16777216"),
    ("serve --model x --max-batch-size 1e15", "a whole number from 1 to 100000"),
    ("identity --identity {root}/recipes/identity.yaml --output {here}/out.jsonl --rows 1e15", "from 1 to 100000"),
    ("chat --model x --temperature 9", "a number from 0 to 5"),
    ("chat --model x --language fr", "it must be en or ko"),
    ("chat --model x --device gpu", "text that matches"),
    ("serve --model x --host 192.0.2.1", "cannot listen on 192.0.2.1, port 8000: .*choose another --port"),
    ("chat --endpoint http://[::1", "must be a URL"),
    ("serve --model x --host=", "--host: .*it is empty"),
    ("serve --model x --host a\0b", "printable characters"),
    ("serve --run-dir {here}", "no finished stage"),
    ("serve --model x --port 99999", "a whole number from 1 to 65535"),
    ("serve --model x --max-batch-size 0", "a whole number from 1 to"),
    ("serve --model x --request-timeout -5", "a number above 0"),
    ("push --run-dir {here} --repo x", "owner, as in you/x"),
    ("push --run-dir {here} --repo a/b --stage dpo2", "it must be base, mid, sft, rl or dpo"),
    ("push --run-dir {here} --repo a/b", "no finished stage with a model"),
    ("convert --source {here} --output {here}/out --to gguf", "it must be hf, native or nanochat"),
    ("convert --source {here}/none --output {here}/out", "."),
    ("report", "name one run with --run-dir, or two or more with --compare"),
    ("report --compare a", "a comparison needs two runs or more"),
    ("compare {here} {here}", "here is named twice"),
    ("plan cpu-demo rl.subset=main", "rl.subset is of a Hub dataset, and primer:problem has none: leave it out"),
    ("plan cpu-demo base.core_metric_every=5", "give eval.core_bundle, too, a folder or download"),
    ("compare a --output b", "a comparison needs two runs or more"),
    ("report --row --compare a b", "--row and --node-hourly-rate are for one run"),
    ("identity --identity x --output y --split test --endpoint http://127.0.0.1:9", "leave one of them out"),
    ("report --run-dir {here}", "holds no finished stage"),
    ("chat --run-dir {root}/README.md", "cannot read .*README.md/base/metrics.json: Not a directory$"),
    ("identity --identity {root}/recipes/identity.yaml --output {here}/out.jsonl --split dev", "train or test"),
    ("identity --identity {root}/recipes/identity.yaml --output {here} --rows 2", "cannot write .*Is a directory"),
    ("identity --identity {root}/recipes/identity.yaml --output . --rows 2", "cannot write [.]:"),
    ("identity --identity {root}/recipes/identity.yaml --output /proc/out.jsonl --rows 2", "cannot write"),
    ("plan", "name a recipe"),
    ("run --dry-run base.depth=4", "name a recipe"),
    ("demo --recipe d12", "--recipe is given twice"),
    ("plan cpu-demo sft.num_epochs=1", "sft.num_epochs is not used, as num_iterations is 300: give sft.num_iterat"),
    ("plan d12 base.num_iterations=5 base.target_param_data_ratio=8", "not used, as num_iterations is 5: give base"),
    ("plan d12 base.num_iterations=1 base.target_flops=1e18", "base.target_flops is not used, as num_iterations is 1"),
    ("plan d12 base.target_flops=1e18 base.target_param_data_ratio=8", "not used, as target_flops is 1e.18"),
    ("run d12 --dry-run base.warmup_steps=3000", "warmup_steps is 3000, and the horizon is 2520 steps: lower it"),
    ("plan d12 base.num_iterations=9 base.warmup_steps=10", "base.warmup_steps is 10, and the run has 9 steps"),
    ("plan d12 base.target_flops=1e29", "the horizon is longer than 1,000,000,000 steps"),
    ("plan d24 --gpus 3", "total_batch_size = 1048576 must be a positive multiple of 6144"),
    ("plan d24 --gpu V100", "--gpu: no data sheet of 'V100'; did you mean 'H100'"),
    ("identity --identity {root}/recipes/identity.yaml --output {here}/out.jsonl --model x", "give that, too"),
    ("recipes --copy d24", "expected 2 arguments"),
    ("run cpu-demo base.depth=12 base.depth=16 --dry-run", "base.depth is given twice"),
    (f"pretrain {CONFIG}base.yaml --run-dir {{run}} --depth 4 --depth=5", "--depth is given twice"),
    (f"sft {CONFIG}sft.yaml --run-dir {{run}} --lora-rank 4 --lora-r 8", "lora_r is named twice"),
    slow(f"eval {CONFIG}eval.yaml --run-dir {{run}} --tasks [nope] --dry-run", "unknown task 'nope'"),  # of 14,000
    ("speedrun --recipe cpu-demo --run-dir {run} --stages tokenizer,sft", "'sft' starts from a finished earlier"),
    ("speedrun --recipe cpu-demo --run-dir {run} --stages base", "has no finished tokenizer"),
    ("env x", "unrecognized arguments: x"),
    ("push --run-dir {here} --repo a/b --license M,IT --dry-run", "--license: 'M,IT': no license"),
    ("push --run-dir {here} --repo a/b --with mlx,mlx --dry-run", "mlx is named twice"),
    ("push --run-dir {here} --repo a/b --language english --dry-run", r"--language: \[0\] is 'english': no ISO code"),
    ("push --run-dir {here} --repo a/b --revision a..b --dry-run", "--revision: 'a..b': no name of a branch"),
    ("push --run-dir {here} --repo a/b --language code --license llama3.1 --revision refs/pr/1", "no finished stage"),
    ("pretrain cpu-demo --run-dir {run} --model {here} --dry-run", "no model in .*here"),
    ("run d12 --dry-run base.dataset=primer:fact", "no such dataset: primer:fact"),
    ("plan d12 base.dataset={here}", "here has no .parquet or .jsonl files"),
    ("plan d12 --stages rl rl.dataset={here}", "here has no .parquet or .jsonl files"),
    ("run d12 --dry-run eval.words={here}", "here has no .parquet or .jsonl files"),
    ("run d12 --dry-run tokenizer.dataset=/proc", "/proc .*: name the folder"),
    ("pretrain cpu-demo --run-dir {run} --tokenizer {here} --dry-run", "no tokenizer in .*here"),
    ("eval cpu-demo --run-dir {run} --model {here} --dry-run", "no model in .*here"),
    ("eval cpu-demo --run-dir {run} --chat_data {root}/README.md --dry-run", "chat_data: no folder .*README.md"),
    ("rl cpu-demo --run-dir {run} --dataset {here} --dry-run", "here has no .parquet or .jsonl files"),
    ("recipes --copy d24 {here}", "exists already: choose another folder"),
    ("run cpu-demo eval.core_bundle=none --dry-run", "none is no CORE bundle"),
    ("run d12 --run-dir {run} base.push_every=5", "base.push_every and --repo go together"),
    ("run d12 --run-dir {run} --hours 3", "--hours is for a job: name --job"),
    ("report --compare {here} {here} --hourly-rate 0", "are for one run"),
    ("chat --model {here} --stage sft", r"name what to talk to .*: --run-dir"),
    ("data", "the following arguments are required: --output|required: action"),
    ("data clean {here} --output out", "it must be prepare"),
    ("data prepare {here}", "required: --output"),
    ("push", "required: --run-dir, --repo"),
    ("convert", "required: --source, --output"),
    ("export", "required: --output, --to"),
    ("identity", "required: --identity/--facts, --output"),
    ("scaling", "required: --run-dir"),
    ("data prepare {here} {here} --output out", "here is named twice"),
    ("data prepare x --output {root}/README.md", "README.md is no folder"),
    ("data prepare x --output out --min-chars -5", "a whole number from 1 to"),
    ("data prepare x --output out --validation 0", "a number above 0 and of at most 0.5"),
    ("data prepare x --output out --dedup exact,fuzzy", "it must be exact or near"),
    ("data prepare x --output out --decontaminat null", "did you mean '--decontaminate'"),
    ("export --model {here} --to mlx --outtype f16 --output {here}/x", "--outtype and --allow-inexact are for --to"),
    ("plan cpu-demo sft.lora_lr=0.1", "sft: lora_alpha and lora_lr are of adapters: give sft.lora_r, too"),
    ("plan cpu-demo rl.lora_r=8 rl.matrix_lr=0.1", "rl.matrix_lr is not used, as lora_r is 8: give rl.lora_r=0, too"),
    ("speedrun cpu-demo --run-dir {run} base.fp8=true", "base.fp8 is true: .* has no FP8"),
    ("plan cpu-demo sft.validation=[] sft.eval_every=5", "sft.eval_every is not used, as validation is none"),
    ("plan cpu-demo eval.dataset=null eval.bpb_tokens=5", "eval.bpb_tokens is not used, as dataset is none"),
    ("plan cpu-demo eval.core_stages=sft", "eval.core_stages is not used, as core_bundle is none"),
    ("plan cpu-demo eval.top_k=5", "eval.top_k is not used, as temperature is none: give eval.temperature, too"),
    ("plan cpu-demo base.core_metric_max_per_task=5", "not used, as core_metric_every is -1"),
    ("scaling scaling/gpu --run-dir {run} --budgets 1e16,1.00001e16 --dry-run", "d[0-9]+-1e16 is named twice"),
    ("scaling cpu-demo --depths 2 --run-dir {run} sft.seed=1 --dry-run", "sft.seed=1 is not used: a series runs"),
    ("report --collection me=a", "--collection is 'me': write the repo with its owner"),
    ("serve --model x --host " + "é" * 70, "cannot listen on é+, port 8000: .*encod.*; choose another"),
    *((f"chat --endpoint {url}", "must be a URL") for url in ("http://a..b", "http://" + "a" * 64)),
    ("identity --identity ~nobody-here/me.yaml --output {here}/out.jsonl", "cannot read ~nobody-here/me.yaml"),
    ("identity --identity recipes/identity.yaml --output {root}/recipes/identity.yaml", "is the identity itself"),
    ("compare {here} {here}/../here", "here is named twice"),
    ("speedrun cpu-demo --run-dir {run} sft.total_batch_size=32", "sft.total_batch_size = 32 must be a positive mult"),
]  # fmt: skip

FILES = [  # content of base.yaml
    (b"- 1", "must be a mapping"), (b"a: [", "is not valid YAML"), (b"depth: 2026-13-45", "is not valid YAML"),
    (b"a: !!python/object:os.system x", "is not valid YAML"), (b"fp8: !!bool perhaps", "is not valid YAML"),
    (b"depth: !!timestamp x", "is not valid YAML"), (b"dataset: \xff\xfe", "is not UTF-8"),
    (b"dataset: \x00", "is not valid YAML"), (b"[" * 1000, "is not valid YAML"),
    (b'dataset: "a\\nb"', "printable characters"), (b"dataset: [{dataset: a, dataset: b}]", "occurs twice"),
    (b'dataset: "\\ud800"', "is not valid YAML: .*surrogates not allowed"),
]  # fmt: skip

METRICS = {b'{"finished": ': "chat", b"[1]": "serve", b"": "report", b"\xff\xfe{": "chat", b"[" * 100_000: "report"}


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Runs a command, and checks that it is refused in one line that matches, with nothing written."""
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    here.mkdir()

    def check(words: list[str], message: str):
        places = {"run": tmp_path / "run", "here": here, "root": ROOT}
        named = re.compile(r"\{(run|here|root)\}|\{\{")
        words = [word.format(**places) if named.search(word) else word for word in words]
        before = files_below(tmp_path)
        with pytest.raises(SystemExit) as caught:
            guarded(lambda: cli.dispatch(None, words))
        error = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and re.search(message, error[-1]), error
        assert error[-1].startswith("error: ") and "Traceback" not in " ".join(error)
        assert files_below(tmp_path) == before

    check.here = here
    return check


ROWS = [(stage, text, m) for stage, messages in KEYS.items() for m, texts in messages.items() for text in texts]


@pytest.mark.parametrize("stage,text,message", ROWS)
def test_a_wrong_key_or_value_in_a_yaml(refuse, stage, text, message):
    (refuse.here / f"{stage}.yaml").write_text(text)
    refuse([COMMAND[stage], "--config", f"{refuse.here}/{stage}.yaml", "--run-dir", "run"], message)


@pytest.mark.parametrize("line,message", COMMANDS)
def test_a_wrong_command_line(refuse, line, message):
    refuse(line.split(), message)


def test_a_mixture_of_a_dry_run_that_no_run_can_open(refuse):
    words = ["sft", "cpu-demo", "--run-dir", "run", "--dry-run", "--mixture"]
    refuse([*words, f"[{{dataset: {refuse.here}}}]"], "here has no .parquet or .jsonl files")
    refuse([*words, "[{dataset: primer, split: nope}]"], "nope")
    refuse([*words, "[{dataset: primer, subset: x}]"], "primer has no subsets")
    refuse([*words, "[{dataset: primer, transform: gsm8k}]"], "does not apply")
    refuse([*words, "[{dataset: primer, rows: 200001}]"], "at most 200,000 rows")
    refuse([*words, f"[{{dataset: {ROOT}/recipes/identity.yaml, split: nope}}]"], "no split 'nope'")
    refuse([*words, f"[{{dataset: {ROOT}/mkdocs.yml}}]"], "is not valid YAML")
    (refuse.here / "train.jsonl").write_text("\n \n")
    for dataset in (refuse.here, refuse.here / "train.jsonl"):
        refuse([*words, f"[{{dataset: {dataset}}}]"], "dataset .* is empty: train.jsonl has no rows")
    refuse(
        ["tokenizer", "cpu-demo", "--run-dir", "run", "--dry-run", "--dataset", "{here}"], "train split .* has no text"
    )
    (refuse.here / "train.jsonl").unlink()
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), refuse.here / "train.parquet")
    refuse([*words, f"[{{dataset: {refuse.here}}}]"], "is empty: train.parquet has no rows")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_finished_stage_that_has_lost_files(refuse, dry):
    files = {"tokenizer": ["tokenizer.json", "tokenizer_config.json"]}
    files["base"] = files["mid"] = [*files["tokenizer"], "config.json", "model.safetensors"]
    for stage, names in files.items():
        (refuse.here / stage).mkdir()
        for name, text in [("metrics.json", '{"finished": true}'), *((name, "") for name in names)]:
            (refuse.here / stage / name).write_text(text)
    (refuse.here / ".lock").touch()
    whole = ["cpu-demo", "--run-dir", "{here}", *dry]
    for stage, name, commands in [
        ("mid", "model.safetensors", (["speedrun"], ["sft"], ["rl"], ["eval"], ["eval", "--stages=mid"])),
        ("mid", "config.json", (["run"], ["speedrun", "--stages=rl"], ["speedrun", "--stages=report"])),
        ("base", "tokenizer.json", (["speedrun", "--stages=base,rl"], ["speedrun", "--stages=eval"])),
        ("tokenizer", "tokenizer_config.json", (["speedrun"], ["speedrun", "--stages=tokenizer"])),
    ]:
        path = refuse.here / stage / name
        for lost in (path.unlink, lambda path=path: path.symlink_to("gone")):
            lost()
            shown = r"\*.safetensors" if name == "model.safetensors" else name
            line = f"here/{stage} is incomplete: the stage has finished, but {shown} is missing; restore it, or"
            for command in commands if dry else [command for command in commands if command != ["run"]]:
                refuse([*command, *whole], line)
        path.unlink()
        path.write_text("")


def test_a_stage_whose_yaml_is_a_link_to_nothing(refuse):
    shutil.copytree(ROOT / "recipes" / "cpu-demo", refuse.here / "mine")
    (refuse.here / "mine" / "sft.yaml").unlink()
    (refuse.here / "mine" / "sft.yaml").symlink_to("gone")
    refuse(["run", "{here}/mine", "--dry-run"], "sft.yaml is no file, or a link to none")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_a_pipe_or_a_device_in_place_of_metrics_json(refuse, make):
    (refuse.here / "base").mkdir()
    make(refuse.here / "base" / "metrics.json")
    refuse(["report", "--run-dir", "{here}"], "metrics.json is a pipe or a device, no file; delete it")
    refuse(["identity", "--identity", "{here}/base/metrics.json", "--output", "x"], "metrics.json is a pipe")


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    save_text(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and not (tmp_path / "pipe").is_file()
    os.close(reader)


@pytest.mark.parametrize("name,value", [
    ("WORLD_SIZE", "abc"), ("WORLD_SIZE", ""), ("RANK", "x"), ("RANK", "7"), ("RANK", "-1"), ("LOCAL_RANK", "1.5"),
    ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "two"),
])  # fmt: skip
def test_a_launcher_s_variable_that_is_no_rank(refuse, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    refuse(["recipes"], f"{name} (is '?)?{value}.*a launcher sets .*unset")


def test_a_variable_that_accelerate_cannot_use(refuse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp17")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    words = ["cpu-demo", "--run-dir", "run", "--stages", "tokenizer"]
    refuse(["speedrun", *words], "fp17.*: unset the variables that a launcher sets")


@pytest.mark.parametrize("file", ["metrics.json", "config.json"])
def test_a_stage_s_folder_as_the_run_folder(refuse, file):
    (refuse.here / file).write_text("{}")
    refuse(["tokenizer", "cpu-demo", "--run-dir", "{here}"], f"here is no run folder, .*{file}: choose another")


@pytest.mark.parametrize("line,message", [
    ("bench --vocab-size -5", "from 265"), ("bench --seconds nan", "above 0"),
    ("bench_decoding --depth 0", "from 1 to"),
    ("bench_decoding --batches 1,-2", r"\[1\] is -2"), ("bench_decoding --tokens 1", "from 2 to"),
    ("bench_decoding --length 3", "must be above 640"), ("bench_decoding --model {here}", "no model in .*here"),
    ("bench_scaling --gpus 0", r"\[0\] is 0"), ("bench_scaling --cpu --recipe nope", "no recipe 'nope'"),
])  # fmt: skip
def test_a_wrong_flag_of_a_benchmark(refuse, monkeypatch, line, message):
    name, *words = line.split()
    script = str(ROOT / "scripts" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *(word.format(here=refuse.here) for word in words)])
    monkeypatch.setattr(cli, "dispatch", lambda *_: runpy.run_path(script, run_name="__main__"))
    refuse([], message)


def test_a_port_that_is_taken(refuse):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuse(["serve", "--model", "x", "--port", str(taken.getsockname()[1])], "cannot listen on .*another --port")


@pytest.mark.parametrize("content,message", FILES)
def test_a_broken_yaml(refuse, content, message):
    (refuse.here / "base.yaml").write_bytes(content)
    refuse(["pretrain", "--config", f"{refuse.here}/base.yaml", "--run-dir", "run"], message)


@pytest.mark.parametrize("content,command", METRICS.items(), ids=METRICS.values())
def test_a_damaged_metrics_json(refuse, content, command):
    (refuse.here / "base").mkdir()
    (refuse.here / "base" / "metrics.json").write_bytes(content)
    refuse([command, "--run-dir", "{here}"], r"metrics\.json is not valid JSON .*delete it to run that stage again")


MEAN = {"label": "", "value": 1}
SHAPES = [  # a finished stage, what is wrong in its metrics.json, and what is said of it
    ("base", {"history": 3}, "history is 3: input should be a valid list"),
    ("base", {"history": [{"step": 1}, {"step": "a"}]}, r"history\[1\].step is 'a': input should be a valid number"),
    ("base", {"wall_time_s": 1e300}, "wall_time_s is 1e.300: input should be a number from"),
    ("base", {"config": {"dataset": [None]}}, r"config.dataset is \[None\]"),
    ("base", {"weights": ["a"]}, r"weights is \['a'\]"),
    ("base", {"hardware": {"memory_bytes": "8"}}, "hardware.memory_bytes is '8'"),
    ("base", {"samples": [{"prompt": "a"}]}, r"samples\[0\] has no text"),
    ("base", {"mixture": [{"dataset": "a", "rows": None, "tokens": 1}]}, r"mixture\[0\].rows is null"),
    ("base", {"task": "\ud800"}, "is not valid JSON .*surrogates"),
    ("eval", {"results": {"bse": {}}}, "results.bse is no valid key"),
    ("eval", {"results": {"base": {"facts": {}}}}, "results.base.facts has no value"),
    ("eval", {"core": {"base": None}}, "core.base is null"),
    ("eval", {"chatcore": {"base": MEAN | {"stderr": -1}}}, "chatcore.base.stderr is -1: input should be greater"),
    *(
        ("eval", {place: {"base": record(name)}}, f"{place}.base{inner}.{name} is 'x'")
        for place, inner, record, names in (
            ("results", ".facts", lambda name: {"facts": {"value": 1, name: "x"}}, "stderr n baseline tool_use value"),
            ("core", ".per_task.a", lambda name: MEAN | {"per_task": {"a": {name: "x"}}}, "centered stderr n acc"),
            ("chatcore", "", lambda name: MEAN | {name: "x"}, "stderr seconds model_seconds value"),
        )
        for name in names.split()
    ),
    ("eval", {"models": {"base": None}}, "models.base is null"),
    ("eval", {"examples": {"base": [5]}}, r"examples.base\[0\] is 5"),
]


@pytest.mark.parametrize("stage,keys,message", SHAPES)
def test_a_metrics_json_of_another_shape(refuse, stage, keys, message):
    for name in ("base", "eval"):
        (refuse.here / name).mkdir()
        record = {"finished": name == "eval", "started": 1.0} | (keys if name == stage else {})
        (refuse.here / name / "metrics.json").write_text(json.dumps(record))
    refused = rf"{stage}/metrics\.json:? {message}.*; delete it to run that stage again"
    refuse(["report", "--run-dir", "{here}"], refused)
    if stage == "base":
        refuse(["push", "--run-dir", "{here}", "--repo", "a/b", "--stage", "base", "--dry-run"], refused)


IDENTITIES = [
    ("- a", "must be a mapping"), ("name: A", "needs a name and an owner"), ("name: [", "not valid YAML"),
    ("{name: A, owner: B, job: C}", "unknown key 'job'"), ("{name: 5, owner: B}", "name is 5: it must be text"),
    ('{name: "\\ud800", owner: B}', "surrogates not allowed"),
    ("{name: A, owner: B, language: xx}", "language is 'xx': it must be en or ko"),
    ("{name: A, owner: B, facts: [{ask: x}]}", r"facts\[0\] needs a say"),
    ("{name: A, owner: B, facts: [{ask: x, say: []}]}", r"facts\[0\].say is \[\]: it must be text"),
    *((f"{{name: A, owner: B, facts: [{{{fact}}}]}}", r"facts\[0\]\.\w+ is .*no characters but spaces")
      for fact in ("ask: x, say: ['']", "ask: x, say: ' '", "ask: [y, ' '], say: x")),
    ("{name: ' ', owner: B}", "name is ' ': it has no characters"),
    ("{name: A, owner: B, styles: [loud]}", r"styles\[0\] is 'loud': it must be {before, after}"),
    ("{name: A, owner: B, styles: [{befor: x}]}", r"unknown key 'befor' in styles\[0\]; did you mean 'before'"),
]  # fmt: skip


@pytest.mark.parametrize("text,message", IDENTITIES)
def test_a_wrong_identity(refuse, text, message):
    (refuse.here / "me.yaml").write_text(text)
    refuse(["identity", "--identity", "{here}/me.yaml", "--output", "out.jsonl", "--rows", "3"], message)


def test_an_identity_is_not_written_over(refuse):
    (refuse.here / "me.yaml").write_text("{name: A, owner: B}")
    refuse(["identity", "--identity", "{here}/me.yaml", "--output", "{here}/me.yaml"], "me.yaml is the identity")
