"""Weights on this machine: where they are, and whether their hashes are right. Nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vab.frozen.weight_files.catalogue import Weights, all_weights
from vab.frozen.weight_files.downloading import PARTIAL
from vab.frozen.weight_files.hashes import RECORD, check
from vab.frozen.weight_files.published import Published


def weights_found() -> list[dict[str, Any]]:
    """The weights of every network that vab knows by name, as `vab.console.print_findings` takes them."""
    return [_found(weights) for weights in all_weights()]


def _found(weights: Weights) -> dict[str, Any]:
    published = weights.published
    found: dict[str, Any] = {
        "name": f"{weights.kind} {', '.join(dict.fromkeys(each.partition(':')[0] for each in weights.names))}",
        "state": "ok",
        "needed": False,
        "detail": "ships with vab",
        "remedy": None,
        "kind": weights.kind,
        "names": list(weights.names),
    }
    if published is None:
        return found
    found |= {name: getattr(published, name) or None for name in ("source", "licence", "extra")}
    fetch = f"vab weights fetch --names {published.name} --out FOLDER"
    place = published.local()
    if place is None:
        detail = _joined(f"published in {published.source}", published.licence)
        return found | {"state": "absent", "detail": detail, "remedy": fetch}
    checked = {path: check(path, published.sha256) for path in local_files(published)}
    size = sum(path.stat().st_size for path in checked)
    files = [{"file": path.name, **one._asdict()} for path, one in checked.items()]
    found |= {"path": str(place), "bytes": size, "files": files}
    if changed := [f"{path}: {one}" for path, one in checked.items() if one.state == "changed"]:
        return found | {"state": "broken", "detail": "; ".join(changed), "remedy": f"delete it, and type {fetch}"}
    hashes = dict.fromkeys(map(str, checked.values()))
    return found | {"detail": _joined(f"{place}, {size / 1e6:,.1f} MB", *hashes, published.licence)}


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def local_files(published: Published) -> list[Path]:
    """The files of weights that are found on this machine."""
    place = published.local()
    return [] if place is None else published.files_at(place) or files_below(place)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder except hidden and unfinished ones and the record."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != PARTIAL
        and path.name != RECORD
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
