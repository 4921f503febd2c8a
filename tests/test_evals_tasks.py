"""The task files: all load in lm-eval, say what the bundle says, build upstream's prompts, and grade."""

import csv
import json
import os
import random
import socket
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

TASKS = Path(__file__).parent.parent / "evals" / "tasks"
CORE_TASKS = yaml.safe_load((TASKS / "core.yaml").read_text())["task"]


def function(name):
    """A function of evals/tasks as lm-eval finds it."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    return _import_func_in_yml(name, TASKS)


def manager(**metadata):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def core_task(tmp_path, rows, kind="multiple_choice", shots=0, delimiter=" "):
    (tmp_path / "eval_data").mkdir()
    (tmp_path / "core.yaml").write_text("")
    (tmp_path / "eval_data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = {"version": 1, "kind": kind, "delimiter": delimiter, "baseline": 25, "core_bundle": str(tmp_path)}
    config = {"task": "t", "dataset_path": "rows.jsonl", "num_fewshot": shots, "metadata": metadata}
    return function("core.CoreTask")(config)


MC = {"query": "Q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    "kind,row,reason",
    [
        ("multiple_choice", {**MC, "gold": 2}, "'gold' is 2 of 2 choices"),
        ("multiple_choice", {**MC, "gold": -1}, "'gold' is -1 of 2 choices"),
        ("multiple_choice", {**MC, "gold": None}, "'gold' is null"),
        ("multiple_choice", {**MC, "choices": ["a", 1]}, "'choices' must be texts"),
        ("multiple_choice", {**MC, "choices": []}, "'choices' must be texts"),
        ("multiple_choice", {"query": "Q", "gold": 0}, "no field 'choices'"),
        ("schema", MC, "no field 'context_options'"),
        ("language_modeling", {"context": "a"}, "no field 'continuation'"),
    ],
)
def test_a_row_that_is_none_of_its_kind_is_named_whichever_rank_would_ask_it(tmp_path, kind, row, reason):
    good = {"multiple_choice": MC, "language_modeling": {"context": "a", "continuation": "b"}}
    good["schema"] = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}
    task = core_task(tmp_path, [good[kind]] * 2 + [row], kind=kind)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {reason}"):
        task.build_all_requests(rank=0, world_size=3)


@pytest.mark.parametrize(
    "content", [b"", b"{\n", b'{"question": "?"}\n', b'{"question": 1, "answer": "1"}', b"\xff\n"]
)
@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "mmlu", "humaneval", "spellingbee", "demo_facts"])
def test_a_damaged_file_of_a_chat_task_is_named_with_its_line(tmp_path, name, content):
    task = f"nanochat_{name}"
    file = load_yaml(TASKS / f"{name}.yaml", resolve_func=False)["dataset_kwargs"]["file"]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}(, line 1: | is empty)") as error:
        manager(chat_data=str(tmp_path)).load([task])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "answer 2 of 2 choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": "B"}, "answer 'B' of 2 choices"),
        ({"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "'B' is not in list"),
        (
            {"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
            "answer 0 of 2 choices",
        ),
        ({"question": "?", "choices": ["a", "b"]}, "KeyError: 'answer'"),
    ],
)
def test_choices_without_their_answer_are_named(tmp_path, row, reason):
    good = {"question": "?", "choices": ["a", "b"], "answer": 0}
    folder = choice_rows(tmp_path, "mmlu_test.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"mmlu_test\.jsonl, line 2: not a row of this task \(.*{reason}"):
        manager(chat_data=folder).load(["nanochat_mmlu"])


def test_rows_may_differ_in_what_the_task_does_not_use(tmp_path):
    rows = [{"question": "?", "answer": "#### 1", "id": 1}, {"question": "!", "answer": "#### 2", "id": ["x"]}]
    folder = choice_rows(tmp_path, "gsm8k_test.jsonl", rows)
    task = manager(chat_data=folder).load(["nanochat_gsm8k"])["tasks"]["nanochat_gsm8k"]
    assert [doc["answer"] for doc in task.eval_docs] == ["#### 1", "#### 2"]


COPA = "sentence\tquestion\t1\t2\tAnswer\n"
HELLASWAG = "context\tchoice1\tchoice2\tchoice3\tchoice4\tlabel\n"


@pytest.mark.parametrize(
    "task,content,reason",
    [
        ("COPA", "sentence\tquestion\t1\tAnswer\n", "1: no column '2'"),
        ("COPA", COPA, "1: no rows follow"),
        ("COPA", COPA + "a\tb\tc\td\t1\na\tb\tc\td\t3\n", "3: the label is '3'"),
        ("BoolQ", "Text\tQuestion\tAnswer\na\tb\tyes\n", "2: the label is 'yes'"),
        ("BoolQ", "Text\tQuestion\tAnswer\na\tb\n", "2: 2 of 3 columns"),
        ("HellaSwag", HELLASWAG + "a\tb\tc\td\te\t\n", "2: the label is ''"),
        ("HellaSwag", HELLASWAG + "a\xff", "2: no UTF-8"),
    ],
)
def test_a_damaged_file_of_kobest_is_named_with_its_line(tmp_path, task, content, reason):
    path = tmp_path / task / "test.tsv"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"test\.tsv, line {reason}"):
        function("ko.kobest")(task, chat_data=str(tmp_path))


def test_every_file_is_indexed_with_a_version():
    index = manager().task_index
    for path in TASKS.glob("*.yaml"):
        config = load_yaml(path, resolve_func=False)
        if "task" in config:
            assert config.get("group", config["task"]) in index
            assert "version" in config["metadata"], path


def test_core_is_22_tasks_and_chatcore_six():
    index = manager().task_index
    assert len(CORE_TASKS) == 22
    assert len(index["nanochat_chatcore"].cfg["task"]) == 6
    for name in [*CORE_TASKS, *index["nanochat_chatcore"].cfg["task"], *index["nanochat_demo"].cfg["task"]]:
        assert name in index


@pytest.mark.skipif("NANOCHAT_CORE_BUNDLE" not in os.environ, reason="needs the CORE bundle (NANOCHAT_CORE_BUNDLE)")
def test_core_files_say_what_the_bundle_says():
    bundle = Path(os.environ["NANOCHAT_CORE_BUNDLE"])
    with (bundle / "eval_meta_data.csv").open(encoding="utf-8", newline="") as table:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(table)}
    for stated in yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        config = load_yaml(TASKS / f"core_{stated['label']}.yaml", resolve_func=False)
        assert config["dataset_path"] == stated["dataset_uri"]
        assert config["num_fewshot"] == stated["num_fewshot"][0]
        assert config["metadata"]["kind"] == stated["icl_task_type"]
        assert config["metadata"]["delimiter"] == stated.get("continuation_delimiter", " ")
        assert config["metadata"]["baseline"] == baselines[stated["label"]]


def test_prompts_of_each_kind(tmp_path):
    mc = {"query": "Q: sky?", "choices": ["blue", "red"], "gold": 0}
    task = core_task(tmp_path, [mc], delimiter="\nAnswer: ")
    assert task.prompts(mc, [mc]) == [
        f"Q: sky?\nAnswer: blue\n\nQ: sky?\nAnswer: {choice}" for choice in ("blue", "red")
    ]
    task.kind, task.delimiter = "schema", " "
    schema = {"context_options": ["It is A", "It is B"], "continuation": "so.", "gold": 1}
    assert task.prompts(schema, [schema]) == ["It is B so.\n\nIt is A so.", "It is B so.\n\nIt is B so."]
    task.kind = "language_modeling"
    lm = {"context": " One two \n", "continuation": "three"}
    assert task.prompts(lm, [lm]) == ["One two three\n\nOne two", "One two three\n\nOne two three"]


def test_examples_are_those_of_the_definition(tmp_path):
    rows = [{"query": str(i), "choices": ["a", "b"], "gold": 0} for i in range(40)]
    task = core_task(tmp_path, rows, shots=10)
    random.Random(1337).shuffle(rows)
    assert [doc["query"] for doc in task.test_docs()] == [row["query"] for row in rows]
    for row in (0, 7, 24):
        others = [i for i in range(25) if i != row]
        expected = random.Random(1234 + row).sample(others, 10)
        assert [doc["_row"] for doc in task.shots(row, pool=25)] == expected


def test_spans_are_what_choices_do_not_share(tmp_path):
    task = core_task(tmp_path, [])
    ids = [np.array(x) for x in ([9, 1, 2, 3], [9, 1, 4], [9, 1])]
    assert [(list(tokens), start) for tokens, start in task.spans(ids)] == [
        ([9, 1, 2, 3], 2),
        ([9, 1, 4], 2),
        ([9, 1], 2),
    ]
    task.kind = "schema"
    assert [start for _, start in task.spans([np.array([9, 1, 7, 8]), np.array([9, 2, 3, 7, 8])])] == [2, 3]
    task.kind = "language_modeling"
    [(tokens, start)] = task.spans([np.array([9, 1]), np.array([9, 1, 5, 6])])
    assert list(tokens[start:]) == [5, 6]


def test_the_lowest_mean_loss_wins_and_the_first_of_equals(tmp_path):
    task = core_task(tmp_path, [])
    doc = {"gold": 1, "_row": 0}
    task._scored[0] = [4, 2, 1]
    assert task.process_results(doc, [(-4.4, False), (-2.0, False), (-1.5, False)])["acc"] == 1
    assert task.process_results(doc, [(-4.0, False), (-2.0, False), (-1.5, False)])["acc"] == 0
    task._scored[0] = [0, 2, 1]  # a choice with no tokens of its own has no loss; in first place it is kept
    assert task.process_results(doc, [(0.0, False), (-0.1, False), (-1.5, False)])["acc"] == 0
    assert task.aggregation()["centered"]([1, 0, 0, 0]) == 0


def test_a_missing_bundle_or_file_is_named(tmp_path, monkeypatch):
    bundle = function("core.core_bundle")
    with pytest.raises(ValueError, match="no CORE bundle"):
        bundle(str(tmp_path))
    monkeypatch.delenv("NANOCHAT_CORE_BUNDLE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(bundle.__globals__, "CACHE", tmp_path)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        bundle()
    (tmp_path / "core.yaml").write_text("")
    task = manager(core_bundle=str(tmp_path)).load(["nanochat_core_squad"])["tasks"]["nanochat_core_squad"]
    with pytest.raises(ValueError, match=r"nanochat_core_squad: the bundle has no reading_comprehension/squad\.jsonl"):
        task.test_docs()


def test_the_bundle_is_downloaded_once_and_whole_or_not_at_all(tmp_path):
    download = function("core._download_bundle")
    packed = tmp_path / "served.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []")
    target = tmp_path / "cache" / "eval_bundle"
    target.parent.mkdir()
    download(target, packed.as_uri())
    assert (target / "core.yaml").read_text() == "icl_tasks: []"
    assert len((target / "SHA256").read_text().strip()) == 64
    packed.write_bytes(packed.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        download(tmp_path / "cache" / "other", packed.as_uri())
    with pytest.raises(ValueError, match="cannot download"):
        download(tmp_path / "cache" / "other", (tmp_path / "nothing.zip").as_uri())
    assert [path.name for path in target.parent.iterdir()] == ["eval_bundle"]


def test_models_with_learned_positions_are_cropped_and_rotary_ones_are_not():
    from transformers import GPT2Config, LlamaConfig

    from nanochat_hf import NanoChatConfig

    limit = function("core.CoreTask").position_limit
    assert limit(GPT2Config()) == 1024
    assert limit(LlamaConfig()) is None
    assert limit(NanoChatConfig(max_position_embeddings=128)) == 1280


@pytest.mark.parametrize("longest,context", [(None, [9, 1, 2, 3, 4]), (6, [2, 3, 4]), (3, [5])])
def test_a_cropped_prompt_scores_the_same_tokens_as_a_whole_one(tmp_path, longest, context):
    """Cropping drops the beginning of the context; the answer's three tokens are scored, or what is left of them."""
    task = core_task(tmp_path, [], kind="language_modeling")
    ids = [np.array([9, 1, 2, 3, 4]), np.array([9, 1, 2, 3, 4, 5, 6, 7])]
    [request] = task._requests(0, {"_row": 0}, ["", ""], ids, longest)
    assert [list(request.context), list(request.continuation)] == [context, [5, 6, 7] if longest != 3 else [6, 7]]
    assert task._scored[0] == [len(request.continuation)]


def choice_rows(tmp_path, name, rows):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Sky?", "choices": ["blue", "red"], "answer": 1},
        {"question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
)
def test_choices_stand_before_their_letters(tmp_path, row):
    folder = choice_rows(tmp_path, "arc_easy_test.jsonl", [row])
    task = manager(chat_data=folder).load(["nanochat_arc_easy"])["tasks"]["nanochat_arc_easy"]
    doc = task.eval_docs[0]
    a, b = ("1", "2") if "answerKey" in row else ("A", "B")
    assert task.doc_to_text(doc) == (
        f"Multiple Choice question: Sky?\n- blue={a}\n- red={b}\n\nRespond only with the letter of the correct answer."
    )
    assert task.doc_to_choice(doc) == [a, b]
    assert task.process_results(doc, [(-2.0, False), (-1.0, True)])["acc"] == 1.0


def test_hash_answers_are_compared_as_text():
    grade = function("utils.hash_results")
    doc = {"answer": "She has <<2*9=18>>18.\n#### 1,018"}
    assert grade(doc, ["first #### 1018 and more"])["acc"] == 1
    assert grade(doc, ["#### 1018.0"])["acc"] == 0
    assert grade({"answer": "3"}, [["#### 3", "#### 2", "none", "#### 3"]]) == {
        "acc": 0.5,
        "centered": 0.5,
        "pass@2": 1 - 1 / 6,  # of the six pairs, one holds no right answer
        "pass@4": 1.0,
    }


HUMANEVAL = {
    "prompt": "from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    '''Doubles.'''\n",
    "test": "def check(f):\n    assert f([1, 2]) == [2, 4]\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    "text,passed",
    [
        ("Sure!\n```python\ndef double(xs: List[int]):\n    return [2 * x for x in xs]\n```\nDone.", 1.0),
        ("def double(xs: List[int]):\n    return [2 * x for x in xs]", 1.0),
        ("```\ndef double(xs):\n    return xs\n```", 0.0),
        ("```python\ndef double(xs):\n    return [x + x for x in xs]\n```\nUse it:\n```\ndouble(1)(\n```", 1.0),
        ("```\ndef double(xs):\n    return xs\n```\n```\ndef double(xs):\n    return [x + x for x in xs]\n```", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("I do not know.", 0.0),
    ],
)
def test_humaneval_answers_are_run_with_the_tests(text, passed):
    assert function("utils.humaneval_results")(HUMANEVAL, [text])["acc"] == passed


def test_rows_come_from_the_first_folder_that_has_them(tmp_path):
    rows = function("utils.rows")
    folder = choice_rows(tmp_path, "x.jsonl", [{"a": "1"}, {"a": "2"}])
    assert rows("x.jsonl", ["a"], chat_data=[None, str(tmp_path / "no"), folder])["test"]["a"] == ["1", "2"]
    with pytest.raises(ValueError, match="no file y"):
        rows("y.jsonl", ["a"], chat_data=folder)


# ---- bits per byte --------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_the_same_by_hand_by_our_runner_and_by_the_plain_one(tmp_path, tiny_model, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from nanochat_hf.eval.core import load_tasks, run_lm_eval
    from nanochat_hf.eval.harness import EvalConfig, LocalLM

    texts = [
        "The owl lives in the old tree.",
        "안녕하세요",
        "word " * 300,
        " \n",
    ]  # the third is longer than the context
    folder = choice_rows(tmp_path, "held_out.jsonl", [{"text": text} for text in texts])
    nats = size = 0.0
    for text in texts[:3]:
        ids = torch.tensor(
            [
                tokenizer.bos_token_id,
                *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            ]
        )
        for begin in range(0, len(ids) - 1, 128):
            part = ids[begin : begin + 129][None]
            with torch.inference_mode():
                scores = tiny_model(part[:, :-1], use_cache=False).logits.log_softmax(-1)
            nats -= scores.gather(2, part[:, 1:, None]).sum().item()
        size += len(text.encode())
    expected = pytest.approx(nats / np.log(2) / size, rel=1e-4)
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = manager(chat_data=folder, pretrained=str(tmp_path / "model"))
    lm = LocalLM(tiny_model, tokenizer, EvalConfig())
    ours = run_lm_eval(lm, load_tasks(found, ["nanochat_bpb"]), None, chat=False, log_samples=True)
    assert ours["results"]["nanochat_bpb"]["bits_per_byte,none"] == expected
    plain = HFLM(pretrained=tiny_model, tokenizer=tokenizer, backend="causal")
    theirs = simple_evaluate(model=plain, tasks=["nanochat_bpb"], task_manager=found, bootstrap_iters=0)
    assert theirs["results"]["nanochat_bpb"]["bits_per_byte,none"] == expected
    with pytest.raises(ValueError, match=r"no file held_out\.jsonl"):
        _ = manager().load(["nanochat_bpb"])["tasks"]["nanochat_bpb"].test_docs()


def test_the_plain_command_line_says_where_it_would_crop(tmp_path, tiny_model, tokenizer, caplog):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"query": "the owl " * 200, "choices": ["a", "b"], "gold": 0}] * 3
    task = core_task(tmp_path, rows)
    task.metadata["pretrained"] = str(tmp_path / "model")
    task.build_all_requests(limit=3)
    longest = max(len(r.context) + len(r.continuation) - 1 for r in task.instances)
    assert "6 of 6 prompts are longer than the backend's max_length of 128" in caplog.text
    assert f"add max_length={longest} to --model_args" in caplog.text
    caplog.clear()
    task.metadata["max_length"] = longest
    task.build_all_requests(limit=3)
    assert not caplog.text


# ---- chat -----------------------------------------------------------------------------------------------------------


def test_multiple_choice_is_the_same_by_our_runner_and_by_the_plain_one(tmp_path, tiny_model, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from nanochat_hf.eval.core import load_tasks, run_lm_eval
    from nanochat_hf.eval.harness import EvalConfig, LocalLM

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    words = ["red", "green", "blue", "old", "new"]
    rows = [
        {"question": f"Is {i} {words[i % 5]}?", "choices": [words[(i + j) % 5] for j in range(4)], "answer": i % 4}
        for i in range(12)
    ]
    found = manager(chat_data=choice_rows(tmp_path, "arc_easy_test.jsonl", rows))
    ours = run_lm_eval(
        LocalLM(tiny_model, tokenizer, EvalConfig()), load_tasks(found, ["nanochat_arc_easy"]), None, True, True
    )
    plain = HFLM(pretrained=tiny_model, tokenizer=tokenizer, backend="causal", batch_size=5)
    theirs = simple_evaluate(
        model=plain, tasks=["nanochat_arc_easy"], task_manager=found, apply_chat_template=True, bootstrap_iters=0
    )
    scores = []
    for result in (ours, theirs):
        samples = sorted(result["samples"]["nanochat_arc_easy"], key=lambda sample: sample["doc_id"])
        scores.append([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    assert np.allclose(*scores, atol=1e-4)
    for metric in ("acc,none", "centered,none"):
        assert ours["results"]["nanochat_arc_easy"][metric] == theirs["results"]["nanochat_arc_easy"][metric]


HOSTILE = {
    "runs for ever": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "takes memory": "x = bytearray(2 << 30)",
    "fills the disk": "open('big', 'wb').write(b'x' * (2 << 20))",
    "forks without end": "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(30)",
    "leaves early": "import os\nos._exit(0)",
    "fakes the tests' success": "import sys\nprint('passed')\nsys.exit(0)",
    "reads the environment": "import os\nassert os.environ['HOME']",
    "opens many files": "files = [open('/dev/null') for _ in range(500)]",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos._exit(0)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "prints without end": "while True: print('x' * 1000)",
    "reads standard input": "assert input()",
    "opens a connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_to_humaneval_fails_and_harms_nothing(what, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    code = HOSTILE[what].replace("{port}", str(listener.getsockname()[1]))
    before = {path.name for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("tmp")}
    start = time.time()
    # Above a right answer: it would pass if the attack had no effect on the result.
    text = f"```python\n{code}\ndef double(xs):\n    return [2 * x for x in xs]\n```"
    passed = function("utils.humaneval_results")(HUMANEVAL, [text])["acc"]
    if what == "opens a connection" and passed:
        pytest.skip("this kernel gives no namespace of its own to the process")
    assert passed == 0.0
    assert time.time() - start < 30
    after = {path.name for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("tmp")}
    assert "big" not in os.listdir() and len(after - before) < 3  # other tests use that folder, too
