"""The task files: they load in lm-eval, refuse damaged rows, build upstream's prompts and grade; results are read."""

import json
import re
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import _import_func_in_yml, load_yaml

from nanochat_hf.errors import InputError
from nanochat_hf.eval.core import load_tasks, run_lm_eval
from nanochat_hf.eval.harness import EvalConfig, format_result
from nanochat_hf.eval.lm_eval_model import LocalLM
from nanochat_hf.eval.report import metrics_by_stage
from nanochat_hf.eval.tasks import Tasks, majority, sample_row, standard_error
from nanochat_hf.run import save_jsonl

TASKS = Path(__file__).parent.parent / "evals" / "tasks"


def function(name):
    """A function of evals/tasks as lm-eval imports it."""
    return _import_func_in_yml(name, TASKS)


def manager(**metadata):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path.parent)


def test_every_file_is_indexed_with_a_version_and_the_groups_are_complete():
    index = manager().task_index
    for path in TASKS.glob("*.yaml"):
        config = load_yaml(path, resolve_func=False)
        if "task" in config:
            assert config.get("group", config["task"]) in index and "version" in config["metadata"], path
    groups = {"core": 22, "chatcore": 6, "demo": 5, "ko": 5}
    for group, size in groups.items():
        tasks = index[f"nanochat_{group}"].cfg["task"]
        assert len(tasks) == size and all(name in index for name in tasks)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "humaneval"])
def test_a_damaged_file_of_a_chat_task_is_named_with_its_line(tmp_path, name):
    file = load_yaml(TASKS / f"{name}.yaml", resolve_func=False)["dataset_kwargs"]["file"]
    for content in (b"", b"{\n", b'{"question": "?"}\n', b"\xff\n"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file}(, line 1: | is empty)") as error:
            manager(chat_data=str(tmp_path)).load([f"nanochat_{name}"])
        assert "\n" not in str(error.value)


ARC = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
MMLU = {"question": "?", "choices": ["a", "b"], "answer": 0}
GSM8K = {"question": "?", "answer": "#### 1"}


@pytest.mark.parametrize("name,good,bad,reason", [
    ("mmlu", MMLU, MMLU | {"answer": 2}, "answer 2 is none of the choices"),
    ("mmlu", MMLU, MMLU | {"answer": -1}, "answer -1 is none of the choices"),
    ("arc_easy", ARC, ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 choices and 1 letters"),
    ("mmlu", MMLU, {"question": "?", "choices": ["a", "b"]}, "KeyError: 'answer'"),
])  # fmt: skip
def test_choices_without_their_answer_are_named(tmp_path, name, good, bad, reason):
    folder = write(tmp_path / f"{name}_test.jsonl", [good, bad])
    with pytest.raises(ValueError, match=rf"{name}_test\.jsonl, line 2: not a row of this task \(.*{reason}"):
        manager(chat_data=folder).load([f"nanochat_{name}"])


COPA = "sentence\tquestion\t1\t2\tAnswer\n"
HELLASWAG = "context\tchoice1\tchoice2\tchoice3\tchoice4\tlabel\n"


@pytest.mark.parametrize("task,content,reason", [
    ("COPA", "sentence\tquestion\t1\tAnswer\n", "1: no column '2'"),
    ("COPA", COPA + "a\tb\tc\td\t1\na\tb\tc\td\t3\n", "3: the label is '3'"),
    ("BoolQ", "Text\tQuestion\tAnswer\na\tb\n", "2: 2 of 3 columns"),
    ("HellaSwag", HELLASWAG + "a\xff", "2: no UTF-8"),
])  # fmt: skip
def test_a_damaged_file_of_kobest_is_named_with_its_line(tmp_path, task, content, reason):
    path = tmp_path / task / "test.tsv"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"test\.tsv, line {reason}"):
        function("ko.kobest")(task, chat_data=str(tmp_path))


def test_rows_come_from_the_first_folder_that_has_them_and_may_have_other_fields(tmp_path):
    rows, folder = function("utils.rows"), write(tmp_path / "x.jsonl", [{"a": "1", "id": 1}, {"a": "2", "id": ["x"]}])
    write(tmp_path / "later" / "x.jsonl", [{"a": "3"}])
    folders = [None, str(tmp_path / "no"), folder, str(tmp_path / "later")]
    assert rows("x.jsonl", ["a"], chat_data=folders)["test"].to_list() == [{"a": "1"}, {"a": "2"}]
    with pytest.raises(ValueError, match="no file y"):
        rows("y.jsonl", ["a"], chat_data=folder)


# ---- prompts and graders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row,letters", [(MMLU | {"answer": 1}, "AB"), (ARC | {"answerKey": "B"}, "AB")])
def test_choices_stand_before_their_letters(tmp_path, row, letters):
    folder = write(tmp_path / "arc_easy_test.jsonl", [row])
    task = manager(chat_data=folder).load(["nanochat_arc_easy"])["tasks"]["nanochat_arc_easy"]
    doc, request = task.eval_docs[0], "Respond only with the letter of the correct answer."
    assert task.doc_to_text(doc) == f"Multiple Choice question: ?\n- a=A\n- b=B\n\n{request}"
    assert task.doc_to_choice(doc) == list(letters)
    assert task.process_results(doc, [(-2.0, False), (-1.0, True)])["acc"] == 1.0
    assert task.process_results(doc, [(-1.0, False), (-1.0, True)])["acc"] == 0.0


def test_accuracies_are_centered_on_their_baseline():
    for name, baseline in (("centered20", 0.2), ("centered25", 0.25), ("centered50", 0.5)):
        items = [1, 0, 1, 1, 0]
        assert function(f"utils.{name}")(items) == pytest.approx((0.6 - baseline) / (1 - baseline))


def test_hash_answers_are_compared_as_text():
    grade = function("utils.hash_results")
    doc = {"answer": "She has <<2*9=18>>18.\n#### 1,018"}
    assert grade(doc, ["first #### 1018 and more"])["acc"] == 1
    assert grade(doc, ["#### 1018.0"])["acc"] == 0
    samples = [["#### 3", "#### 2", "none", "#### 3"]]
    expected = {"acc": 0.5, "centered": 0.5, "pass@2": 1 - 1 / 6, "pass@4": 1.0}  # one of six pairs has no right one
    assert grade({"answer": "3"}, samples) == pytest.approx(expected)


def test_the_lm_eval_cli_reports_no_tool_use_of_the_demo_since_it_cannot_see_the_calls():
    grade, doc = function("utils.primer_results"), {"kind": "arithmetic", "answer": "4"}
    call = "<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|>4"
    assert grade(doc, [call]) == {"acc": 1}
    assert grade(doc, [["It is 4.", call]]) == {"acc": 1, "pass@2": 1}


HUMANEVAL = {
    "prompt": "from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    '''Doubles.'''\n",
    "test": "def check(f):\n    assert f([1, 2]) == [2, 4]\n",
    "entry_point": "double",
}


@pytest.mark.parametrize("text,passed", [
    ("Sure!\n```python\ndef double(xs: List[int]):\n    return [2 * x for x in xs]\n```\nDone.", 1.0),
    ("def double(xs: List[int]):\n    return [2 * x for x in xs]", 1.0),
    ("```\ndef double(xs):\n    return xs\n```", 0.0),
    ("```python\ndef double(xs):\n    return [x + x for x in xs]\n```\nUse it:\n```\ndouble(1)(\n```", 1.0),
    ("```\ndef double(xs):\n    return xs\n```\n```\ndef double(xs):\n    return [x + x for x in xs]\n```", 0.0),
    ("Sure!\n```py\ndef double(xs):\n    return [x + x for x in xs]\n```", 1.0),
    ("Sure!\n```Python3\ndef double(xs):\n    return [x + x for x in xs]\n```", 1.0),
    ("```python\ndef double(xs):\n    return [x + x for x in xs]\n", 1.0),
    ("```python\ndef double(xs):\n    return [x + x for x in xs]```\nIt adds.", 1.0),
    ("```python\ndef double(xs):\n    return xs", 0.0),
    ("1. So:\n   ```python\n   def double(xs):\n       return [x + x for x in xs]\n   ```\nDone.", 1.0),
    ("- ```python\n  def double(xs):\n      return [x + x for x in xs]\n  ```", 1.0),
    ("So:\n\n    ```py\n    def double(xs):\n        return [x + x for x in xs]\n    ```\nDone.", 1.0),
    ("So:\n\n    ```\n    def double(xs):\n        return xs\n    ```\nDone.", 0.0),
    ("~~~python\r\ndef double(xs):\r\n    return [x + x for x in xs]\r\n~~~\r\nDone.", 1.0),
    ("So: ```python\ndef double(xs):\n    return [x + x for x in xs]\n```", 1.0),
    ("```bash\npip\n```\nThen\n```{.python3}\ndef double(xs):\n    return [x + x for x in xs]\n```", 1.0),
    ("Write:\n\n    from math import pi\n\n    def double(xs):\n        return [x + x for x in xs]\n\nDone.", 1.0),
    ("    def double(xs):\n        return [f(x) for x in xs]\n\n    def f(x):\n        return 2 * x", 1.0),
    ("Write:\n\n\tdef double(xs):\n\t\treturn xs\n\nDone.", 0.0),
    ("class A:\n\n    def double(self, xs):\n        return [x + x for x in xs]\n\ndouble = A().double", 1.0),
    ("def double(xs):\n    \"\"\"Two.\n\n    ```\n    f(\n    ```\n    \"\"\"\n    return [x + x for x in xs]", 1.0),
    ("'Twice.'\nfrom __future__ import annotations\ndef double(xs: Own): return [2 * x for x in xs]", 1.0),
    ("I do not know.", 0.0),
])  # fmt: skip
def test_humaneval_answers_are_run_with_the_tests(text, passed):
    results = function("utils.humaneval_results")(HUMANEVAL, [text])
    assert (results["acc"], results["unchecked"]) == (passed, 0.0)


def test_tests_of_humaneval_that_cannot_be_checked_are_counted_and_said():
    doc = HUMANEVAL | {"test": "class Own: pass\ndef check(f):\n    f([Own()])\n"}
    results = function("utils.humaneval_results")(doc, [["def double(xs):\n    return xs", "no program"]])
    assert (results["acc"], results["unchecked"]) == (0.0, 0.5)
    result = {"value": 0.5, "n": 4, "unchecked": 2}
    assert format_result(result).endswith(", 2 of 4 tests cannot be checked and count as wrong")


def test_words_of_a_docstring_are_no_imports():
    prompt = "# Halves.\nimport math\n\n\ndef half(x):\n    '''Half of x,\n    from below up.\n    '''\n"
    doc = {"prompt": prompt, "test": "def check(f):\n    assert f(3) == math.ceil(1.5)\n", "entry_point": "half"}
    assert function("utils.humaneval_results")(doc, ["def half(x):\n    return math.ceil(x / 2)"])["acc"] == 1.0


def test_what_a_prompt_defines_judges_the_answer_and_not_the_answers_own():
    prompt = "def poly(x):\n    return x - 3\n\n\ndef root():\n    '''The zero of poly.'''\n"
    doc = {"prompt": prompt, "test": "def check(f):\n    assert poly(f()) == 0\n", "entry_point": "root"}
    answers = [["def poly(x):\n    return 0\ndef root():\n    return 7", f"{prompt}    return 3"]]
    assert function("utils.humaneval_results")(doc, answers)["acc"] == 0.5


# ---- our runner and the lm-eval CLI ---------------------------------------------------------------------------------


def both(model, tokenizer, task_manager, name, chat):
    """The output of a task by our runner and by lm-eval's own."""
    ours = run_lm_eval(LocalLM(model, tokenizer, EvalConfig()), load_tasks(task_manager, [name]), None, chat, True)
    cli = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=5)
    options = {"task_manager": task_manager, "apply_chat_template": chat, "bootstrap_iters": 0}
    return ours, simple_evaluate(model=cli, tasks=[name], **options)


def test_bits_per_byte_are_the_same_by_hand_here_and_by_the_lm_eval_cli(tmp_path, tiny_folder, tiny_model, tokenizer):
    texts = ["The owl lives in the old tree.", "안녕하세요", "word " * 300, " \n"]  # third: too long
    nats = size = 0
    for text in texts[:3]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = torch.tensor([tokenizer.bos_token_id, *ids])
        for begin in range(0, len(ids) - 1, 128):
            part = ids[begin : begin + 129][None]
            with torch.inference_mode():
                scores = tiny_model(part[:, :-1], use_cache=False).logits.log_softmax(-1)
            nats -= scores.gather(2, part[:, 1:, None]).sum().item()
        size += len(text.encode())
    folder = write(tmp_path / "held_out.jsonl", [{"text": text} for text in texts])
    task_manager = manager(chat_data=folder, pretrained=str(tiny_folder))
    for output in both(tiny_model, tokenizer, task_manager, "nanochat_bpb", chat=False):
        value = output["results"]["nanochat_bpb"]["bits_per_byte,none"]
        assert value == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    with pytest.raises(ValueError, match=r"no file held_out\.jsonl"):
        _ = manager().load(["nanochat_bpb"])["tasks"]["nanochat_bpb"].test_docs()


def test_multiple_choice_is_the_same_by_our_runner_and_by_the_lm_eval_cli(tmp_path, lively_model, tokenizer):
    words = ["red", "green", "blue", "old", "new"]
    rows = [
        {"question": f"Is {i} {words[i % 5]}?", "choices": [words[(i + j) % 5] for j in range(4)], "answer": i % 4}
        for i in range(12)
    ]
    task_manager = manager(chat_data=write(tmp_path / "arc_easy_test.jsonl", rows))
    ours, cli = both(lively_model, tokenizer, task_manager, "nanochat_arc_easy", chat=True)
    scores = []
    for output in (ours, cli):
        samples = sorted(output["samples"]["nanochat_arc_easy"], key=lambda sample: sample["doc_id"])
        scores.append([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    assert np.allclose(*scores, atol=1e-4)
    for metric in ("acc,none", "centered,none"):
        assert ours["results"]["nanochat_arc_easy"][metric] == cli["results"]["nanochat_arc_easy"][metric]
    [task] = load_tasks(task_manager, ["nanochat_arc_easy"]).values()
    assert task.fewshot_rnd.random() == Random(1234).random()  # the CLI's seed: the same few-shot examples


def test_of_several_ways_to_read_an_answer_the_first_is_the_value(tmp_path, tiny_model, tokenizer):
    """As lm-eval's own gsm8k does. Two tasks of one alias keep their names."""
    folder = write(tmp_path / "rows.jsonl", [{"question": f"What is {i}?", "answer": str(i)} for i in range(5)])
    template = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder}/rows.jsonl"}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "task_alias": "math", "generation_kwargs": {"until": ["<|assistant_end|>"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in (("strict", r"#### (\d)"), ("flexible", r"(\d)"))
        ],
    }  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **template}))
    tasks = object.__new__(Tasks)
    tasks.config, tasks.chat, tasks.members = EvalConfig(), [], lambda kind: []
    task_manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks.loaded = load_tasks(task_manager, ["one", "two"])
    says_three = SimpleNamespace(generate=lambda prompts, **options: [[tokenizer.encode("3")[1:]] for _ in prompts])
    lm = LocalLM(tiny_model, tokenizer, EvalConfig(), says_three)
    (one, samples), (two, _) = (tasks.run(name, lm) for name in ("one", "two"))
    results = one | two
    assert [row["correct"] for row in samples] == [0] * 5  # so that runs can be compared question by question
    assert set(results) == {"one", "two"} and results["one"] == results["two"]
    tasks.config, tasks.manager = EvalConfig(tasks=["one"], num_samples=2, temperature=1), task_manager
    with pytest.raises(InputError, match="num_samples is 2: one of lm-eval grades one answer"):
        tasks.load()
    result = results["one"]
    assert (result["value"], result["n"], result["exact_match,flexible"]) == (0, 5, 0.2)
    report = metrics_by_stage({"one": {"sft": result}}, errors=True)
    assert re.search(r"one, exact_match,flexible +\| 0.2000 ", report) and len(report.splitlines()) == 4


@pytest.mark.parametrize("text_stages, tasks", [(None, ["chat", "text"]), ([], ["chat"]), (["base"], ["chat"])])
def test_tasks_of_plain_text_have_stages_of_their_own_or_those_of_the_chat_tasks(text_stages, tasks):
    config = SimpleNamespace(chat_stages=["sft"], text_stages=text_stages)
    assert Tasks.of(SimpleNamespace(config=config, loaded=["chat", "text"], chat=["chat"]), "sft") == tasks


def test_a_multiple_choice_sample_shows_the_score_of_each_letter():
    scores = {"arguments": [("Sky?", "A"), ("Sky?", "B")], "filtered_resps": [(-2.0001, False), (-0.5, True)]}
    sample = {"doc": {"prompt": "Sky?", "letters": ["A", "B"]}, **scores, "target": 1, "acc": 1.0}
    expected = {"question": "Sky?", "expected": "B", "answer": {"A": -2.0, "B": -0.5}, "correct": 1.0}
    assert sample_row(sample) == expected


def test_the_majority_baseline_the_error_of_a_mean_and_samples_that_are_not_finite(tmp_path):
    assert majority([{"expected": word} for word in "aab"]) == pytest.approx(2 / 3)
    assert standard_error([0, 1, 0, 1]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([1.0]) is standard_error([1.0, None]) is None
    save_jsonl(tmp_path / "a" / "b.jsonl", [{"answer": {"A": float("nan"), "B": -float("inf")}}, {"answer": "é"}])
    assert (tmp_path / "a" / "b.jsonl").read_text("utf-8") == '{"answer": {"A": null, "B": null}}\n{"answer": "é"}\n'


def test_of_several_accuracies_the_plain_one_is_the_value(monkeypatch):
    """lm-eval's own multiple choice has acc, by the sum of log-probabilities, and acc_norm, by their mean per byte."""
    row = {"doc_id": 0, "doc": {"question": "q"}, "filtered_resps": ["a"], "target": "a", "arguments": [("q",)]}
    row["filter"] = "none"
    numbers = {"acc,none": 0.5, "acc_norm,none": 0.75, "unchecked,none": 0.67}
    output = {"samples": {"arc": [{**row, "acc": 1.0}] * 3}, "results": {"arc": numbers}}
    monkeypatch.setattr("nanochat_hf.eval.tasks.run_lm_eval", lambda *args, **options: output)
    tasks = object.__new__(Tasks)
    tasks.config, tasks.chat, tasks.members = EvalConfig(), [], lambda kind: []
    settings = SimpleNamespace(metadata=None, task_alias=None, repeats=1)
    accuracies = dict.fromkeys(("acc", "acc_norm"))
    rules = {"aggregation": lambda: accuracies, "higher_is_better": dict}
    tasks.loaded = {"arc": SimpleNamespace(config=settings, OUTPUT_TYPE="loglikelihood", **rules)}
    results, _ = tasks.run("arc", SimpleNamespace(gather_object=lambda number: [number]))
    assert (results["arc"]["value"], results["arc"]["unchecked"]) == (0.5, 2)
