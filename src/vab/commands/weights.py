"""Files of weights: ``vab weights list``, ``fetch`` and ``verify``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from vab.commands.installation.report import Finding, show_findings
from vab.files import Lock, write_atomically
from vab.frozen.downloading import PARTIAL, is_offline
from vab.frozen.hashes import FORMAT, RECORD, Checked, check, read_record
from vab.frozen.published import Published, tell_licence
from vab.frozen.registry import Weights, all_weights, fetch_into, files_in, files_of, published_as
from vab.spec import UserError


def list_weights() -> None:
    """Which weights are where, whether they are what they should be, and what to type for those that are absent.

    A file whose hash is known is read whole for it, which takes a second or so for each gigabyte.
    """
    show_findings(Console(), weights_found())


def fetch_weights(names: list[str], out: str) -> None:
    """Fetch weights into one folder, where they are found without a network if VAB_WEIGHTS names it.

    Files that are there are not fetched again; a file that was interrupted is fetched from its beginning. Their hashes
    are compared with those that are published, and written into the folder's weights.json for vab weights verify.

    Args:
        names: Of codecs, judges and vision encoders, as in vab weights list.
        out: The folder; it is made where it does not exist.
    """
    wanted = list(dict.fromkeys(published_as(name) for name in names))
    if not wanted:
        raise UserError("--names is empty: vab weights list shows what there is")
    folder = Path(out).expanduser()
    with _alone(folder):
        if (folder / RECORD).is_file() and not read_record(folder):
            raise UserError(f"{folder / RECORD} is of another program, and vab needs that name: take another folder")
        there = [published for published in wanted if _is_there(folder, published)]
        absent = [published for published in wanted if published not in there]
        if absent and is_offline():
            raise UserError(
                f"HF_HUB_OFFLINE forbids to fetch {', '.join(published.name for published in absent)}: unset it, "
                f"or type this on a machine with a network and copy {folder} to where that is on this one"
            )
        for published in there:
            print(f"{published.name}: there already")
        for published in absent:
            tell_licence(published.owner, published.licence)
            fetched = fetch_into(folder, published)
            record = {"format": FORMAT, "files": read_record(folder) | fetched}
            write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
            for name, facts in fetched.items():
                print(f"{published.name}: {folder / name}, {facts['bytes'] / 1e6:,.1f} MB, SHA-256 {facts['sha256']}")
    print(f"they are found if VAB_WEIGHTS names the folder: export VAB_WEIGHTS={folder.absolute()}")


def verify_weights(folder: str | None = None) -> None:
    """Read files of weights and compare them with their known hashes: published, stated by the hub, or recorded.

    A file that has another hash is named with both, and the exit status is 2. A file of which no hash is known is said
    to be unchecked.

    Args:
        folder: Whose files are read, all of them; if not given, those weights that vab finds by itself.
    """
    problems, counts = [], {"ok": 0, "unchecked": 0}
    paths = _to_verify(Path(folder).expanduser() if folder else None)
    if not paths:
        raise UserError(f"no weights are in {folder or 'the places of vab weights list'}: type {_fetch_line(folder)}")
    for path, declared in paths:
        try:
            checked = check(path, declared)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}")
            continue
        if checked.state == "changed":
            problems.append(f"{path}: {_difference(checked)}")
            continue
        counts[checked.state] += 1
        print(f"{checked.state:<10} {path}: {_in_words(checked)}")
    if folder:
        names = read_record(Path(folder).expanduser())
        lost = [name for name in names if not (Path(folder).expanduser() / name).is_file()]
        problems += [f"{Path(folder) / name} is not there, but {RECORD} says that it was fetched" for name in lost]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(problems) + sum(counts.values())} files are not what they were; "
            f"delete those, and type {_fetch_line(folder)}\n" + "\n".join(problems)
        )
    print(f"{counts['ok']} of {sum(counts.values())} files have the hash that is known of them; of the others none is")


def _fetch_line(folder: str | None) -> str:
    return f"vab weights fetch --names NAME --out {folder or 'FOLDER'}, with a name of vab weights list"


def weights_found() -> list[Finding]:
    """What `list_weights` prints; nothing is fetched."""
    return [_finding(weights) for weights in all_weights()]


def _finding(weights: Weights) -> Finding:
    published = weights.published
    name = f"{weights.kind} {', '.join(dict.fromkeys(each.partition(':')[0] for each in weights.names))}"
    facts: dict[str, Any] = {"kind": weights.kind, "names": list(weights.names)}
    if published is None:
        return Finding(name, "ok", "ships with vab", facts=facts)
    facts |= {"source": published.source, "licence": published.licence or None, "extra": published.extra or None}
    fetch = f"vab weights fetch --names {published.name} --out FOLDER"
    place, paths = _of_machine(published)
    if place is None:
        absent = _joined(f"published in {published.source}", published.licence)
        return Finding(name, "absent", absent, fetch, facts=facts)
    checked = [check(path, published.sha256) for path in paths]
    size = sum(path.stat().st_size for path in paths)
    facts |= {
        "path": str(place),
        "bytes": size,
        "files": [_as_json(*pair) for pair in zip(paths, checked, strict=True)],
    }
    changed = [(path, one) for path, one in zip(paths, checked, strict=True) if one.state == "changed"]
    if changed:
        detail = "; ".join(f"{path}: {_difference(one)}" for path, one in changed)
        return Finding(name, "broken", detail, f"delete it, and type {fetch}", facts=facts)
    words = dict.fromkeys(_in_words(one) for one in checked)
    return Finding(name, "ok", _joined(f"{place}, {size / 1e6:,.1f} MB", *words, published.licence), facts=facts)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _in_words(checked: Checked) -> str:
    return f"hash {checked.known.source}" if checked.known else "unchecked, no hash is known"


def _difference(checked: Checked) -> str:
    known = checked.known
    return f"its hash is {checked.got}, expected {known.digest} {known.source}" if known else ""


def _as_json(path: Path, checked: Checked) -> dict[str, Any]:
    known = checked.known._asdict() if checked.known else None
    return {"file": path.name, "hash": checked.state, "expected": known, "got": checked.got or None}


def _of_machine(published: Published) -> tuple[Path | None, list[Path]]:
    """Where weights are found, and their files."""
    place = published.local()
    return place, [] if place is None else files_of(place, published) or _inside(place)


def _to_verify(folder: Path | None) -> list[tuple[Path, str]]:
    """Files of a folder, or of the weights that are found, and the hashes that vab itself knows."""
    every = [weights.published for weights in all_weights() if weights.published]
    if folder is None:
        return [(path, published.sha256) for published in every for path in _of_machine(published)[1]]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    declared = {Path(name).name: published.sha256 for published in every for name in published.names}
    return [(path, declared.get(path.name, "")) for path in _inside(folder)]


def _inside(folder: Path) -> list[Path]:
    """A folder's files but hidden and unfinished ones, and the record."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != PARTIAL)
    return [
        path
        for path in paths
        if path.name != RECORD and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _is_there(folder: Path, published: Published) -> bool:
    """Whether a folder has weights.

    Raises:
        UserError: If it has, but they were changed.
    """
    paths = files_in(folder, published)
    for path in paths:
        if (checked := check(path, published.sha256)).state == "changed":
            raise UserError(f"{path} is there, but {_difference(checked)}: delete it, and type the same command again")
    return bool(paths)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other fetches out of it.

    Raises:
        UserError: If it cannot be made or written to, or another fetch is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--out {folder} cannot be written: its permissions, or its disk's, forbid it")
        lock = Lock(folder, wait=False, required=False)
    except BlockingIOError as error:
        raise UserError(f"another vab weights fetch is writing to {folder}: wait until it has ended") from error
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error
    with lock:
        yield
