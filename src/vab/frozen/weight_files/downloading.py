"""Download weights from the model hub or a web address: a file is complete under its name, or it is not there.

huggingface_hub and torch.hub do it. A broken connection to the hub is resumed. What a killed process left is not
resumed, because a partial file that processes share is corrupted where locks do not work.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vab import UserError
from vab.extras import pip_install
from vab.files import Lock
from vab.frozen.weight_files.hashes import HUB_HASH, check

PARTIAL = ".partial"
"""Suffix of a file that torch.hub is downloading."""
_TIMEOUT_SECONDS = 30
"""Longest wait for the next byte of a web address; torch.hub has no timeout of its own."""


def is_offline() -> bool:
    """Whether the user forbids downloads, by ``HF_HUB_OFFLINE=1``, which other libraries respect, too."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def fetch(problem: str, advice: str, download: Callable[..., Any], source: str, *arguments: Any) -> Path:
    """Call ``download(source, *arguments)``, which returns a path, unless the user forbids downloads.

    Args:
        problem: Which weights are needed and where they were not found, for the message.
        advice: What to do instead, for the message.
        download: `from_hub`, `from_address`, or a function of another package.
        source: Repository or address.
        arguments: Further arguments of ``download``.

    Raises:
        UserError: If the user forbids downloads, or it fails.
        OSError: If the disk is full.
    """
    if is_offline():
        raise UserError(f"{problem}, and HF_HUB_OFFLINE forbids to fetch it from {source}; {advice}")
    print(f"fetching {source}", file=sys.stderr)  # the client waits half a minute for a hub that does not answer
    try:
        return Path(download(source, *arguments))
    except Exception as error:  # the hub's client also raises the exceptions of its HTTP library
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        # The hub's client says that it has no such file in its cache; the cause says why the hub did not give it.
        cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" else None
        reason = str(cause or error).strip() or type(error).__name__
        if not isinstance(error, UserError):
            reason = textwrap.shorten(reason, 200, placeholder=" ...")
        raise UserError(f"{problem}, and fetching it from {source} failed: {reason}; {advice}") from error


def from_address(url: str, place: Path, sha256: str) -> Path:
    """Download a file from a web address to ``place``, unless it is there; wait for a process that downloads it.

    Args:
        url: Address of the file.
        place: Path of the file; its folder is created.
        sha256: Hash of the file, or the beginning of it.

    Returns:
        ``place``.

    Raises:
        OSError: If the download fails; then ``place`` is not there.
        RuntimeError: If the file has another hash; it is deleted.
    """
    if place.exists():  # also where its folder cannot be written
        return place
    import torch.hub

    place.parent.mkdir(parents=True, exist_ok=True)
    with Lock(place.with_name(f".{place.name}.lock"), required=False, temporary=True):
        if place.exists():
            return place
        for abandoned in place.parent.glob(f"{place.name}.*{PARTIAL}"):  # by processes that were killed
            abandoned.unlink()
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT_SECONDS)
        try:
            torch.hub.download_url_to_file(url, str(place), sha256, progress=sys.stderr.isatty())
        finally:
            socket.setdefaulttimeout(before)
    return place


def from_hub(repository: str, files: Sequence[str], cache: Path | None = None) -> Path:
    """Download files of a repository on the hub, all of one commit, unless they are cached; check their hashes.

    Args:
        repository: ``owner/name``.
        files: Names in the repository.
        cache: Folder of the hub's cache; None takes the user's.

    Returns:
        As `cached`.

    Raises:
        UserError: If the hub's package is not installed, or a file has another hash than the hub states; it is deleted.
        Exception: Of the hub's client, if it does not get a file.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(f"the hub needs a package ({error}): {pip_install('huggingface_hub')}") from error
    commit = None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it prints a line for each attempt
    try:
        for name in files:
            path = Path(hub.hf_hub_download(repository, name, revision=commit, cache_dir=cache))
            commit = path.parent.name
            checked = check(path)
            if checked.state == "unchecked":  # a cache without symbolic links does not contain the hub's hashes
                stated = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, revision=commit)).etag or ""
                if HUB_HASH.fullmatch(stated):
                    checked = check(path, stated, "as the hub says")
            if checked.state == "changed":
                for each in (path.resolve(), path):
                    each.unlink(missing_ok=True)
                raise UserError(f"{repository} gave another {name}: {checked}; it was deleted")
    finally:
        logging.set_verbosity(verbosity)
    return path if len(files) == 1 else path.parent


def cached(repository: str, files: Sequence[str]) -> Path | None:
    """The path of a repository's file in the hub's cache, or of the folder of several files; None if one is absent."""
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return None
    paths = [try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE) for name in files]
    if not paths or not all(isinstance(path, str) for path in paths):
        return None
    first = Path(str(paths[0]))
    return first if len(paths) == 1 else first.parent
