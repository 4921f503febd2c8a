"""Wrong input: one exception, which a command shows as one line on stderr, with exit code 2."""

import errno
import os
import sys
from collections.abc import Callable

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # by torchrun and Accelerate
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space left, over a quota or a limit of files


class InputError(ValueError):
    """Wrong input from the user; the message says in one line what is wrong and what to do."""


def in_a_line(error: BaseException) -> str:
    """What a library says of a file that it cannot read; less in place of Python's own words, which are of code."""
    if isinstance(error, AttributeError | LookupError | TypeError):
        return "a value in it is missing or of a wrong kind"
    return " ".join(str(error).split())[:400] or type(error).__name__


def guarded(main: Callable):
    """`main()`; wrong input, a loss that is not finite or a device out of memory is one line, Ctrl-C exit code 130.

    Only the main rank shows what all ranks raise. Exit code 141 is that of SIGPIPE: the reader of the output has gone.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A log file is read while it is written; a terminal may not know all characters.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")

    ranks = {name: os.environ.get(name, default) for name, default in LAUNCHED.items()}
    if wrong := next((name for name, value in ranks.items() if not (value.isascii() and value.isdecimal())), None):
        fail(f"{wrong} is {ranks[wrong]!r}: a launcher sets it to a whole number, so unset it")
    if int(ranks["RANK"]) >= int(ranks["WORLD_SIZE"]):  # whose error nobody would show
        fail(f"RANK is {ranks['RANK']}, and WORLD_SIZE {ranks['WORLD_SIZE']}: a launcher sets both, so unset them")

    def drop_output():  # the flush at exit must not fail again
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    try:
        try:
            return main()
        finally:
            if sys.stdout:  # None if it was closed
                sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        sys.exit(141)
    except (InputError, FloatingPointError) as error:  # all ranks raise it, the main one shows it
        fail(str(error), show=os.environ.get("RANK", "0") == "0")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            fail(f"a name is longer than this disk allows: {str(error.filename)[:60]}...")
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM):
            fail(f"cannot use {error.filename2 or error.filename}: {error.strerror}")
        if error.errno not in FULL:
            raise
        drop_output()
        fail(f"no space left on the disk of {error.filename2 or error.filename or 'the output'}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if any(f"(os error {number})" in str(error) for number in FULL):  # of tokenizers
            fail(f"cannot write: {error}; make room there or choose another place")
        torch = sys.modules.get("torch")  # importing it takes seconds
        if torch is None or not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        what = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        detail = " ".join(str(error).partition(" GPU ")[0].split())
        fail(f"out of {what}. Lower device_batch_size or use a smaller model. ({detail})")  # this rank alone


def fail(message: str, show: bool = True):
    if show:
        print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    sys.exit(2)
