"""Files of a dataset on the Hub, downloaded one by one when they are read; failures of the network are retried."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download

from ..errors import InputError
from .splits import is_visible

RETRY_DELAYS = (1, 2, 4, 8, 16)  # seconds between attempts to download


def hub_files(dataset: str, revision: str | None) -> tuple[list[str], Callable[[str], Path], str]:
    """The names of a Hub dataset's files, a function that downloads one and gives its path, and the commit."""
    owner, name, *folder = dataset.split("/")
    name, _, tag = name.partition("@")
    repo, prefix = f"{owner}/{name}", "".join(f"{part}/" for part in folder)
    info = with_retry(
        lambda: HfApi().dataset_info(repo, revision=revision or tag or None, timeout=30),
        f"dataset {dataset} (not a folder here)",
    )
    # The cache's lock lets the processes of one machine take turns, so each file is fetched once. Whatever is pushed
    # later, this run reads the commit that it began with.
    fetch = partial(hf_hub_download, repo, repo_type="dataset", revision=info.sha)
    names = sorted(file.rfilename for file in info.siblings if file.rfilename.startswith(prefix))
    names = [name for name in (name.removeprefix(prefix) for name in names) if is_visible(name)]

    def download(name: str) -> Path:
        return Path(with_retry(lambda: fetch(prefix + name), f"file {prefix}{name} of dataset {repo}"))

    return names, download, info.sha


def with_retry(action: Callable, what: str):
    """Call `action`; failures of network and server are retried with growing delays, others become an InputError."""
    for attempt, delay in enumerate((*RETRY_DELAYS, None), start=1):
        try:
            return action()
        except errors.OfflineModeIsEnabled:
            raise InputError(f"{what}: the Hub cannot be reached, because HF_HUB_OFFLINE is set") from None
        except errors.GatedRepoError:
            raise InputError(f"{what}: accept its terms on the Hub, then `hf auth login`") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise InputError(f"{what}: the Hub has no such dataset or revision, or it is private") from None
        except Exception as error:  # httpx, xet and the file system each have their own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 500
            if status < 500 and status not in (408, 429):
                raise InputError(f"{what}: the Hub refuses it with {reason}") from None
            if delay is None:
                raise InputError(f"{what}: failed {attempt} times, last with {reason}; run again to resume") from error
            warnings.warn(f"{what}: attempt {attempt} failed with {reason}; again in {delay} s", stacklevel=2)
            time.sleep(delay)
