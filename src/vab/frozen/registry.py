"""All weights that the loaders can ask for, by name, and how they are put into a folder that needs no network.

Nothing here imports the packages that the networks are made of.
"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vab.files import sha256_of
from vab.frozen import clap, clip_files, dac, encodec, panns, passt, vggish
from vab.frozen.codec import CODECS
from vab.frozen.downloading import asking_hub, download
from vab.frozen.hashes import digest_like, is_digest
from vab.frozen.judges import JUDGES
from vab.frozen.published import Published
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


def fetch_into(folder: Path, published: Published) -> dict[str, dict[str, Any]]:
    """Put weights where `Published.find` finds them once ``folder`` is $VAB_WEIGHTS.

    Files of the hub are collected in a hidden folder until the last one is there.

    Returns:
        By name in the folder what `vab.frozen.hashes.RECORD` says of each file.

    Raises:
        UserError: If they cannot be fetched, or what came is not what was published.
    """
    place = folder / published.names[0]
    if not published.repository:
        download(published.url, place, published.sha256)
        sources = {place: published.url}
    else:
        beside = place.with_name(f".{place.name}.fetching")
        names = {place if len(published.files) == 1 else place / name: name for name in published.files}
        sources = {target: _from_hub(published.repository, name, beside) for target, name in names.items()}
        for target, name in names.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            (beside / name).replace(target)
        shutil.rmtree(beside)
    return {
        target.relative_to(folder).as_posix(): {
            "sha256": sha256_of(target),
            "bytes": target.stat().st_size,
            "source": source,
            "licence": published.licence or None,
        }
        for target, source in sources.items()
    }


def _from_hub(repository: str, name: str, folder: Path) -> str:
    """Fetch a file of the hub into a folder, unless it is there; gives repository, commit and name.

    Raises:
        UserError: If the hub does not give it, or gives another file than it says.
    """
    with asking_hub(lambda reason: f"{repository} on the hub did not give {name} ({reason})") as hub:
        stated = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name))
        path = Path(hub.hf_hub_download(repository, name, revision=stated.commit_hash, local_dir=folder))
    digest = stated.etag or ""
    if len(digest) in (40, 64) and is_digest(digest) and (got := digest_like(digest, path)) != digest:
        path.unlink()
        raise UserError(f"{repository} gave a {name} of hash {got}, expected {digest}: it was deleted; fetch it again")
    return f"{repository}@{stated.commit_hash}/{name}"
