"""Optional packages: the requirements of each extra of vab, and the command that installs them."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

_WITHOUT_TORCH = ("hdf5", "ray")
"""Extras of which no package depends on torch."""


def requirements(extra: str = "") -> list[Requirement]:
    """Packages that vab's metadata requires: always, or for one of its extras.

    Raises:
        PackageNotFoundError: If vab is not installed.
    """
    every = [Requirement(text) for text in metadata.requires("vab") or ()]
    here = [one for one in every if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in here if bool(extra) == ("extra" in str(one.marker or ""))]


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed. Nothing is imported for it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def absent(wanted: Iterable[Requirement]) -> list[str]:
    """Names of the packages that are not installed."""
    return [one.name for one in wanted if version_of(one.name) is None]


def unfit(wanted: Iterable[Requirement]) -> list[tuple[Requirement, str]]:
    """Requirements that an installed version does not meet, each with that version."""
    versions = [(one, version_of(one.name)) for one in wanted]
    return [(one, version) for one, version in versions if version and not one.specifier.contains(version, True)]


def pip_install(*packages: str) -> str:
    """The command that installs packages for the running Python.

    Args:
        packages: Arguments of ``pip install``.
    """
    if shutil.which("pip") == str(Path(sys.executable).with_name("pip")):
        pip = "pip install"
    elif importlib.util.find_spec("pip"):
        pip = f"{shlex.quote(sys.executable)} -m pip install"
    else:
        pip = f"uv pip install --python {shlex.quote(sys.executable)}"
    return " ".join([pip, *(shlex.quote(package) for package in packages)])


def install_hint(extra: str) -> str:
    """The command that installs the packages of an extra, by their own names.

    It needs no index with vab, so it works in a checkout and elsewhere. It names the installed torch: otherwise pip
    would replace torch to get a newer torchvision.

    Args:
        extra: Such as ``clip``.
    """
    try:
        packages = [f"{one.name}{one.specifier}" for one in requirements(extra)]
    except metadata.PackageNotFoundError:
        return reinstall_hint(extra)
    torch = None if extra in _WITHOUT_TORCH else version_of("torch")
    return pip_install(*packages, *([f"torch=={Version(torch).public}"] if torch else []))


def reinstall_hint(extra: str = "") -> str:
    """The command that installs vab from the checkout that it runs in; without a checkout, what to do in words.

    Args:
        extra: An extra to install with it.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return "install vab again, in the way it was installed first"
    return pip_install("--editable", f"{root}[{extra}]" if extra else str(root))
