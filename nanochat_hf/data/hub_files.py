"""The Hub: files of a dataset, downloaded one by one when they are read; its errors in one line; retries."""

import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download

from ..errors import InputError
from .splits import is_visible

RETRY_DELAYS = (1, 2, 4, 8, 16)  # seconds between attempts
LOGIN = "the Hub does not accept the token: log in again with `hf auth login`"
ABSENT = "the Hub has no such repository or revision, or the token may not see it"
NO_RIGHT = "the token has no right to this: use another one (to push, with write access), or another owner"
GATED = "accept its terms on the Hub, then `hf auth login`"
OFFLINE = "the Hub cannot be reached, because HF_HUB_OFFLINE is set"


def hub_files(dataset: str, revision: str | None) -> tuple[list[str], Callable[[str], Path], str]:
    """The names of a Hub dataset's files, a function that downloads one and gives its path, and the commit."""
    owner, name, *folder = dataset.split("/")
    name, _, tag = name.partition("@")
    repo, prefix = f"{owner}/{name}", "".join(f"{part}/" for part in folder)
    look_up = partial(HfApi().dataset_info, repo, revision=revision or tag or None, timeout=30)
    info = with_retry(look_up, f"dataset {dataset} (not a folder here)")
    # The cache has a lock, so the processes of a machine fetch each file once. The commit stays that of the start.
    fetch = partial(hf_hub_download, repo, repo_type="dataset", revision=info.sha)
    names = sorted(file.rfilename for file in info.siblings if file.rfilename.startswith(prefix))
    names = [name for name in (name.removeprefix(prefix) for name in names) if is_visible(name)]

    def download(name: str) -> Path:
        return Path(with_retry(lambda: fetch(prefix + name), f"file {prefix}{name} of dataset {repo}"))

    return names, download, info.sha


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def refusal(error: Exception) -> str | None:
    """What to do about an error of the Hub or its client; None if it may pass by itself."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, errors.GatedRepoError):
        return GATED
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        return ABSENT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 500
    passes = status >= 500 or status in (408, 429)
    return None if passes else {401: LOGIN, 403: NO_RIGHT, 404: ABSENT}.get(status, f"refused with {reason_of(error)}")


@contextmanager
def hub_errors(what: str):
    """Turn the errors of the Hub, its client and the network about `what` into one line that says what to do."""
    try:
        yield
    except (errors.HfHubHTTPError, errors.HTTPError, OSError, errors.HFValidationError, JSONDecodeError) as error:
        again = f"broke off ({reason_of(error)}): run the same command again, what is there stays there"
        raise InputError(f"{what}: {refusal(error) or again}") from None


def with_retry(action: Callable, what: str, log: Callable[[str], None] = warnings.warn):
    """Call `action`, again after each of RETRY_DELAYS while network or server fail; other errors become InputError."""
    for attempt, delay in enumerate((*RETRY_DELAYS, None), start=1):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:  # httpx, xet and the file system each have their own
            if advice := refusal(error):
                raise InputError(f"{what}: {advice}") from None
            if delay is None:
                last = f"failed {attempt} times, last with {reason_of(error)}"
                raise InputError(f"{what}: {last}; run the same command again to resume") from error
            log(f"{what}: attempt {attempt} failed with {reason_of(error)}; again in {delay} s")
            time.sleep(delay)
