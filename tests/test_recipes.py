"""Every recipe and launch file is read by the parser of real runs; the pipeline refuses what is wrong."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from nanochat_hf import stages as speedrun
from nanochat_hf.data.documents import text_fingerprint
from nanochat_hf.errors import InputError
from nanochat_hf.optim.scaling import plan
from nanochat_hf.run import Run, start_record, write_metrics
from nanochat_hf.train.pretrain_config import PLAN_KEYS

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/base.yaml"))


def test_all_recipes_of_the_readme_are_there():
    assert {"cpu-demo", "d12", "d20", "d24", "d26", "d32"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_recipe_is_known_and_its_plan_can_be_made(name):
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / name, None, [])
    assert stages[0] == "tokenizer" and stages[-1] == "report" and {"base", "sft", "eval"} <= set(stages)
    assert ("rl" in stages) == (name == "cpu-demo")  # opt-in on GPUs
    vocab = configs["tokenizer"].vocab_size
    made = plan(vocab_size=vocab, **{key: getattr(configs["base"], key) for key in PLAN_KEYS})
    assert made.num_iterations > 0 and made.total_batch_size % made.max_seq_len == 0


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "cpu-demo" and not name.endswith("-ko")])
def test_gpu_recipes_name_data_of_the_hub(name):
    _, configs = speedrun.read_recipe(ROOT / "recipes" / name, None, [])
    wanted = "fineweb-edu" if configs["base"].generation == 1 else "climbmix"
    assert wanted in configs["base"].dataset and wanted in configs["tokenizer"].dataset
    named = {entry["dataset"] for entry in configs["sft"].mixture}
    assert {"HuggingFaceTB/smol-smoltalk", "openai/gsm8k"} <= named


def test_overrides_reach_their_stage_and_win():
    overrides = ["base.depth=6", "sft.num_iterations=5", "eval.tasks=[nanochat_gsm8k]"]
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", ["base", "sft"], overrides)
    assert stages == ["base", "sft"] and configs["base"].depth == 6 and configs["sft"].num_iterations == 5
    assert configs["eval"].tasks == ["nanochat_gsm8k"]


def test_another_depth_of_a_recipe_is_planned_from_its_other_keys():
    _, configs = speedrun.read_recipe(ROOT / "recipes" / "d24", None, ["base.depth=18"])
    made = plan(vocab_size=32768, **{key: getattr(configs["base"], key) for key in PLAN_KEYS})
    assert (made.depth, made.hidden_size, made.total_batch_size, made.num_iterations) == (18, 1152, 2**20, 2475)


@pytest.mark.parametrize("name", ["d12", "d24"])
def test_sft_that_follows_pretraining_directly_begins_with_its_momenta(name):
    _, configs = speedrun.read_recipe(ROOT / "recipes" / name, None, [])
    assert configs["base"].save_optimizer and configs["sft"].load_optimizer


@pytest.mark.parametrize(
    "stages,overrides,words",
    [
        (["bas"], [], "did you mean 'base'"),
        (None, ["base.dept=3"], "did you mean 'depth'"),
        (None, ["bse.depth=3"], "did you mean 'base'"),
        (None, ["depth=3"], "expected STAGE.KEY=VALUE"),
        (None, ["base.depth=many"], "invalid int"),
    ],
)
def test_wrong_stages_and_keys_are_named_with_the_nearest_right_one(stages, overrides, words):
    with pytest.raises(InputError, match=words):
        speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", stages, overrides)


def test_an_unknown_recipe_is_named_with_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'cpu-demo'"):
        speedrun.find_recipe("cpu-dmo")


def finished(run: Run, stage: str, config) -> None:
    run.folder(stage).mkdir(parents=True)
    write_metrics(run.folder(stage), start_record(config))


def test_a_recipe_that_changed_since_a_stage_finished_is_reported(tmp_path):
    run = Run(tmp_path)
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", None, [])
    finished(run, "tokenizer", configs["tokenizer"])
    finished(run, "base", configs["base"])
    speedrun.check_run_folder(run, stages, configs)
    _, changed = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", None, ["base.depth=5"])
    with pytest.raises(InputError, match=r"recipe changed since .*base finished \(depth: 4 -> 5\)"):
        speedrun.check_run_folder(run, stages, changed)


def test_a_finished_stage_is_not_mixed_with_a_source_that_runs_again(tmp_path):
    run = Run(tmp_path)
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", None, [])
    finished(run, "sft", configs["sft"])
    with pytest.raises(InputError, match="made before 'tokenizer', which runs again"):
        speedrun.check_run_folder(run, stages, configs)


def test_a_finished_stage_whose_local_text_changed_is_reported(tmp_path):
    text, run = tmp_path / "text.jsonl", Run(tmp_path / "run")
    text.write_text('{"text": "one"}\n' * 20)
    words = [f"tokenizer.dataset={text}", f"base.dataset={text}"]
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", None, words)
    for stage in ("tokenizer", "base"):
        run.folder(stage).mkdir(parents=True)
        write_metrics(run.folder(stage), start_record(configs[stage]), inputs={"data": text_fingerprint(str(text))})
    speedrun.check_run_folder(run, stages, configs)
    text.write_text('{"text": "two"}\n' * 20)
    for chosen in ("tokenizer", "base"):
        with pytest.raises(InputError, match=rf"text of .*text.jsonl changed since .*{chosen} finished"):
            speedrun.check_run_folder(run, [chosen], configs)
    text.unlink()  # gone, as after a move: nothing to compare
    speedrun.check_run_folder(run, stages, configs)


def test_a_stage_that_says_nothing_but_finished_is_no_traceback(tmp_path):
    run = Run(tmp_path)
    stages, configs = speedrun.read_recipe(ROOT / "recipes" / "cpu-demo", None, [])
    for stage in ("tokenizer", "base"):
        run.folder(stage).mkdir()
        (run.folder(stage) / "metrics.json").write_text('{"finished": true}')
    speedrun.check_run_folder(run, stages, configs)


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"), Run(tmp_path / "file" / "run").lock():
        pass


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and str(config.compute_environment).endswith("LOCAL_MACHINE")
    keys = yaml.safe_load(path.read_text())
    assert set(keys) >= {"distributed_type", "mixed_precision", "num_processes"}
    assert keys.get("gpu_ids", "all") == "all"  # any other value would overrule CUDA_VISIBLE_DEVICES without a word


def test_the_example_numbers_of_the_readme_are_the_plans():
    text = (ROOT / "README.md").read_text()
    for name in ("d12", "d20", "d24", "d26", "d32"):
        _, configs = speedrun.read_recipe(ROOT / "recipes" / name, None, [])
        made = plan(
            vocab_size=configs["tokenizer"].vocab_size,
            **{key: getattr(configs["base"], key) for key in PLAN_KEYS},
        )
        row = next(line for line in text.splitlines() if line.startswith(f"| [{name}]"))
        assert f"{made.total_tokens / 1e9:.1f}B" in row and f"{made.total_flops:.1e}".replace("e+", "e") in row
        size = (
            f"{made.num_parameters / 1e9:.2f}B" if made.num_parameters >= 1e9 else f"{made.num_parameters / 1e6:.0f}M"
        )
        assert size in row
