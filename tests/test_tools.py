"""The calculator and every known escape from such evaluators; calls in `generate`."""

import operator
import os
import random
import shutil
import subprocess
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from talker import QUESTIONS
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer
from transformers.utils import get_json_schema

from nanochat_hf.serve.engine import Engine
from nanochat_hf.tool_loop import ToolResultProcessor, stop_ids
from nanochat_hf.tools import MAX_CHARS, calculate, python

RESULTS = [
    ("2+3", "5"), (" 12*(3+4) ", "84"), ("12/4", "3"), ("7/2", "3.5"), ("0.1+0.2", "0.3"), ("1/3", "0.3333333333"),
    ("7//2", "3"), ("7%4", "3"), ("-5+3", "-2"), ("+4--4", "8"), ("1,000*3", "3000"),
    ("1,234,567.5-12,000", "1222567.5"), (".5*10", "5"), ("2.0*3", "6"),
    ("99999999999999999999+1", "100000000000000000000"), ("10000000000000000/2", "5000000000000000"),
    ("99999999999*1.5", "149999999998.5"), ("671397.25*58684", "39400276219"),
    ("12345678901234567.5+0.25", "12345678901234567.75"), ("5.5%0.1", "0"), ("-7//2.5", "-3"), ("-7%2.5", "0.5"),
    ("1e20+1", "100000000000000000001"), ("0.00005", "5e-05"), ("-0.0", "0"), ("0e999", "0"),
    ("1000000000000/3", "333333333333.33"), ("-2/3", "-0.6666666667"), ("1/1048576", "9.5367431640625e-07"),
    ("'castle'.count('t')", "1"), ('"banana".count("a")', "3"), ("'a,b,c'.count(',')", "2"),
    ("'banana'.count('na')+1", "3"), ("'1,234,567'.count(',')", "2"), ("'__import__'.count('_')", "4"),
]  # fmt: skip
REFUSED = [
    # names, calls and builtins
    "x", "open('/etc/passwd')", "__import__('os').system('true')", "eval('1')", "exec('1')", "print(1)",
    "(lambda: 1)()", "globals()", "breakpoint()",
    # the walk from a literal to every class, and other attributes
    "().__class__.__bases__[0].__subclasses__()", "''.__class__.__mro__", "(1).__class__", "1 .real", "'a'.__len__()",
    "'a'.count", "'a'.count.__self__", "'{0.__class__}'.format(1)", "'a'.format_map({})", "'a'.upper()",
    "'a'.encode()", "'a'.join('b')", "'a'.replace('a','b').count('b')",
    # ways to smuggle something into the one allowed call
    "'a'.count()", "'a'.count('a', 0)", "'a'.count(*'a')", "'a'.count(**{})", "'a'.count(sub='a')", "'a'.count(1)",
    "'a'.count(open('x'))", "('a'*9).count('a')", "'a'.count('a'.upper())", "b'a'.count(b'a')", "f'{1}'.count('1')",
    "f'{open(1)}'", "['a'].count('a')",
    # things that are numbers or text to Python, but not to us
    "True+1", "None", "...", "1j*1j", "'a'", "'a'+'b'", "'a'*3", "'%s' % 1", "'%1000000000d' % 1",
    # statements, scopes and other syntax
    "", "1;2", "1\n2", "import os", "x=1", "(x:=1)", "[1][0]", "{}", "[i for i in range(9)]", "1 if 1 else 2", "1 < 2",
    "1 and 2", "not 1", "~1", "1 if __import__('os') else 2", "await x", "yield 1", "*1", "@1", "1 2", "007",
    # commas that stand before no thousands
    "1,5", "1,5+2", "1,23,456", "1234,567", "1,0000", "1.5,000", "1,,000", "1, 000", "1e1,000", ",100", "1,000,",
    # too much work, too large a result
    "9**9**9", "10**2", "1<<99999", "1|1", "99999999999*" * 15 + "9", "1e999", "1e-999", "1e999999999", "1e-999999999",
    "1e99999999999999999999", "1e300*1e300", "9e99*9e99", "-9e99*9e99", "1e308*10-1e308*10", "9" * (MAX_CHARS + 1),
    "9" * 150, "(" * 150 + "1", "-" * 150, "1/0", "1//0", "1%0", "1.0/0",
    # characters that are not what they seem
    "1\x00+1", "\x1b[31m1", "1\u202e+1", "ｏpen('x')", "'a\\nb'.cоunt('a')",  # a Cyrillic o
    # the parser would warn about these
    r"'\d'.count('d')", "1or 2", "'a'.count('b')if 1else 2", "0x1for x", "1()",
    # no text
    None, 5, b"1+1", ["1"], {"expression": "1"},
]  # fmt: skip


@pytest.mark.parametrize(("expression", "result"), RESULTS)
def test_arithmetic_and_letter_counts_are_calculated(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize("expression", REFUSED, ids=repr)
def test_everything_else_is_refused_with_one_line_and_no_warning_of_the_parser(expression):
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        warnings.simplefilter("always")
        calculate(expression)
    # a collected socket of another test may warn here, too
    assert not [warning for warning in caught if issubclass(warning.category, SyntaxWarning | DeprecationWarning)]


@pytest.mark.parametrize(("expression", "size"), [("1e999", "large"), ("1e-999", "small"), ("9e99*9e99", "large")])
def test_a_number_out_of_range_is_called_what_it_is(expression, size):
    with pytest.raises(ValueError, match=f"^number too {size}$"):
        calculate(expression)


def test_the_worst_accepted_expressions_give_short_results():
    small = "1/9e99" + "/9e99" * 38  # denominators of thousands of digits
    for expression in ("9*" * 99 + "1", "+".join("9" * 99), "-" * 90 + "1", "(" * 60 + "1" + ")" * 60, small):
        assert len(calculate(expression)) < 120


def random_sum(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """An expression and its value by exact arithmetic."""
    if depth == 0 or rng.random() < 0.2:
        digits = str(rng.randrange(10 ** rng.randint(1, 13)))
        if rng.random() < 0.5:
            digits += "." + "".join(rng.choices("0123456789", k=rng.randint(1, 6)))
        return digits, Fraction(digits)
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    signs |= {"//": operator.floordiv, "%": operator.mod}
    sign = rng.choice(list(signs))
    (left, a), (right, b) = random_sum(rng, depth - 1), random_sum(rng, depth - 1)
    return f"({left}){sign}({right})", Fraction(signs[sign](a, b))


def test_thousands_of_random_sums_are_exact_or_rounded_correctly():
    rng, exact, rounded = random.Random(0), 0, 0
    while exact + rounded < 900:
        try:
            expression, value = random_sum(rng, rng.randint(1, 3))
        except ZeroDivisionError:
            continue
        if len(expression) > MAX_CHARS:
            continue
        result = calculate(expression)
        denominator = value.denominator
        for factor in (2, 5):
            while denominator % factor == 0:
                denominator //= factor
        if denominator == 1:  # the decimal fraction terminates
            assert Fraction(result) == value, expression
            assert "." in result or "e" in result or value.denominator == 1, expression
            exact += 1
        else:
            unit = Fraction(10) ** min(Decimal(result).adjusted() - 9, -2)  # 10 digits, at least 2 after the point
            assert abs(Fraction(result) - value) <= unit / 2, expression
            rounded += 1
    assert exact > 300 and rounded > 150


def test_the_tool_calculates_and_has_the_schema_that_trl_shows_to_the_model():
    function = get_json_schema(python)["function"]
    assert function["name"] == "python" and list(function["parameters"]["properties"]) == ["expression"]
    assert python("12*(3+4)") == "84"


# ---- calls inside `generate` --------------------------------------------------------------------------------------

SUM = [{"role": "user", "content": "What is 12 * 34?"}]
GREEDY = {"max_new_tokens": 120, "do_sample": False}
CALL = "<|python_start|>12*34<|python_end|>"
ANSWER = f"{CALL}<|output_start|>408<|output_end|>It is 408.<|assistant_end|>"


@pytest.fixture(scope="module")
def chat(chat_folder):
    return pipeline("text-generation", model=str(chat_folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def model(chat_folder):
    return AutoModelForCausalLM.from_pretrained(chat_folder, trust_remote_code=True).eval()


def reply(chat, messages, **options):
    return chat(messages, **GREEDY, **options)[0]["generated_text"][-1]


def prompt(tokenizer, messages=SUM, **options):
    options |= {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)


def test_a_pipeline_answers_calls_and_shows_the_steps_or_leaves_them_to_the_caller(chat):
    steps = [{"call": "12*34", "result": "408"}]
    assert reply(chat, SUM) == {"role": "assistant", "content": "It is 408.", "tool_steps": steps}
    assert reply(chat, SUM, tools=[python])["content"] == "It is 408."
    assert reply(chat, [{"role": "user", "content": "Hello"}])["content"] == QUESTIONS["Hello"][0][1]
    failed = reply(chat, [{"role": "user", "content": "What is 1 / 0?"}])
    assert failed["tool_steps"][0]["result"] == "{'error': 'division by zero'}" and failed["content"] == "No."
    messages = chat(SUM, **GREEDY, run_tools=False)[0]["generated_text"]
    assert messages[-1]["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "12*34"}}
    messages.append({"role": "tool", "content": "408"})
    assert reply(chat, messages, run_tools=False) == {"role": "assistant", "content": "It is 408."}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_batches_beams_sampling_and_static_caches_give_the_engines_answers(model, talker, options):
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = prompt(talker[1], prompts, padding=True)
    options = {"do_sample": False, "temperature": 1e-3 if "do_sample" in options else 1.0, **options}
    rows = model.generate(**inputs, max_new_tokens=120, **options)[:, inputs["input_ids"].shape[1] :]
    engine = Engine(*talker)
    for row, messages in zip(rows.tolist(), prompts):
        (expected,) = engine.generate([engine.encode(messages)], max_new_tokens=120)[0]
        assert row[: len(expected)] == expected


def test_streamers_see_calls_and_results_and_positional_inputs_work(model, talker):
    class Recorder(BaseStreamer):
        ids, ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, tokenizer = Recorder(), talker[1]
    model.generate(prompt(tokenizer)["input_ids"], max_new_tokens=60, streamer=streamer, do_sample=False)
    assert tokenizer.decode(streamer.ids).endswith(ANSWER) and streamer.ended


ENDS = {
    "its own GenerationConfig": lambda eos: {"generation_config": GenerationConfig(**GREEDY)},
    "eos in it": lambda eos: {"generation_config": GenerationConfig(**GREEDY, eos_token_id=eos)},
    "eos as a list in it": lambda eos: {"generation_config": GenerationConfig(**GREEDY, eos_token_id=[eos])},
    "tensor of one": lambda eos: {"eos_token_id": torch.tensor([eos])},
    "set": lambda eos: {"eos_token_id": {eos}},
    "none": lambda eos: {"eos_token_id": None},
}


@pytest.mark.parametrize(("how", "run_tools"), [*((how, True) for how in ENDS), ("eos in it", False), ("none", False)])
def test_an_answer_ends_whatever_eos_the_caller_passes(how, run_tools, model, talker):
    tokenizer, before = talker[1], model.generation_config.to_dict()
    inputs, options = prompt(tokenizer), ENDS[how](talker[1].eos_token_id)
    own = options.get("generation_config", GenerationConfig()).to_dict()
    options = options if "generation_config" in options else options | GREEDY
    out = model.generate(**inputs, **options, run_tools=run_tools)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]) == (ANSWER if run_tools else CALL)
    assert model.generation_config.to_dict() == before
    assert options.get("generation_config", GenerationConfig()).to_dict() == own  # the caller's own object


def test_an_eos_that_names_no_end_of_an_answer_gives_way_to_the_models():
    assert stop_ids([21], None, [19, 21], 19, without=21) == [19]
    assert stop_ids(None, torch.tensor(5), [19], 19, without=21) == [5]
    assert stop_ids(None, None, None, 19, without=21) == [19]
    assert stop_ids([7, 21], 5, [19], 19, without=21) == [7] and stop_ids(21, [21], 21, 21, without=21) == []


def test_only_calls_are_answered_and_only_once(tokenizer):
    loop = ToolResultProcessor(tokenizer)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    call = "<|python_start|>1+1<|python_end|>"
    assert loop.next(encode(call)) == loop.before
    assert loop.next(encode(f"{call}<|output_start|>2")) == loop.after
    assert loop.next(encode(f"{call}<|output_start|>2<|output_end|>")) is None
    assert loop.next(encode(f"{call}<|output_start|>three")) is None  # somebody else's result is left alone
    assert loop.next(encode("<|python_start|>10**9<|python_end|><|output_start|>7")) is None  # also a shorter one
    assert loop.next(encode("1+1<|python_end|>")) is None
    assert loop.next(encode(f"{call}<|output_start|>2<|output_end|>2+2<|python_end|>")) is None


CLEAN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
path, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
for where in (path, path + "/plain"):  # found beside the weights, or named in the call
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    named = {} if where == path else {"custom_generate": path, "trust_remote_code": True}
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=60, do_sample=False, **named)[0]))
assert not [name for name in sys.modules if name.startswith("nanochat_hf")]
"""


@pytest.mark.slow
def test_a_clean_process_needs_only_the_folder(chat_folder, talker_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "chat")
    shutil.copytree(talker_folder, folder / "plain")
    command = [sys.executable, "-P", "-c", CLEAN, str(folder), SUM[0]["content"]]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    both = subprocess.check_output(command, cwd=tmp_path, env=env, text=True).splitlines()
    assert len(both) == 2 and all(text.endswith(ANSWER) for text in both)
