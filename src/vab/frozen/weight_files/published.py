"""A file of published weights: where it may be on this machine, and how to fetch it. It imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vab import UserError
from vab.files import sha256_of
from vab.frozen.weight_files.downloading import cached, fetch, from_address, from_hub


@dataclass(frozen=True)
class Published:
    """A file (or folder) of weights as its authors published it."""

    owner: str
    """Kind and name of the network: "judge vggish"."""
    names: tuple[str, ...]
    """Names of the file or folder below a folder of weights, the authors' own first."""
    source: str
    """Who published it where, in words."""
    licence: str = ""
    """Its licence and its conditions, in words; empty if its authors state none."""
    repository: str = ""
    """``owner/name`` on the Hugging Face hub; empty if it is not there."""
    files: tuple[str, ...] = ()
    """Files that are needed of the repository: one, or several that make a folder."""
    url: str = ""
    """Address of a single file that is not on the hub."""
    sha256: str = ""
    """Hash of that file, in hex, or the beginning of it, as its authors or several others state it."""
    extra: str = ""
    """The extra of this package that the network needs; empty if none."""

    @property
    def name(self) -> str:
        """Its name for ``vab weights fetch``."""
        return self.owner.rpartition(" ")[2]

    def find(self, weights: Path | None) -> Path:
        """Get the path of the weights, and fetch them if they are absent, unless the user forbids it.

        Args:
            weights: File, folder or repository on the hub that the user names; if None, look in `folders` and in the
                hub's cache.

        Raises:
            UserError: If they are absent, and cannot be fetched.
        """
        problem = f"{self.owner} needs {self.names[0]}, published in {self.source}"
        if weights:
            if weights.exists():
                return weights
            problem += f": there is no {weights}"
            if self.files and _may_be_repository(weights):
                advice, name = "give a file or a folder", str(weights)
                return cached(name, self.files) or fetch(problem, advice, from_hub, name, self.files)
            raise UserError(problem)
        if place := self.local():
            return place
        problem += f": it is not in {' or '.join(map(str, folders()[:-1]))}"
        advice = "put it there, or into a folder named by VAB_WEIGHTS"
        if self.repository or self.url:
            advice += f" (where there is a network: vab weights fetch --names {self.name} --out FOLDER)"
        if self.repository:
            return fetch(problem, advice, from_hub, self.repository, self.files)
        if self.url:
            return fetch(problem, advice, from_address, self.url, folders()[-2] / self.names[0], self.sha256)
        raise UserError(f"{problem}; {advice}")

    def local(self) -> Path | None:
        """The path of the weights on this machine, or None; nothing is fetched."""
        for place in (folder / name for folder in folders() for name in self.names):
            if place.exists():
                return place
        return cached(self.repository, self.files) if self.repository else None

    def files_at(self, place: Path) -> list[Path]:
        """The files of the weights at one of their paths; empty if one is missing."""
        paths = [place] if place.is_file() else list(self.targets(place).values())
        return paths if all(path.is_file() for path in paths) else []

    def targets(self, place: Path) -> dict[str, Path]:
        """The paths of the repository's files, by their names there, if the weights are at ``place``."""
        return {name: place / name if len(self.files) > 1 else place for name in self.files or (place.name,)}

    def files_in(self, folder: Path) -> list[Path]:
        """The files of the weights in a folder such as $VAB_WEIGHTS, under any of their names; empty if incomplete."""
        return next(filter(None, (self.files_at(folder / name) for name in self.names)), [])

    def fetch_into(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Fetch the weights into a folder, where `find` finds them if $VAB_WEIGHTS names it.

        Files of the hub are collected in a hidden folder until the last one is there.

        Returns:
            For each file, by name in the folder, its entry in `vab.frozen.weight_files.hashes.RECORD`.

        Raises:
            UserError: If they cannot be fetched, or a file has another hash than the published one.
        """
        problem, advice = f"{self.name} is not in {folder}", "type the same command again"
        place = folder / self.names[0]
        if self.url:
            fetch(problem, advice, from_address, self.url, place, self.sha256)
            sources = {place: self.url}
        else:
            cache = place.with_name(f".{place.name}.fetching")
            got = fetch(problem, advice, from_hub, self.repository, self.files, cache)
            snapshot = got.parent if len(self.files) == 1 else got  # its name is the commit
            sources = {}
            for name, target in self.targets(place).items():
                target.parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).resolve().replace(target)
                sources[target] = f"{self.repository}@{snapshot.name}/{name}"
            shutil.rmtree(cache)
        return {
            target.relative_to(folder).as_posix(): {
                "sha256": sha256_of(target),
                "bytes": target.stat().st_size,
                "source": source,
                "licence": self.licence or None,
            }
            for target, source in sources.items()
        }


def _may_be_repository(name: Path) -> bool:
    """Whether it can be ``owner/name`` on the hub, and not a misspelt path."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
        and not name.parent.is_dir()
        and name.suffix not in (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".th")
    )


def folders() -> list[Path]:
    """Folders that are searched for weights: $VAB_WEIGHTS if it is set, then torch.hub's folders."""
    own = os.environ.get("VAB_WEIGHTS")
    if torch := sys.modules.get("torch"):  # a program may have called torch.hub.set_dir
        hub = Path(torch.hub.get_dir())
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
        hub = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub"
    return [*([Path(own).expanduser()] if own else []), hub / "checkpoints", hub]


_printed: set[str] = set()


def print_licence(owner: str, licence: str) -> None:
    """Print the licence of weights on stderr, once in a process and on rank 0 only."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    if licence and owner not in _printed and rank == "0":
        _printed.add(owner)
        print(f"{owner}: weights under {licence}", file=sys.stderr)
