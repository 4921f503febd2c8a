"""Wrong input: one exception, which a command shows as one line on stderr, with exit code 2."""

import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input from the user; the message says in one line what is wrong and what to do."""


def guarded(main: Callable) -> None:
    """Run `main`; wrong input, a loss that is not finite or a GPU out of memory is one line, Ctrl-C exit code 130.

    Only the main rank shows what all ranks raise.
    """
    import torch  # takes seconds; most importers of this module only need InputError

    try:
        main()
    except (InputError, FloatingPointError) as error:  # all ranks raise it, the main one shows it
        fail(str(error), show=os.environ.get("RANK", "0") == "0")
    except torch.OutOfMemoryError as error:  # perhaps on this rank alone
        fail(f"{str(error).partition(' GPU ')[0]} Lower device_batch_size, or take a smaller model")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str, show: bool = True):
    if show:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
