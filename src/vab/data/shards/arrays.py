"""Ready arrays on disk, one for each recording: a folder of .npy, .npz or hdf5 files, or one hdf5 file for all.

Nothing that is read can run code: pickled arrays are refused, and a file leads to no other one.
"""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vab.data.inputs.listing import files_below
from vab.extras import install_hint
from vab.spec import UserError

_HDF5 = (".h5", ".hdf5")
_NUMPY = (".npy", ".npz")
_SUFFIXES = (*_NUMPY, *_HDF5)
_NPY_HEAD, _ZIP_HEAD, _PICKLE_HEAD = b"\x93NUMPY", b"PK\x03\x04", b"\x80"
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError),
    *(SyntaxError, tokenize.TokenError),  # numpy reads a header as Python's text
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged file can raise."""


class ArrayError(Exception):
    """Why a recording's array cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Arrays:
    """Arrays by the names of their recordings.

    A name is a file's path in the folder without the suffix, or a dataset's path in the hdf5 file.

    Args:
        place: The folder, searched with its subfolders (hidden ones left out), or the hdf5 file.
        kind: What the arrays are, ``codes`` or ``features``, as the command line calls them.
        key: Name of the array in each file, or in each recording's group of the one hdf5 file; None where there is one
            only.

    Raises:
        UserError: If there is no such place, it has no arrays, two files have one name, or h5py is needed and not
            installed.
    """

    def __init__(self, place: str | Path, kind: str, key: str | None = None) -> None:
        self.place, self.kind, self.key = Path(place), kind, key
        self._file: Any = None  # the one hdf5 file
        if self.place.is_dir():
            self._suffixes = self._listed()
            self.form = f"{', '.join(sorted({*self._suffixes.values()}))} files"
            if self.uses_hdf5:
                _h5py(self.place)
        elif self.place.is_file() and self.place.suffix.lower() in _HDF5:
            self._file = self._opened()
            self._suffixes = dict.fromkeys(self._of_file(), "")
            self.form = f"one {self.place.suffix} file"
        elif self.place.exists():
            raise UserError(f"--{kind} {place}: expected a folder of {', '.join(_SUFFIXES)} files, or one .h5 file")
        else:
            raise UserError(f"--{kind} {place}: there is no such folder or file")
        if key is not None:
            self.form += f", {key}"

    def __enter__(self) -> Arrays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._suffixes)

    def __contains__(self, name: str) -> bool:
        return name in self._suffixes

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._suffixes)

    @property
    def uses_hdf5(self) -> bool:
        """Whether any of it is read with h5py."""
        return self._file is not None or any(suffix.lower() in _HDF5 for suffix in {*self._suffixes.values()})

    def where(self, name: str) -> str:
        """What an array is called in complaints."""
        return f"{self.place.name}/{name}{self._suffixes[name]}"

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of the files of these names, None where there is none; of one hdf5 file for all, its own size."""
        if self._file is not None:
            whole = self.place.stat().st_size
            return [whole if name in self else None for name in names]

        def size(name: str) -> int | None:
            return os.stat(self.place / f"{name}{self._suffixes[name]}").st_size if name in self else None

        with ThreadPoolExecutor(16) as threads:  # for the sake of slow disks
            starts = range(0, len(names), 4096)
            parts = threads.map(lambda start: [size(name) for name in names[start : start + 4096]], starts)
            return [one for part in parts for one in part]

    def read(self, name: str) -> np.ndarray:
        """The array of a name, as it is stored. Several threads may read.

        Raises:
            ArrayError: If it is pickled, damaged, or not the only one of its file and no key says which.
        """
        try:
            if self._file is not None:
                return _dataset(self._file[name if self.key is None else f"{name}/{self.key}"])
            path = self.place / f"{name}{self._suffixes[name]}"
            return self._of_hdf5(path) if path.suffix.lower() in _HDF5 else self._of_numpy(path)
        except ArrayError as error:
            raise ArrayError(error.reason, f"{self.where(name)} {error.detail}") from error
        except _DAMAGE as error:
            if "allow_pickle" in str(error):
                raise ArrayError("pickled", f"{self.where(name)} {_PICKLED}") from error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            raise ArrayError("unreadable", f"{self.where(name)} cannot be read: {reason}") from error

    def _of_numpy(self, path: Path) -> np.ndarray:
        with path.open("rb") as file:
            head = file.read(len(_NPY_HEAD))
            if not head.startswith((_NPY_HEAD, _ZIP_HEAD)):
                if head.startswith(_PICKLE_HEAD):
                    raise ArrayError("pickled", _PICKLED)
                raise ArrayError("unreadable", "is no file of numpy's")
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                value = loaded[self._choose(loaded.files)]
        if not isinstance(value, np.ndarray):
            raise ArrayError("unreadable", "holds something that is no array")
        return value

    def _of_hdf5(self, path: Path) -> np.ndarray:
        with _h5py(path).File(path, "r") as file:
            return _dataset(file[self._choose(list(_datasets(file)))])

    def _choose(self, names: Sequence[str]) -> str:
        """Which of a file's arrays is wanted."""
        if self.key is not None:
            if self.key not in names:
                raise ArrayError("no_array", f"has no array {self.key!r}, it has {_some(names)}")
            return self.key
        if len(names) != 1:
            raise ArrayError("no_array", f"has {len(names)} arrays ({_some(names)}): say which with --{self.kind}_key")
        return names[0]

    def _listed(self) -> dict[str, str]:
        """Suffixes by name."""
        found: dict[str, str] = {}
        known = frozenset(_SUFFIXES)
        for file in files_below(self.place, known):
            name, suffix = os.path.splitext(file)
            if name in found:
                raise UserError(
                    f"--{self.kind} {self.place} has {name}{found[name]} and {name}{suffix}: leave one of them"
                )
            found[name] = suffix
        if not found:
            others = Counter(path.suffix for path in self.place.rglob("*") if path.is_file()).most_common(1)
            has = f"; it has {others[0][1]} {others[0][0] or 'other'} files" if others else ""
            how = ", which can run code when they are read: save the arrays with numpy.save"
            is_pickle = bool(others) and others[0][0] in (".pt", ".pth", ".pkl", ".pickle")
            raise UserError(
                f"--{self.kind} {self.place}: no {', '.join(_SUFFIXES)} file in it{has}{how if is_pickle else ''}"
            )
        return found

    def _opened(self) -> Any:
        try:
            return _h5py(self.place).File(self.place, "r")
        except OSError as error:
            reason = str(error).strip().partition("\n")[0][:150]
            raise UserError(f"--{self.kind} {self.place} cannot be read as hdf5: {reason}") from error

    def _of_file(self) -> Iterator[str]:
        names = list(_datasets(self._file))
        if self.key is None:
            yield from names
            return
        ending = f"/{self.key}"
        groups = [name.removesuffix(ending) for name in names if name.endswith(ending)]
        if not groups:
            raise UserError(
                f"--{self.kind} {self.place}: no dataset NAME{ending} in it, it has {_some(names)}: --{self.kind}_key"
                " is the name in each recording's group; leave it out where each has one dataset"
            )
        yield from groups


_PICKLED = "is pickled, and reading it could run code: save it anew as a plain array, numpy.save(path, array)"


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: hdf5 files need a package ({error}): {install_hint('hdf5')}") from error
    return h5py


def _datasets(file: Any) -> Iterator[str]:
    """Names of an hdf5 file's datasets, those in groups included; links to other files are not followed."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    yield from names


def _dataset(dataset: Any) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
        raise ArrayError("unreadable", "takes its values from other files")
    value = None if dataset.shape is None else dataset[()]
    if not isinstance(value, np.ndarray):
        raise ArrayError("unreadable", "holds no array")
    return value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
