"""Versions that are installed, beside those that vab's own metadata asks for; nothing is imported for it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from vab import __version__
from vab.commands.findings import Finding, State
from vab.extras import pip_install, reinstall_hint
from vab.extras import requirements as requirements

_DANGERS = {
    "lightning": "2.6.2 and 2.6.3 steal passwords, tokens and keys as soon as they are imported (GHSA-w37p-236h-pfx3)",
}
"""Why vab's metadata excludes versions that pip would otherwise take."""
_FIRST = ("torch", "lightning", "torchmetrics", "jsonargparse", "webdataset", "numpy")
"""What people look for first."""
_COLLECTIONS = ("all", "bench", "dev")
"""Extras that are others together, or for those who work on vab."""


def needed() -> list[Finding]:
    """vab, Python and every package that vab cannot do without."""
    try:
        wanted = metadata.metadata("vab")["Requires-Python"] or ""
        own = Finding("vab", "ok", metadata.version("vab"), needed=True, facts={"version": metadata.version("vab")})
    except metadata.PackageNotFoundError:
        return [Finding("vab", "broken", f"{__version__}, but it is not installed", reinstall_hint(), needed=True)]
    python = platform.python_version()
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    detail = f"{python}, needs {wanted}" if wanted else python
    found = Finding(
        "python", "ok" if fits else "broken", detail, "" if fits else f"make an environment with Python {wanted}",
        needed=True, facts={"version": python, "wanted": wanted},
    )  # fmt: skip
    ordered = sorted(requirements(), key=lambda one: [one.name != name for name in _FIRST])
    return [own, found, *(_required(requirement) for requirement in ordered)]


def extras() -> list[str]:
    """Names of vab's extras that enable something each."""
    names = metadata.metadata("vab").get_all("Provides-Extra") or []
    return sorted(name for name in names if name not in _COLLECTIONS)


def version_of(package: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unfit(wanted: Iterable[Requirement]) -> list[tuple[Requirement, str]]:
    """Those requirements that an installed version does not meet, each with that version."""
    versions = [(requirement, version_of(requirement.name)) for requirement in wanted]
    return [(one, version) for one, version in versions if version and not _fits(one, version)]


def absent(wanted: Sequence[Requirement]) -> list[str]:
    """Names of the packages that are not installed."""
    return [requirement.name for requirement in wanted if version_of(requirement.name) is None]


def _required(requirement: Requirement) -> Finding:
    name, wanted = canonicalize_name(requirement.name), str(requirement.specifier)
    version = version_of(name)
    install = pip_install(f"{requirement.name}{wanted}")
    facts = {"version": version, "wanted": wanted}
    if version is None:
        return Finding(name, "absent", f"needs {wanted}", install, needed=True, facts=facts)
    if _fits(requirement, version):
        return Finding(name, "ok", f"{version}, needs {wanted}", needed=True, facts=facts)
    excluded = [part for part in requirement.specifier if part.operator == "!=" and not part.contains(version, True)]
    state: State = "forbidden" if excluded else "broken"
    detail, remedy = f"{version}, needs {wanted}", install
    if excluded and name in _DANGERS:
        detail += f": {_DANGERS[name]}"
        remedy = f"do not import it; {install}; then change the passwords, tokens and keys that it could read here"
    return Finding(name, state, detail, remedy, needed=True, facts=facts)


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)
