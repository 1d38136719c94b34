"""All weights of the networks that the loaders know, by name, and how to fetch them into a folder.

This module does not import the packages that the networks are made of.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from vab.files import sha256_of
from vab.frozen import clap, clip_files, dac, encodec, panns, passt, vggish
from vab.frozen.codec import CODECS
from vab.frozen.downloading import fetch, from_address, from_hub
from vab.frozen.judges import JUDGES
from vab.frozen.published import Published
from vab.spec import UserError

VISION: tuple[str, ...] = ("tiny", *clip_files.PUBLISHED)
"""Vision encoders of the shipped recipes; `vab.frozen.clip_files.parse` says which others there are."""
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


class Weights(NamedTuple):
    """One file, or folder, of weights, and the networks that use it."""

    kind: str
    """``codec``, ``vision encoder`` or ``judge``."""
    names: tuple[str, ...]
    """The loader's names of the networks."""
    published: Published | None
    """None if the weights ship with the package."""


def all_weights() -> list[Weights]:
    """The weights of all networks that the loaders know by name, each file once."""
    found = []
    for kind, names in (("codec", CODECS), ("vision encoder", VISION), ("judge", JUDGES)):
        files: dict[str, tuple[Published | None, list[str]]] = {}
        for name in names:
            published = None if name.startswith("tiny") else _PUBLISHED[kind][name.partition(":")[0]]
            files.setdefault(published.name if published else name, (published, []))[1].append(name)
        found += [Weights(kind, tuple(together), published) for published, together in files.values()]
    return found


def published_as(name: str) -> Published:
    """The published weights of a network, by the loader's name or by `Published.name`.

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


def fetch_into(folder: Path, published: Published) -> dict[str, dict[str, Any]]:
    """Fetch weights into a folder, where `Published.find` finds them if $VAB_WEIGHTS names it.

    Files of the hub are collected in a hidden folder until the last one is there.

    Returns:
        For each file, by name in the folder, its entry in `vab.frozen.hashes.RECORD`.

    Raises:
        UserError: If they cannot be fetched, or a file has another hash than the published one.
    """
    problem, advice = f"{published.name} is not in {folder}", "type the same command again"
    place = folder / published.names[0]
    if published.url:
        fetch(problem, advice, from_address, published.url, place, published.sha256)
        sources = {place: published.url}
    else:
        cache = place.with_name(f".{place.name}.fetching")
        got = fetch(problem, advice, from_hub, published.repository, published.files, cache)
        snapshot = got.parent if len(published.files) == 1 else got  # its name is the commit
        sources = {}
        for name, target in published.targets(place).items():
            target.parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).resolve().replace(target)
            sources[target] = f"{published.repository}@{snapshot.name}/{name}"
        shutil.rmtree(cache)
    return {
        target.relative_to(folder).as_posix(): {
            "sha256": sha256_of(target),
            "bytes": target.stat().st_size,
            "source": source,
            "licence": published.licence or None,
        }
        for target, source in sources.items()
    }
