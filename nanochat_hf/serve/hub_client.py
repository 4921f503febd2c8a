"""What every upload to the Hub needs: which files, a login, a second try when it breaks off, errors in one line."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HTTPError

from ..errors import InputError

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
MODEL_FILES += ("*_nanochat.py",)
MODEL_FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def log_in() -> HfApi:
    if (token := get_token()) is None:
        raise InputError("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token)


@contextmanager
def readable(repo: str):
    """Turn the client's errors into one line that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the Hub does not accept the token: log in again with `hf auth login`",
            403: f"the token may not write to {repo}: use one with write access, or another owner",
            404: f"{repo} is not there, or the token may not see it",
            429: "the Hub asks to slow down: run the same command again in a few minutes; uploaded files are kept",
        }
        other = f"the Hub answered {status}: {error.server_message or 'no reason given'}; run the same command again"
        raise InputError(advice.get(status, other)) from None
    except (HTTPError, OSError, JSONDecodeError) as error:  # httpx, hf_xet (which sends the weights), a proxy's page
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the push broke off ({reason}): run the same command again, what is up stays up") from None
    except ValueError as error:  # before it sends a file, huggingface_hub lets the Hub check the card
        if not isinstance(error.__cause__, BadRequestError):
            raise
        reason = f"{error} {error.__cause__.server_message}"
        raise InputError(f"the Hub rejects the card: {' '.join(reason.split())[:300]}") from None


def patiently(say: Callable[[str], None], send: Callable, **what):
    """send(**what); after a broken connection or a server's error wait and do it again, which resumes an upload.

    huggingface_hub does so by itself for every request but the last one, the commit.
    """
    for pause in (1, 2, 4, None):
        try:
            return send(**what)
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if pause is None or (status < 500 and status != 429):
                raise
            say(f"interrupted ({type(error).__name__}); trying again, what is up stays up")
            time.sleep(pause)
