"""Files of weights: ``vab weights list``, ``fetch`` and ``verify``."""

from __future__ import annotations

import json
from pathlib import Path

from vab import UserError
from vab.console import print_findings
from vab.files import lock_folder, write_atomically
from vab.frozen.weight_files.catalogue import all_weights, published_as
from vab.frozen.weight_files.downloading import is_offline
from vab.frozen.weight_files.found import files_below, local_files, weights_found
from vab.frozen.weight_files.hashes import FORMAT, RECORD, check, read_record
from vab.frozen.weight_files.published import Published, print_licence


def list_weights() -> None:
    """Show where the weights are, whether their hashes are right, and what to type for those that are absent.

    A file with a known hash is read as a whole, which takes about a second for each gigabyte.
    """
    print_findings(weights_found())


def fetch_weights(names: list[str], out: str) -> None:
    """Fetch weights into one folder, where vab finds them without a network if VAB_WEIGHTS names it.

    Files that are there are not fetched again; an interrupted file is fetched from its beginning. The hashes of the
    files are compared with the published ones, and written into the folder's weights.json for vab weights verify.

    Args:
        names: Of codecs, judges and vision encoders, as in vab weights list.
        out: The folder; it is created if it does not exist.
    """
    wanted = list(dict.fromkeys(published_as(name) for name in names))
    if not wanted:
        raise UserError("--names is empty: vab weights list shows what there is")
    folder = Path(out).expanduser()
    with lock_folder(folder, "vab weights fetch"):
        if (folder / RECORD).is_file() and not read_record(folder):
            raise UserError(f"{folder / RECORD} is of another program, and vab needs that name: take another folder")
        absent = [published for published in wanted if not _is_there(folder, published)]
        if absent and is_offline():
            raise UserError(
                f"HF_HUB_OFFLINE forbids to fetch {', '.join(published.name for published in absent)}: unset it, "
                f"or type this on a machine with a network and copy {folder} to where that is on this one"
            )
        for published in wanted:
            if published not in absent:
                print(f"{published.name}: there already")
        for published in absent:
            print_licence(published.owner, published.licence)
            fetched = published.fetch_into(folder)
            record = {"format": FORMAT, "files": read_record(folder) | fetched}
            write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
            for name, entry in fetched.items():
                print(f"{published.name}: {folder / name}, {entry['bytes'] / 1e6:,.1f} MB, SHA-256 {entry['sha256']}")
    print(f"they are found if VAB_WEIGHTS names the folder: export VAB_WEIGHTS={folder.absolute()}")


def verify_weights(folder: str | None = None) -> None:
    """Read files of weights and compare their hashes with the known ones: published, stated by the hub, or recorded.

    A file with another hash is printed with both hashes, and the exit status is 2. A file without a known hash is
    printed as unchecked.

    Args:
        folder: Folder whose files are all read; if not given, the weights that vab finds by itself.
    """
    every = [weights.published for weights in all_weights() if weights.published]
    fetch = f"vab weights fetch --names NAME --out {folder or 'FOLDER'}, with a name of vab weights list"
    problems, lost, counts = [], [], {"ok": 0, "unchecked": 0}
    if folder is None:
        paths = [(path, published.sha256) for published in every for path in local_files(published)]
    else:
        top = Path(folder).expanduser()
        if not top.is_dir():
            raise UserError(f"there is no folder {top}")
        declared = {Path(name).name: published.sha256 for published in every for name in published.names}
        paths = [(path, declared.get(path.name, "")) for path in files_below(top)]
        lost = [top / name for name in read_record(top) if not (top / name).is_file()]
    if not paths:
        raise UserError(f"no weights are in {folder or 'the places of vab weights list'}: type {fetch}")
    for path, digest in paths:
        try:
            checked = check(path, digest)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}")
            continue
        if checked.state == "changed":
            problems.append(f"{path}: {checked}")
            continue
        counts[checked.state] += 1
        print(f"{checked.state:<10} {path}: {checked}")
    problems += [f"{path} is not there, but {RECORD} says that it was fetched" for path in lost]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(problems) + sum(counts.values())} files are not what they were; "
            f"delete those, and type {fetch}\n" + "\n".join(problems)
        )
    print(f"{counts['ok']} of {sum(counts.values())} files have their known hash; the others have none")


def _is_there(folder: Path, published: Published) -> bool:
    """Whether a folder has weights.

    Raises:
        UserError: If it has, but they were changed.
    """
    paths = published.files_in(folder)
    for path in paths:
        if (checked := check(path, published.sha256)).state == "changed":
            raise UserError(f"{path} is there, but {checked}: delete it, and type the same command again")
    return bool(paths)
