"""Weights from a model hub or a web address: whole under their name, or not there.

The download is the library's: huggingface_hub's, which resumes a broken connection, or torch.hub's, which checks the
hash. Neither resumes what a killed process left, as files that processes share are corrupted where locks do not hold.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import textwrap
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from vab.extras import pip_install
from vab.files import Lock
from vab.spec import UserError

PARTIAL = ".partial"
"""Suffix of a file that torch.hub is downloading."""
_SILENCE_SECONDS = 30
"""Without a byte from the server, after which torch.hub, which has no limit of its own, gives up."""


def is_offline() -> bool:
    """Whether the user forbids all fetching: ``HF_HUB_OFFLINE=1``, which other libraries respect, too."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def download(url: str, place: Path, sha256: str) -> None:
    """Fetch a file, unless it is there; another process that fetches the same one is waited for.

    Args:
        url: Its address.
        place: Where it goes; its folder is made.
        sha256: Its hash, or the beginning of it.

    Raises:
        UserError: If it cannot be fetched, or has another hash; nothing is at ``place`` then.
        OSError: If the disk is full.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    while not place.exists():
        # The lock's file is deleted after use: who waited for it then tries again.
        with suppress(BlockingIOError), Lock(place.with_name(f".{place.name}.lock"), required=False, temporary=True):
            if not place.exists():
                _download(url, place, sha256)


def _download(url: str, place: Path, sha256: str) -> None:
    for left in place.parent.glob(f"{place.name}.*{PARTIAL}"):  # by processes that were killed
        left.unlink()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_SECONDS)
    try:
        torch.hub.download_url_to_file(url, str(place), sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = getattr(error, "reason", "") if isinstance(error, urllib.error.URLError) else str(error)
        raise UserError(f"{url} could not be fetched ({str(reason or type(error).__name__)[:150]})") from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def asking_hub(complain: Callable[[str], str]) -> Iterator[Any]:
    """The module huggingface_hub, which does not print a line for each attempt in here.

    Args:
        complain: From why the hub did not answer, or not with what was asked for, to the message.

    Raises:
        UserError: With that message, or if the package is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(
            f"{complain(f'which needs a package: {error}')}; {pip_install('huggingface_hub')} to fetch it"
        ) from error
    # The hub's client raises what its own HTTP library does, and has had three of them.
    problems: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield huggingface_hub
    except problems as error:
        raise UserError(complain(_reason(error))) from error
    finally:
        logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """Why the hub did not give a file, in a few words."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The hub's client says at length that it has neither an answer nor a file; what it was raised from says why.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    words = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(words, 150, placeholder=" ...")


def cached(repository: str, files: tuple[str, ...]) -> Path | None:
    """Files of a repository in the hub's cache: the file, or their folder if they are several; None if one is not."""
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return None
    paths = [try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE) for name in files]
    if not paths or not all(isinstance(path, str) for path in paths):
        return None
    first = Path(str(paths[0]))
    return first if len(paths) == 1 else first.parent


def fetch(repository: str, name: str, wanted: str, advice: str) -> Path:
    """A file of a repository on the hub, fetched into its cache.

    Args:
        repository: ``owner/name``.
        name: Of the file.
        wanted: What it is for and where it was not, for the message.
        advice: What to do instead, likewise.

    Raises:
        UserError: If the user forbids it, or it does not succeed.
    """
    if is_offline():
        raise UserError(f"{wanted}, and HF_HUB_OFFLINE forbids to fetch it from {repository}; {advice}")
    with asking_hub(
        lambda reason: (
            f"{wanted}, and {repository} on the hub did not give it ({reason}); {advice};"
            " with HF_HUB_OFFLINE=1 it is not tried"
        )
    ) as hub:
        print(f"fetching {name} from {repository} on the hub", file=sys.stderr)  # it tries for half a minute
        return Path(hub.hf_hub_download(repository, name))
