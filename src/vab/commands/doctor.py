"""What is installed, which weights are where, what each missing part would enable, and what to type."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.version import Version
from rich.console import Console

from vab.commands.findings import Finding, Report, show
from vab.commands.installation import requirements
from vab.commands.installation.process import Answers, ask
from vab.extras import install_hint, pip_install
from vab.files import check_files

MEDIA = ("av", "soundfile", "soxr")
ENABLES = {
    "clip": "vision encoders of open_clip: eva-CLIP, SigLIP 2 and others",
    "dac": "codecs dac_16khz, dac_24khz and dac_44khz, judge clap",
    "encodec": "codecs audiogen_16khz, encodec_24khz and encodec_32khz",
    "fad": "judges panns_16k and panns_32k",
    "hdf5": "vab shards import of hdf5 files",
    "passt": "judge passt",
    "ray": "vab extract --engine ray",
}
"""What each extra is for."""
_VARIABLES = (
    "VAB_WEIGHTS",
    "VAB_DATA",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_HOME",
    "TORCH_HOME",
    "CUDA_VISIBLE_DEVICES",
)


def doctor(out: str | None = None, overwrite: bool = False) -> Report:
    """Say what is installed and works, which weights are where, and what to type for what is missing.

    Packages are tried in other processes, and the network is not used. The exit status is 0 if all works that vab
    needs, whatever is missing beside, and 2 if something of it is broken, or of a version that must not be used.

    Args:
        out: A .json file for the same, for a bug report; none is written without it.
        overwrite: Replace the file that is there.
    """
    check_files({"out": (out, ".json")}, [], overwrite)
    report = examine()
    console = Console()
    show(console, report)
    if out is not None:
        path = Path(out)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(_about() | report.to_json(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return report


def examine() -> Report:
    """Look at everything; nothing is printed but on a terminal's stderr, what is looked at."""
    needed = requirements.needed()
    states = {finding.name: finding.state for finding in needed}
    wanted = {extra: requirements.requirements(extra) for extra in requirements.extras()} if len(needed) > 1 else {}
    optional = [name for name, some in wanted.items() if not requirements.absent(some) and not requirements.unfit(some)]
    probes = [name for name in ("torch", *MEDIA) if states.get(name) in ("ok", "broken")]
    probes += ["lightning"] if states.get("lightning") == "ok" else []
    optional += ["hub"] if requirements.version_of("huggingface_hub") else []
    with Console(stderr=True).status("") as status:
        answers = ask([[*probes, "shipped", "weights"], optional], lambda name: status.update(f"trying {name}"))
    findings = [_tried(finding, answers) for finding in needed]
    return Report(
        {
            "needed": [*(finding for finding in findings if finding.name not in MEDIA), _shipped(answers)],
            "media": [finding for finding in findings if finding.name in MEDIA],
            "devices": [*_devices(answers), *_disks(answers)],
            "extras": [*(_extra(name, some, answers) for name, some in wanted.items()), _hub(answers)],
            "weights": _weights(answers),
            "settings": _settings(),
        }
    )


def _about() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"vab": requirements.version_of("vab"), "time": now, "platform": platform.platform()}


def _tried(finding: Finding, answers: Answers) -> Finding:
    """A package's finding, and what came of trying it."""
    answer = answers.get(finding.name, {})
    facts = {**finding.facts, **{name: value for name, value in answer.items() if name not in ("detail", "devices")}}
    if "error" in answer:
        detail = f"{finding.detail}: {answer['error']}"
        install = finding.remedy or pip_install("--force-reinstall", f"{finding.name}{finding.facts['wanted']}")
        return Finding(finding.name, "broken", detail, install, finding.needed, facts)
    detail = "; ".join(words for words in (finding.detail, answer.get("detail")) if words)
    return Finding(finding.name, finding.state, detail, finding.remedy, finding.needed, facts)


def _shipped(answers: Answers) -> Finding:
    answer = answers["shipped"]
    if "error" in answer:
        remedy = (
            "fix what is broken above; if nothing is, restore vab's files: git checkout src/vab in a clone, "
            "or install vab again"
        )
        return Finding("tiny networks", "broken", answer["error"], remedy, needed=True)
    return Finding("tiny networks", "ok", answer["detail"], needed=True)


def _devices(answers: Answers) -> list[Finding]:
    return [Finding.from_json(device) for device in answers.get("torch", {}).get("devices", [])]


def _disks(answers: Answers) -> list[Finding]:
    places = {"disk of data": Path(os.environ.get("VAB_DATA", "data"))}
    if cache := answers.get("hub", {}).get("cache"):
        places["disk of hub cache"] = Path(cache)
    return [_disk(name, path) for name, path in places.items()]


def _disk(name: str, path: Path) -> Finding:
    path = path.expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    facts = {"path": str(path), "free_bytes": usage.free, "bytes": usage.total}
    return Finding(name, "ok", f"{usage.free / 1e9:,.0f} of {usage.total / 1e9:,.0f} GB free at {path}", facts=facts)


def _extra(name: str, wanted: list[requirements.Requirement], answers: Answers) -> Finding:
    enables = ENABLES.get(name, "")
    versions = {one.name: requirements.version_of(one.name) for one in wanted}
    facts = {"enables": enables, "versions": versions}
    install = install_hint(name)
    if missing := requirements.absent(wanted):
        return Finding(name, "absent", f"{enables}; needs {', '.join(missing)}", install, facts=facts)
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    if unfit := requirements.unfit(wanted):
        words = ", ".join(f"{one.name} {version}, needs {one.specifier}" for one, version in unfit)
        return Finding(name, "broken", f"{enables}; {words}", install, facts=facts)
    error = answers[name].get("error")
    if error is None:
        return Finding(name, "ok", f"{installed}: {enables}", facts=facts)
    remedy = _matching_torchaudio(versions) or f"{install} --force-reinstall"
    detail = f"{installed}, needed for {enables}: {error}"
    return Finding(name, "broken", detail, remedy, facts=facts | {"error": error})


def _matching_torchaudio(versions: Mapping[str, str | None]) -> str:
    """What to type where torchaudio is of another torch: each of its releases is for the torch of the same number."""
    audio, torch = versions.get("torchaudio"), requirements.version_of("torch")
    if not audio or not torch or Version(audio).release[:2] == Version(torch).release[:2]:
        return ""
    release = ".".join(map(str, Version(audio).release[:2]))
    return pip_install(f"torch=={release}.*", f"torchaudio=={release}.*")


def _hub(answers: Answers) -> Finding:
    answer, version = answers.get("hub", {}), requirements.version_of("huggingface_hub")
    enables = "weights from the model hub"
    if version is None:
        return Finding("huggingface_hub", "absent", enables, pip_install("huggingface_hub"))
    if "error" in answer:
        install = pip_install("--force-reinstall", "huggingface_hub")
        return Finding("huggingface_hub", "broken", f"{version}, needed for {enables}: {answer['error']}", install)
    return Finding("huggingface_hub", "ok", f"{version}: {enables}", facts={"version": version, **answer})


def _weights(answers: Answers) -> list[Finding]:
    answer = answers["weights"]
    if "error" in answer:
        return [Finding("weights", "broken", f"they could not be looked for: {answer['error']}")]
    return [Finding.from_json(found) for found in answer["findings"]]


def _settings() -> list[Finding]:
    """The variables of the environment that change what vab does."""
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    found = []
    for name, value in given.items():
        gone = name in ("VAB_WEIGHTS", "VAB_DATA") and not Path(value).expanduser().is_dir()
        detail = f"{value}: there is no such folder" if gone else value
        found.append(Finding(name, "broken" if gone else "ok", detail))
    offline = given.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    words = "nothing is fetched" if offline else "weights that are absent are fetched when they are needed"
    found.append(Finding("offline", "ok" if offline else "absent", words, facts={"offline": offline}))
    return found
