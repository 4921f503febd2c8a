"""Programs that listen: a free port for one, and its address once it answers."""

import os
import socket
import subprocess
import time
import urllib.request

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words, port: int, path: str = "", environment=None, **options) -> tuple[subprocess.Popen, str]:
    """Run a command that will listen on `port` -> (process, its address), when `path` there is answered."""
    process = subprocess.Popen(words, env={**os.environ, **(environment or {})}, **options)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url + path, timeout=2)
            return process, url
        except OSError:
            if process.poll() is not None:
                pytest.fail("the program ended before it answered")
            time.sleep(0.2)
    process.kill()
    raise TimeoutError(url)
