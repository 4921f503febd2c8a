"""The Korean edition: its tasks ask what lm-eval's own ask, and its mean stands in the report's table."""

import importlib.util
import io
import json
import re
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager
from rich.cells import cell_len
from rich.console import Console

from nanochat_hf.data.transforms import TRANSFORMS
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, evaluate
from nanochat_hf.eval.report import collect, make_report
from nanochat_hf.run import Run, save_json
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.terminal_chat import KOREAN, Chat, LocalModel, Options, system_language
from nanochat_hf.stage_configs import read_recipe

ROOT = Path(__file__).parent.parent
KOBEST = {  # made-up rows in the form of KoBEST's files
    "COPA": ["ID\tsentence\tquestion\t1\t2\tAnswer", "1\t비가 왔다.\t결과\t우산을 썼다.\t선글라스를 썼다.\t1"],
    "HellaSwag": ["context\tchoice1\tchoice2\tchoice3\tchoice4\tlabel", '그는 "안녕"이라고 했다.\t가\t나\t다\t라\t3'],
    "BoolQ": ["ID\tText\tQuestion\tAnswer", "1\t물은 H2O이다.\t물은 산소인가?\tFALSE", "2\t해는 뜬다.\t뜨나?\tTrue"],
}
COLUMNS = {  # the same rows as the Hub's dataset has them
    "copa": ("premise", "question", "alternative_1", "alternative_2", "label"),
    "hellaswag": ("context", "ending_1", "ending_2", "ending_3", "ending_4", "label"),
    "boolq": ("paragraph", "question", "label"),
    "kmmlu": ("question", "A", "B", "C", "D", "answer"),
    "haerae": ("query", "answer"),
}
VALUES = {
    "copa": [("비가 왔다.", "결과", "우산을 썼다.", "선글라스를 썼다.", 0)],
    "hellaswag": [('그는 "안녕"이라고 했다.', "가", "나", "다", "라", 3)],
    "boolq": [("물은 H2O이다.", "물은 산소인가?", 0), ("해는 뜬다.", "뜨나?", 1)],
    "kmmlu": [(" 물은? ", "하나", "둘", "셋", "넷", 3)],
    "haerae": [("다음 중?", "(E)")],
}
KOBEST["COPA"].append("2\t배가 불렀다.\t원인\t굶었다.\t밥을 먹었다.\t2")
VALUES["copa"].append(("배가 불렀다.", "원인", "굶었다.", "밥을 먹었다.", 1))
HUB = {name: [dict(zip(COLUMNS[name], row)) for row in rows] for name, rows in VALUES.items()}


@pytest.fixture
def kobest(tmp_path):
    for task, lines in KOBEST.items():
        (tmp_path / "kobest" / task).mkdir(parents=True)
        (tmp_path / "kobest" / task / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "kobest"


def load(monkeypatch, names, rows=None, **metadata):
    """Tasks by name; `rows` is what the Hub would send."""
    import datasets

    if rows is not None:
        split = datasets.Dataset.from_list(rows)
        splits = datasets.DatasetDict(train=split, validation=split, test=split, dev=split)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, split=None, **k: splits[split] if split else splits)
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = [ROOT / "evals", theirs / "kobest", theirs / "kmmlu" / "default", theirs / "haerae"]
    manager = TaskManager(include_path=[str(path) for path in folders], include_defaults=False, metadata=metadata)
    return manager.load(names)["tasks"]


def requests(task):
    """(context, continuation) of every choice of every row, and the right choices."""
    rows = []
    for number, doc in enumerate(task.test_docs()):
        choices = task.construct_requests(doc, task.doc_to_text(doc), metadata=(task.config.task, number, 1))
        target = task.doc_to_target(doc)
        target = task.doc_to_choice(doc).index(target) if isinstance(target, str) else int(target)
        rows.append(([request.args for request in choices], target))
    return rows


LM_EVAL = ["kobest_copa", "kobest_hellaswag", "kobest_boolq", "kmmlu_accounting", "haerae_history"]


@pytest.mark.parametrize("theirs", [LM_EVAL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LM_EVAL[1:])])
def test_korean_tasks_ask_in_the_words_of_lm_evals_own(monkeypatch, theirs):
    ours = next(name for name in HUB if name in theirs)
    tasks = load(monkeypatch, [f"nanochat_ko_{ours}", theirs], HUB[ours])
    mine, reference = requests(tasks[f"nanochat_ko_{ours}"]), requests(tasks[theirs])
    # ours holds all subjects one after another, here every one with the same rows
    assert mine and len(mine) % len(reference) == 0
    assert mine == reference * (len(mine) // len(reference))


def test_kobests_files_give_the_same_questions_as_the_hub(monkeypatch, kobest):
    for name, task in (("copa", "COPA"), ("hellaswag", "HellaSwag"), ("boolq", "BoolQ")):
        files = requests(load(None, [f"nanochat_ko_{name}"], chat_data=str(kobest))[f"nanochat_ko_{name}"])
        with monkeypatch.context() as patch:
            hub = load(patch, [f"nanochat_ko_{name}"], HUB[name])
            assert files == requests(hub[f"nanochat_ko_{name}"]) and len(files) == len(KOBEST[task]) - 1


def test_the_korean_mean_stands_in_the_table_with_what_could_be_had(kobest, tiny_model, tokenizer, tmp_path, capsys):
    run = Run(tmp_path / "run")
    tiny_model.save_pretrained(run.folder("base"))
    tokenizer.save_pretrained(run.folder("base"))
    save_json(run.folder("base") / "metrics.json", {"finished": True})
    text = tmp_path / "ko.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i}번째 문서입니다. " * 9}) + "\n" for i in range(64)))
    mixed = [{"dataset": str(text), "weight": 1}, {"dataset": "primer", "weight": 1}]
    data = {"chat_data": str(kobest), "dataset": mixed, "bpb_tokens": 512}
    config = EvalConfig(tasks=["nanochat_ko"], text_stages=["base"], **data)
    metrics = evaluate(config, {"base": str(run.folder("base"))}, run.folder("eval"))
    results = metrics["results"]["base"]
    assert {"KoBEST COPA", "KoBEST HellaSwag", "KoBEST BoolQ"} <= set(results)
    assert {"val_bpb", "bpb ko.jsonl", "bpb primer"} <= set(results)
    assert results["KoBEST COPA"]["n"] == 2 and results["KoBEST HellaSwag"]["baseline"] == 0.25
    mean = metrics["kocore"]["base"]
    baselines = {"COPA": 0.5, "HellaSwag": 0.25, "BoolQ": 0.5}
    centered = [(results[f"KoBEST {name}"]["value"] - b) / (1 - b) for name, b in baselines.items()]
    assert mean["value"] == pytest.approx(sum(centered) / 3)
    assert mean["label"] == "3/5 Korean tasks"
    assert "nanochat_ko leaves out kmmlu (no HAERAE-HUB/KMMLU from the Hub" in capsys.readouterr().out
    table = collect(run)["table"]
    assert table["3/5 Korean tasks"]["base"]["value"] == mean["value"] and "KoBEST BoolQ" in table
    report = make_report(run.path).read_text()
    assert "| 3/5 Korean tasks |" in report and "bpb ko.jsonl" in report


def test_without_any_rows_or_with_a_damaged_file_the_korean_group_is_refused(kobest, tiny_folder, tmp_path):
    with (kobest / "BoolQ" / "test.tsv").open("a") as file:
        file.write("1\t글\n")
    for folder, reason in (
        (None, r"no task of nanochat_ko has its rows here.*skt/kobest_v1.*chat_data"),
        (str(kobest), r"BoolQ/test\.tsv, line \d+: 2 of "),
    ):
        config = EvalConfig(tasks=["nanochat_ko"], chat_stages=["base"], chat_data=folder, dataset=None)
        with pytest.raises(InputError, match=reason):
            evaluate(config, {"base": str(tiny_folder)}, tmp_path / "eval")


def test_the_recipes_mix_languages_and_compose_hangul():
    for name in ("d20-ko", "cpu-demo-ko"):
        names, configs = read_recipe(ROOT / "recipes" / name, None, [])
        assert names == ["tokenizer", "base", "sft", "eval", "report"]
        assert configs["tokenizer"].normalization == "nfc"
        assert configs["tokenizer"].dataset == configs["base"].dataset == configs["eval"].dataset
        for entry in configs["sft"].mixture:
            assert entry.get("transform", "messages") in TRANSFORMS
    korean, english = read_recipe(ROOT / "recipes" / "d20-ko", None, [])[1]["base"].dataset
    assert "fineweb-2/data/kor_Hang" in korean["dataset"] and korean["weight"] == english["weight"] == 0.5
    changed = ["base.dataset=[{dataset: a/ko, weight: 0.8}, {dataset: b/en, weight: 0.2}]"]
    _, configs = read_recipe(ROOT / "recipes" / "d20-ko", None, changed)
    assert [entry["weight"] for entry in configs["base"].dataset] == [0.8, 0.2]


def test_the_terminal_speaks_korean_and_wraps_hangul_by_its_width(talker, monkeypatch, tmp_path):
    model = LocalModel(Engine(*talker), "시험")
    for forced in (False, True):
        console = Console(file=io.StringIO(), width=30, highlight=False, force_terminal=forced, legacy_windows=False)
        chat = Chat(model, Options(temperature=0.0, max_new_tokens=120), console=console, language="ko")
        chat.ask("Hello")
        lines = ("/help", "/reset", "/system 짧게 대답하세요", "/system", "/temp 0.5", "/save", f"/save {tmp_path}/ㄱ")
        assert all(chat.command(line) for line in lines)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
        assert "안녕하세요!" in shown and "🙂" in shown and "\ufffd" not in shown
        assert "이 목록" in shown and "잊었습니다" in shown and "temperature=0.5" in shown and "messages" not in shown
        if forced:
            assert "토큰" in shown
            assert all(cell_len(line) <= 30 for line in re.split(r"[\r\n]+", shown))
    assert "{" not in "".join(KOREAN.values()).replace("{}", "")
    names = ("LANG", "LC_MESSAGES", "LC_ALL")  # each overrides those before it
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name in names:
        for value, language in (("ko_KR.UTF-8", "ko"), ("C", "en"), ("ko", "ko"), ("en_US.UTF-8", "en")):
            monkeypatch.setenv(name, value)
            assert system_language() == language
        monkeypatch.setenv(name, "ko" if name == "LANG" else "en")


def test_a_space_of_one_language_shows_it_to_every_browser(talker_folder, monkeypatch):
    monkeypatch.setenv("MODEL_ID", str(talker_folder))
    monkeypatch.setenv("SPACE_LANGUAGE", "ko")
    spec = importlib.util.spec_from_file_location("space_app_ko", ROOT / "spaces" / "chat" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert app.demo.examples == [[text] for text in app.EXAMPLES]
    assert app.TEXTS["ko"].keys() == app.TEXTS["en"].keys()
    assert {texts["settings"] for texts in app.i18n.translations.values()} == {"설정"}
    monkeypatch.setenv("SPACE_LANGUAGE", "kr")
    with pytest.raises(SystemExit, match=r"SPACE_LANGUAGE is 'kr'; use en or ko"):
        spec.loader.exec_module(app)
