"""Wrong input: one exception, which a command shows as one line on stderr, with exit code 2."""

import errno
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input from the user; the message says in one line what is wrong and what to do."""


def guarded(main: Callable) -> None:
    """Run `main`; wrong input, a loss that is not finite or a device out of memory is one line, Ctrl-C exit code 130.

    Only the main rank shows what all ranks raise.
    """
    try:
        main()
    except (InputError, FloatingPointError) as error:  # all ranks raise it, the main one shows it
        fail(str(error), show=os.environ.get("RANK", "0") == "0")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        fail(f"a name is longer than this disk allows: {str(error.filename)[:60]}...")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        torch = sys.modules.get("torch")  # importing it takes seconds
        if torch is None or not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        what = " ".join(str(error).partition(" GPU ")[0].split())
        fail(f"{what} Lower device_batch_size, or take a smaller model")  # this rank alone


def fail(message: str, show: bool = True):
    if show:
        print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    sys.exit(2)
