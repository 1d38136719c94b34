"""The folder that a data set is written to."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname

from vab.data.shards.format import PARTS, rows_name, shard_name
from vab.files import TEMPORARY_SUFFIX, explain_full_disk, sync_folder
from vab.spec import UserError

_WORK = ".vab-"
"""Names of work folders begin like this; host and process follow."""
_DAY = 86_400
"""s. Work folders of other hosts are deleted when they are older."""
_PART = re.compile(r"(\d{6,})\.json")
_OWN_TAR = re.compile(r"shard-\d{6,}(-\d+)?\.tar")


class OutFolder:
    """The folder that a data set is written to. Files appear there whole, in a given order.

    Several processes may write to one folder: each makes its files in a work folder of its own.

    Args:
        place: The folder; it is made when the first file is published.

    Raises:
        UserError: If it is an address, or on a drive of another system.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        if "://" in self.place or (os.name != "nt" and re.match(r"[A-Za-z]:[/\\]", self.place)):
            raise UserError(f"{self.place} is not a folder of this machine: give one, and upload it afterwards")
        self._folder = Path(place)

    def __str__(self) -> str:
        return self.place

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._folder / name).exists()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        return self.path(name).stat().st_size if self.has(name) else None

    def time(self, name: str) -> int:
        """When a file was written, ns."""
        return self.path(name).stat().st_mtime_ns

    def path(self, name: str) -> Path:
        """A file of this machine with the content of ``name``."""
        return self._folder / name

    def names(self) -> list[str]:
        """Files of the folder, without those in subfolders, sorted."""
        return sorted(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else []

    def parts(self) -> set[int]:
        """Numbers of the parts that are done."""
        folder = self._folder / PARTS
        names = os.listdir(folder) if folder.is_dir() else []
        return {int(found[1]) for name in names if (found := _PART.fullmatch(name))}

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder for files in the making; what is not published goes with it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(TEMPORARY_SUFFIX, f"{_WORK}{gethostname()}-{os.getpid()}-", self._folder))
            (work / PARTS).mkdir()
        except OSError as error:
            explained = explain_full_disk(error, self._folder, 0)
            if isinstance(explained, UserError):
                raise explained from error
            raise UserError(f"cannot write to {self._folder}: {error.strerror}; give another folder") from error
        try:
            yield work
        except UserError as error:
            raise self.explain(error, work) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def scratch(self) -> Path:
        """A folder for unnamed temporary files."""
        return self._folder

    def explain(self, error: UserError, work: Path) -> UserError:
        """An error about a file in a work folder, as one about the data set's folder."""
        return UserError(str(error).replace(f"{work / PARTS}", self.place).replace(f"{work}", self.place))

    def publish(self, work: Path, names: Sequence[str]) -> None:
        """Move files from a work folder to the data set's, one after the other."""
        for name in names:
            (self._folder / name).parent.mkdir(exist_ok=True)
            (work / name).replace(self._folder / name)
        for folder in {(self._folder / name).parent for name in names}:
            sync_folder(folder)

    def remove(self, *names: str) -> None:
        """Delete files, if they are there."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed writers left half made, and nothing of writers at work."""
        for path in self._folder.glob(f"{_WORK}*{TEMPORARY_SUFFIX}"):
            host, process = path.name.removeprefix(_WORK).rsplit("-", 2)[:2]
            with suppress(OSError):
                is_mine = host == gethostname() and os.name != "nt"
                if not _is_running(int(process)) if is_mine else time.time() - path.stat().st_mtime > _DAY:
                    shutil.rmtree(path, ignore_errors=True)

    def remove_versions(self, number: int, version: int) -> None:
        """Delete the files of a part's earlier versions."""
        for old in range(version):
            self.remove(shard_name(number, old), rows_name(number, old))

    def own_tars(self) -> list[str]:
        """Tars with names of parts, sorted."""
        return [name for name in self.names() if _OWN_TAR.fullmatch(name)]

    def foreign_tars(self) -> list[str]:
        """Tars that no writer of a data set has put there."""
        tars = [name for name in self.names() if name.endswith(".tar")]
        return [name for name in tars if not (self._folder / PARTS).is_dir() or not _OWN_TAR.fullmatch(name)]

    def remove_parts(self) -> None:
        """Delete the record of what is done, and nothing else that is there."""
        folder = self._folder / PARTS
        paths = sorted(folder.iterdir(), key=lambda path: path.stem == "head") if folder.is_dir() else []
        for path in paths:  # what says that the folder is an extraction's comes last
            if path.suffix in (".json", ".npy") and (path.stem == "head" or re.fullmatch(r"\d{6,}(-\d+)?", path.stem)):
                path.unlink()
        self.sweep()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
