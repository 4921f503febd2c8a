"""Renders chat templates that are not ours in another process, with limits of time, memory and length.

A chat template is a program of whoever made the model. Jinja's sandbox keeps it away from files, but allows
`{{ "x" * 10**10 }}` and loops that do not end, also on some messages only.

    python -P chat_renderer.py      # per line of stdin: arguments of `render_jinja_template` as JSON -> its texts
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from jinja2 import TemplateError

SECONDS = 10.0  # for one call
MEMORY_BYTES = 1 << 30  # beyond what the process has at its start
MAX_CHARS = 1 << 24  # of one conversation


class Renderer:
    """The process: started at the first call, after a limit ended it, and in a forked process anew."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, 0

    def render(self, **arguments) -> list[str]:
        """The conversations as texts. Raises TemplateError with the template's error, ValueError at a limit."""
        line = json.dumps(arguments, default=lambda value: f"<{type(value).__name__}>")
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self.start()
            timer = threading.Timer(SECONDS, self.process.kill)
            timer.start()
            try:
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            finally:
                timer.cancel()
            if not reply:
                self.process.kill()
                self.process.wait()
                self.process = None
                raise ValueError(f"it takes more than {SECONDS:g} s")
        reply = json.loads(reply)
        if "limit" in reply:
            raise ValueError(reply["limit"])
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["texts"]

    def start(self) -> None:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process, self.owner = subprocess.Popen([sys.executable, "-P", __file__], **streams), os.getpid()
        atexit.register(self.process.kill)
        self.process.stdout.readline()  # it has imported what it needs


RENDERER = Renderer()


def limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # elsewhere than on Linux only time is limited
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            texts = render_jinja_template(**json.loads(line))[0]
            texts = [text.encode(errors="replace").decode() for text in texts]  # half a pair of surrogates is "?"
            long = max(map(len, texts), default=0) > MAX_CHARS
            reply = {"limit": f"it writes more than {MAX_CHARS:,} characters"} if long else {"texts": texts}
        except MemoryError:
            reply = {"limit": f"it takes more than {MEMORY_BYTES >> 20} MiB"}
        except Exception as error:  # of any kind: it is a program
            reply = {"error": f"{type(error).__name__}: {error}"[:1000].encode(errors="replace").decode()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
