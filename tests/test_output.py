"""What a run says: one format of progress in a terminal and in a file, the outline of a recipe, a pipe that closes."""

import io
import logging
import os
import pty
import re
import runpy
import select
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest

from nanochat_hf import cli, run
from nanochat_hf.cli import dispatch
from nanochat_hf.errors import guarded
from nanochat_hf.run import Progress, duration, in_words, project_folder, track

STEP = {"train_loss": 2.34567, "lr": 0.04, "tokens_per_second": 11_940.0, "mfu": 0.4512, "val_bpb": None}
PIPED = "from nanochat_hf.cli import main; main()"
ECHO = """
import sys
from nanochat_hf.serve import StreamChunk
from nanochat_hf.serve.terminal_chat import Chat, Options
class Echo:
    name, count = "echo", 1
    def answer(self, messages, options):
        yield StreamChunk(repr(messages[-1]["content"]) + f" at {options.temperature}")
Chat(Echo(), Options()).run()
"""


def test_numbers_are_in_the_same_words_everywhere():
    assert in_words(STEP, STEP) == "loss 2.346, lr 0.04, 11.9K tok/s, MFU 45.1%"
    assert in_words(STEP, ["mfu", "train_loss", "reward"]) == "MFU 45.1%, loss 2.346"
    numbers = {"reward": 0.5, "completion_length": 17.6, "tool_use": 0.25, "pass@1": 0.25, "val_loss": 1.5}
    words = "reward 0.500, 18 tokens per completion, tool use 25%, pass@1 0.2500, val loss 1.5000"
    assert in_words(numbers, numbers) == words
    assert duration(77_444.5 * 3600) == "77,444 h"


def test_a_file_gets_a_line_every_30_seconds(monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock.now)
    progress = Progress("base", 1000, first=100)
    for step in range(101, 201):
        clock.now += 1
        progress.update(step, "loss 2.346")
    progress.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and lines[0] == "[base] 130/1000 steps, loss 2.346, ETA 14:30"  # 870 s: one step per second
    assert [re.search(r"\d+/", line)[0] for line in lines] == ["130/", "160/", "190/"]


def test_a_terminal_gets_one_bar_one_without_a_width_lines_and_other_ranks_nothing(monkeypatch):
    screen, size = io.StringIO(), [80, 24]
    screen.isatty, screen.fileno = lambda: True, lambda: 2
    monkeypatch.setattr(run.sys, "stderr", screen)
    monkeypatch.setattr(run.os, "get_terminal_size", lambda _: os.terminal_size(size))
    monkeypatch.setattr(run, "LOG_SECONDS", 0)
    assert list(track("abc", "sft", 3, "conversations")) == ["a", "b", "c"]
    assert "[sft]" in screen.getvalue() and "/3 conversations" in screen.getvalue() and "\n" not in screen.getvalue()
    size[:] = 0, 0  # as under script without a terminal
    list(track("abc", "rl", 3, "prompts"))
    assert screen.getvalue().count("\n") == 3 and "[rl] 3/3 prompts" in screen.getvalue()
    monkeypatch.setenv("RANK", "1")
    before = screen.getvalue()
    assert list(track("abc", "sft", 3, "conversations")) == ["a", "b", "c"] and screen.getvalue() == before


@pytest.mark.parametrize("words", ["--help", "run --bogus"])
def test_a_reader_that_leaves_ends_a_command_without_a_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PIPED, *words.split()], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode in (2 if "bogus" in words else 0, 141), (
        done.stderr
    )  # argparse ignores that its help is lost
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("where", "code"),
    [("> /dev/full", 2), (">&-", 0), ("> /dev/null; LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} | cat", 0)],
)
def test_an_output_that_takes_no_text_or_no_letters_gives_no_traceback(where, code):
    program = "from nanochat_hf.errors import guarded; guarded(lambda: print(chr(44032)))"
    command = f'{sys.executable} -c "{program}"'
    done = subprocess.run(
        f"{command} {where.format(command)}", shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert "no space left" in done.stderr if code else done.stdout in ("", "\\uac00\n")


def test_waiting_threads_do_not_spin_unless_the_user_says_how_they_wait(monkeypatch):
    monkeypatch.setattr(cli, "guarded", lambda command: None)
    for policy, spins in ((None, "1000"), ("ACTIVE", None)):
        environment = {"OMP_WAIT_POLICY": policy} if policy else {}
        monkeypatch.setattr(cli.os, "environ", environment)
        cli.main()
        assert environment.get("GOMP_SPINCOUNT") == spins


def test_a_warning_is_one_line_without_the_line_of_code(monkeypatch):
    dispatched = []
    monkeypatch.setattr(cli, "dispatch", lambda *words: dispatched.append(words))
    monkeypatch.setattr(sys, "argv", ["nanochat", "chat", "--model", "x"])
    monkeypatch.setattr(warnings, "formatwarning", None)
    cli.main()
    assert dispatched == [(None, ["chat", "--model", "x"])]
    assert warnings.formatwarning("x cannot be read", UserWarning, "documents.py", 7) == "warning: x cannot be read\n"


@pytest.mark.parametrize("launch,disabled", [({"ACCELERATE_USE_DEEPSPEED": "true"}, False), ({}, True)])
def test_deepspeed_warns_only_where_it_is_used(launch, disabled, monkeypatch):
    monkeypatch.setattr(cli, "guarded", lambda command: None)
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "disabled", False)
    monkeypatch.setattr(cli.os, "environ", launch)
    cli.main()
    assert logging.getLogger("DeepSpeed").disabled == disabled


@pytest.mark.parametrize("name", ["bench", "bench_gpu", "bench_decoding", "bench_scaling"])
def test_the_help_of_a_benchmark_waits_for_no_large_import(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(project_folder("scripts", f"{name}.py")), run_name="__main__")
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["chat", "sft", "run NAME", "plan NAME", "demo [--run-dir DIR]", "compare"])
def test_the_usage_line_names_the_subcommand_and_a_recipes_help_is_short(command, capsys):
    with pytest.raises(SystemExit):
        dispatch(command.split()[0], ["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: nanochat {command} ") and (command == "sft" or len(text.splitlines()) <= 60)
    assert ("base.KEY        nanochat pretrain --help" in text) == command.startswith(("run", "plan", "demo"))


def at_terminal(state, *steps: tuple[str, str]) -> str:
    """What a terminal shows of a chat with an echo; each step is (keys, pattern to wait for then)."""
    main, side = pty.openpty()
    environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = subprocess.Popen([sys.executable, "-c", ECHO], stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    shown, deadline = "", time.monotonic() + 60
    for keys, awaited in (("", "›"), *steps, ("\x04", "never")):
        start = len(shown)
        os.write(main, keys.encode())
        while not re.search(awaited, shown[start:]) and time.monotonic() < deadline:
            if select.select([main], [], [], 1)[0]:
                try:
                    text = os.read(main, 65536).decode(errors="replace")
                except OSError:  # the child has ended
                    break
                shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    child.wait(10)
    os.close(main)
    return shown


def test_pasted_lines_are_one_message_and_tab_and_history_work(tmp_path):
    paste = "\x1b[200~one\ntwo\x1b[201~\r"
    answer, prompt = r"'one\ntwo' at 0.6", r"1 tokens[\s\S]+you ›"
    retry = [("/ret\t", "/retry"), ("\r", prompt)]
    shown = at_terminal(tmp_path, (paste, prompt), ('"""three\rfour"""\r', prompt), *retry)
    assert "nanochat echo · /help for commands" in shown
    assert answer in shown and r"'three\nfour' at 0.6" in shown.split("/retry")[-1]
    history = tmp_path / "nanochat" / "history"
    assert (history.stat().st_mode | history.parent.stat().st_mode) & 0o077 == 0
    assert "+one\n+two\n" in history.read_text()
    assert answer in at_terminal(tmp_path, ("\x1b[A" * 4 + "\r", prompt))  # /retry, four, three, one two


ERRORS = [
    (IsADirectoryError(21, "Is a directory", "m/x.jinja"), "cannot use m/x.jinja: Is a directory"),
    (PermissionError(13, "Permission denied", "/root/x"), "cannot use /root/x: Permission denied"),
    (Exception("No space left on device (os error 28)"), "cannot write: No space left on device"),
]


@pytest.mark.parametrize("error,message", ERRORS)
def test_a_disk_that_takes_nothing_is_one_line(capsys, error, message):
    with pytest.raises(SystemExit) as caught:
        guarded(lambda: (_ for _ in ()).throw(error))
    assert caught.value.code == 2 and message in capsys.readouterr().err
