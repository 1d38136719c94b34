"""All weights that the loaders can ask for, by name, and how they are put into a folder that needs no network.

Nothing here imports the packages that the networks are made of.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vab.extras import pip_install
from vab.frozen import clap, clip_files, dac, encodec, panns, passt, vggish
from vab.frozen.codec import CODECS
from vab.frozen.downloading import download, progress
from vab.frozen.hashes import digest_like, is_digest, sha256_of
from vab.frozen.judges import JUDGES
from vab.frozen.published import Published, hub_reason
from vab.spec import UserError

VISION: tuple[str, ...] = ("tiny", *clip_files.PUBLISHED)
"""Vision encoders of the shipped recipes; there are many more (`vab.frozen.clip_files.parse`)."""
_PUBLISHED: dict[str, dict[str, Published]] = {
    "codec": encodec.PUBLISHED | dac.PUBLISHED,
    "vision encoder": clip_files.PUBLISHED,
    "judge": {
        "vggish": vggish.PUBLISHED,
        "vggish_relu": vggish.PUBLISHED,
        **panns.PUBLISHED,
        "passt": passt.PUBLISHED,
        "clap": clap.PUBLISHED,
    },
}


@dataclass(frozen=True)
class Weights:
    """One file, or folder, of weights, and the networks that are made from it."""

    kind: str
    """``codec``, ``vision encoder`` or ``judge``."""
    names: tuple[str, ...]
    """What its loader calls the networks."""
    published: Published | None
    """None where it ships with the package."""


class Fetched(NamedTuple):
    """A file that was put into a folder."""

    name: str
    """In that folder; may have folders in it."""
    sha256: str
    bytes: int
    source: str
    """Address, or repository and commit."""


def all_weights() -> list[Weights]:
    """Everything that the loaders know by name, each file once."""
    found = []
    for kind, names in (("codec", CODECS), ("vision encoder", VISION), ("judge", JUDGES)):
        files: dict[str, tuple[Published | None, list[str]]] = {}
        for name in names:
            published = None if name.startswith("tiny") else _PUBLISHED[kind][name.partition(":")[0]]
            files.setdefault(published.name if published else name, (published, []))[1].append(name)
        found += [Weights(kind, tuple(together), published) for published, together in files.values()]
    return found


def published_as(name: str) -> Published:
    """What is published under a name that a loader or `Published.name` gives it.

    Raises:
        UserError: If there is no such name, or nothing to fetch.
    """
    every = all_weights()
    known = {known: each.published for each in every for known in each.names}
    known |= {each.published.name: each.published for each in every if each.published}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(dict.fromkeys(each.published.name for each in every if each.published))
        more = "; other models of open_clip: hf download OWNER/NAME --local-dir FOLDER/NAME" if "/" in name else ""
        raise UserError(f"no weights are called {name!r}{hint}; there are {names}{more}")
    published = known[name]
    if published is None:
        raise UserError(f"{name} ships with vab: there is nothing to fetch")
    return published


def files_in(folder: Path, published: Published) -> list[Path]:
    """The files of ``published`` in a folder where `fetch_into` puts them, or under another of its names.

    Args:
        folder: Such as $VAB_WEIGHTS.
        published: Of which weights.

    Returns:
        All that are needed; empty if one is missing.
    """
    for place in (folder / name for name in published.names):
        if files := files_of(place, published):
            return files
    return []


def files_of(place: Path, published: Published) -> list[Path]:
    """The files at a place that `Published.find` gives; empty if one is missing."""
    if place.is_file():
        return [place]
    expected = [place / name for name in published.files] if len(published.files) > 1 else []
    return expected if all(path.is_file() for path in expected) else []


def fetch_into(folder: Path, published: Published) -> list[Fetched]:
    """Put weights where `Published.find` finds them once ``folder`` is $VAB_WEIGHTS.

    Several files that belong together are collected beside their place until the last one is there.

    Raises:
        UserError: If they cannot be fetched, or what came is not what was published.
    """
    place = folder / published.names[0]
    if not published.repository:
        _fetch(published.url, place, published.sha256)
        return [_fetched(place, folder, published.url)]
    single = len(published.files) == 1
    beside = place.with_name(f".{place.name}.fetching")
    revision, done = "main", []
    for name in published.files:
        target = place if single else beside / name
        url, digest, revision = _on_hub(published.repository, name, revision)
        if target.exists() and digest and digest_like(digest, target) != digest:
            target.unlink()  # of an earlier attempt, before its authors changed it
        _fetch(url, target, digest)
        done.append((target, f"{published.repository}@{revision}/{name}"))
    if single:
        return [_fetched(target, folder, source) for target, source in done]
    if not place.exists():
        beside.rename(place)
    else:  # some of the files were there
        for target, _ in done:
            target.replace(place / target.name)
        beside.rmdir()
    return [_fetched(place / target.name, folder, source) for target, source in done]


def _fetch(url: str, place: Path, digest: str) -> None:
    with progress(place.name) as tell:
        download(url, place, digest, tell)


def _fetched(path: Path, folder: Path, source: str) -> Fetched:
    return Fetched(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size, source)


def _on_hub(repository: str, name: str, revision: str) -> tuple[str, str, str]:
    """Address of a file on the hub, its hash, empty if the hub states none, and the commit that it is of.

    Raises:
        UserError: If the hub cannot be asked, or does not have it.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(
            f"{repository} is on a hub, which needs a package ({error}): {pip_install('huggingface_hub')}"
        ) from error
    # The hub's client raises what its own HTTP library does, and has had three of them.
    problems: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
    try:
        found = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
    except problems as error:
        raise UserError(f"{repository} on the hub did not give {name} ({hub_reason(error)})") from error
    digest = found.etag or ""
    return (
        found.location,
        digest if len(digest) in (40, 64) and is_digest(digest) else "",
        found.commit_hash or revision,
    )
