"""``vab doctor``: which packages, devices and weights are here and work, and what to type for those that do not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vab import UserError, __version__
from vab.extras import absent, install_hint, pip_install, reinstall_hint, requirements, unfit, version_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Finding = dict[str, Any]
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
TRIED = {
    "torch": "import torch; from vab.commands.doctor import devices; cuda = torch.version.cuda; found = {'devices': "
    "devices(), 'detail': f'for CUDA {cuda}' if cuda else f'for ROCm {torch.version.hip}' if torch.version.hip else "
    "'for CPUs'}",
    "av": "import av; [av.codec.Codec(name, 'w') for name in ('libx264', 'aac')]; libraries = {name: '.'.join(map(str, "
    "numbers)) for name, numbers in av.library_versions.items()}; found = {'libraries': libraries, 'detail': "
    "f'libavcodec {libraries[\"libavcodec\"]}, writes H.264 and AAC'}",
    "soundfile": "import soundfile; found = {'detail': f'libsndfile {soundfile.__libsndfile_version__}'}",
    "soxr": "import soxr; found = {'detail': f'libsoxr {soxr.__libsoxr_version__}'}",
    "lightning": "import lightning.pytorch, torchmetrics, webdataset",
    "tiny networks": "from vab.frozen import codec, judges, vision; codec.load_codec('tiny'); "
    "codec.load_codec('tiny8'); judges.load_judge('tiny'); vision.load_vision('tiny')",
    "clip": "import open_clip",
    "dac": "from transformers import ClapAudioModelWithProjection, DacModel",
    "encodec": "import torchaudio, encodec",
    "fad": "from vab.frozen.judges.panns import package_models; package_models()",
    "hdf5": "import h5py",
    "passt": "from hear21passt.models import passt, preprocess",
    "ray": "import ray",
    "huggingface_hub": "from huggingface_hub import constants; found = {'cache': constants.HF_HUB_CACHE}",
}
"""Statements that show whether a package, or the packages of an extra, can be used; ``found`` goes to the report."""
_FIRST = ("torch", "lightning", "torchmetrics", "jsonargparse", "webdataset", "numpy")
"""Packages that the report begins with."""
_DANGERS = {
    "lightning": "2.6.2 and 2.6.3 steal passwords, tokens and keys as soon as they are imported (GHSA-w37p-236h-pfx3)",
}
"""Why vab's metadata excludes versions that pip would otherwise take."""
_MEDIA = ("av", "soundfile", "soxr")
_VARIABLES = (
    "VAB_WEIGHTS", "VAB_DATA", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "TORCH_HOME", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
_SECONDS = 600
"""s. A package that has not been imported by then, as over a slow network file system, counts as broken."""
_PROGRAM = """
import json, os, sys, warnings
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever is printed on the way
warnings.simplefilter("ignore")
if not any("import lightning" in statement for statement in sys.argv[1:]):
    sys.modules["lightning"] = None  # it may be a version that must never be imported
for statement in sys.argv[1:]:
    names = {}
    try:
        exec(statement, names)
        answer = names.get("found", {})
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if type(error).__name__ == "UserError" and error.__cause__ else error
        answer = {"error": f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:200]}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Report:
    """What was found, by section."""

    sections: dict[str, list[Finding]]

    @property
    def exit_status(self) -> int:
        """0, or 2 if something that vab needs is absent, broken or forbidden."""
        return 2 if self._failures() else 0

    @property
    def verdict(self) -> str:
        """The last line."""
        words = ", ".join(f"{finding['name']} is {finding['state']}" for finding in self._failures())
        return f"{words or 'all that is needed works'} (exit status {self.exit_status})"

    def _failures(self) -> list[Finding]:
        findings = [finding for some in self.sections.values() for finding in some]
        return [one for one in findings if one["state"] == "forbidden" or (one["needed"] and one["state"] != "ok")]


def doctor(out: str | None = None, overwrite: bool = False) -> Report:
    """Show which packages, devices and weights are here and work, and what to type for those that do not.

    Packages are imported in another process; the network is not used. The exit status is 2 if something that vab needs
    is absent, broken, or of a version that must not be used, else 0.

    Args:
        out: A .json file for the same, for a bug report; none is written without it.
        overwrite: Replace the file that is there.
    """
    from rich.console import Console

    from vab.console import print_findings
    from vab.files import check_files, write_atomically

    check_files({"out": (out, ".json")}, [], overwrite)
    with Console(stderr=True).status("importing packages"):
        report = examine()
    console = Console()
    for name, findings in report.sections.items():
        console.print(name, style="bold")
        print_findings(findings)
    console.print(report.verdict, style="bold red" if report.exit_status else "bold green", soft_wrap=True)
    if out is not None:
        about = {"vab": version_of("vab"), "platform": platform.platform()}
        result = {"exit_status": report.exit_status, "verdict": report.verdict}
        write_atomically(Path(out), json.dumps(about | result | report.sections, indent=1) + "\n")
    return report


def examine() -> Report:
    """Examine versions first, then import what is installed and neither forbidden nor of a wrong version."""
    from vab.frozen.weight_files.found import weights_found

    needed = needed_packages()
    names = metadata.metadata("vab").get_all("Provides-Extra") or [] if len(needed) > 1 else []
    extras = {name: requirements(name) for name in sorted({*names} & {*ENABLES})}
    usable = [one["name"] for one in needed if one["state"] == "ok" or (one["state"] == "broken" and one["version"])]
    usable += [name for name, wanted in extras.items() if not absent(wanted) and not unfit(wanted)]
    usable += ["tiny networks", *(["huggingface_hub"] if version_of("huggingface_hub") else [])]
    forbidden = {one["name"] for one in needed if one["state"] != "ok"} & {"lightning"}
    answers = try_all([name for name in TRIED if name in usable and name not in forbidden])
    for one in needed:
        answer = answers.get(one["name"], {})
        one |= {name: value for name, value in answer.items() if name not in ("detail", "devices")}
        one["detail"] = "; ".join(filter(None, (one["detail"], answer.get("detail"))))
        if "error" in answer:
            one |= {"state": "broken", "detail": f"{one['detail']}: {answer['error']}"}
            one["remedy"] = one["remedy"] or pip_install("--force-reinstall", f"{one['name']}{one['wanted']}")
    try:
        weights = weights_found()
    except (UserError, OSError) as error:
        weights = [_finding("weights", "broken", f"they could not be looked for: {error}")]
    return Report(
        {
            "needed": [*(one for one in needed if one["name"] not in _MEDIA), _tiny_networks(answers)],
            "media": [one for one in needed if one["name"] in _MEDIA],
            "devices": [*answers.get("torch", {}).get("devices", []), *_disks(answers)],
            "extras": [*(examine_extra(name, answers) for name in extras), _hub(answers)],
            "weights": weights,
            "settings": _settings(),
        }
    )


def try_all(names: Sequence[str], seconds: float = _SECONDS) -> dict[str, dict[str, Any]]:
    """Run statements of `TRIED` in a process; one that crashes or hangs is noted, and a new process tries the rest.

    Returns:
        By name, what the statement found; ``{"error": WHY}`` if it failed.
    """
    answers: dict[str, dict[str, Any]] = {}
    while rest := [name for name in names if name not in answers]:
        # -P: a file of the user's folder that is named as a package must not be imported for it.
        command = [sys.executable, "-P", "-c", _PROGRAM, *(TRIED[name] for name in rest)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        ) as child:
            try:
                output = child.communicate(timeout=seconds)[0]
                ended = f"ended with exit status {child.returncode}"
                if child.returncode < 0:
                    ended = f"crashed ({signal.Signals(-child.returncode).name})"
                problem = f"the process that tried it {ended}"
            except subprocess.TimeoutExpired:
                child.kill()
                output, problem = child.communicate()[0], f"no answer in {seconds:g} s"
        answers |= zip(rest, map(json.loads, output.splitlines()), strict=False)
        if failed := next((name for name in rest if name not in answers), None):
            answers[failed] = {"error": problem}
    return answers


def needed_packages() -> list[Finding]:
    """vab, Python and every package that vab needs, with the versions of its metadata; nothing is imported for it."""
    from packaging.specifiers import SpecifierSet

    version = version_of("vab")
    if version is None:
        return [
            _finding("vab", "broken", f"{__version__}, but it is not installed", reinstall_hint(), True, version="")
        ]
    wanted, python = metadata.metadata("vab")["Requires-Python"] or "", platform.python_version()
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    remedy = None if fits else f"make an environment with Python {wanted}"
    return [
        _finding("vab", "ok", version, None, True, version=version),
        _finding("python", "ok" if fits else "broken", f"{python}, needs {wanted}", remedy, True, version=python),
        *(_needed(one) for one in sorted(requirements(), key=lambda one: [one.name != name for name in _FIRST])),
    ]


def _needed(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    version, install = version_of(name), pip_install(f"{name}{wanted}")
    about: dict[str, Any] = {"version": version, "wanted": wanted}
    if version is None:
        return _finding(name, "absent", f"needs {wanted}", install, True, **about)
    detail = f"{version}, needs {wanted}"
    if not unfit([requirement]):
        return _finding(name, "ok", detail, None, True, **about)
    excluded = any(part.operator == "!=" and not part.contains(version, True) for part in requirement.specifier)
    if excluded and name in _DANGERS:
        detail += f": {_DANGERS[name]}"
        install = f"do not import it; {install}; then change the passwords, tokens and keys that it could read here"
    return _finding(name, "forbidden" if excluded else "broken", detail, install, True, **about)


def _finding(
    name: str, state: str, detail: str, remedy: str | None = None, needed: bool = False, **about: Any
) -> Finding:
    return {"name": name, "state": state, "needed": needed, "detail": detail, "remedy": remedy, **about}


def _tiny_networks(answers: Mapping[str, Any]) -> Finding:
    answer = answers.get("tiny networks", {})
    if "error" not in answer:
        return _finding("tiny networks", "ok", "codec, vision encoder and judge load", None, True)
    remedy = (
        "fix what is broken above; if nothing is, restore vab's files: git checkout src/vab in a clone, "
        "or install vab again"
    )
    return _finding("tiny networks", "broken", answer["error"], remedy, True)


def devices() -> list[Finding]:
    """The CPU and each GPU; a GPU is broken if it does not compute, as torch may lack the kernels for it."""
    import torch

    from vab.cores import usable_cores

    cores = usable_cores()
    found = [_finding("cpu", "ok", f"{cores} of {os.cpu_count()} cores", cores=cores, cores_of_machine=os.cpu_count())]
    if torch.backends.mps.is_available():
        found.append(_computing("mps", "Apple GPU"))
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        words = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        found.append(_computing(f"cuda:{number}", words) | {"memory_bytes": about.total_memory})
    if not torch.cuda.is_available():
        words = "torch finds no device"
        if shutil.which("nvidia-smi") and not torch.version.cuda:
            words += ": there is a driver, but this torch is built for CPUs"
        found.append(_finding("cuda", "absent", words))
    return found


def _computing(device: str, words: str) -> Finding:
    import torch

    try:
        for kind in (torch.float32, torch.bfloat16):
            float((torch.ones(8, 8, dtype=kind, device=device) @ torch.eye(8, dtype=kind, device=device)).sum())
    except RuntimeError as error:
        return _finding(device, "broken", f"{words}; it does not compute: {str(error).strip().splitlines()[0]}")
    slow = device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0)
    return _finding(device, "ok", f"{words}, bf16 {'slow' if slow else 'yes'}", bf16="slow" if slow else "yes")


def _disks(answers: Mapping[str, Any]) -> list[Finding]:
    places = {"disk of data": os.environ.get("VAB_DATA", "data")}
    if cache := answers.get("huggingface_hub", {}).get("cache"):
        places["disk of hub cache"] = cache
    found = []
    for name, place in places.items():
        path = Path(place).expanduser().absolute()
        usage = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists()))
        words = f"{usage.free / 1e9:,.0f} of {usage.total / 1e9:,.0f} GB free at {path}"
        found.append(_finding(name, "ok", words, path=str(path), free_bytes=usage.free, bytes=usage.total))
    return found


def examine_extra(name: str, answers: Mapping[str, Any]) -> Finding:
    """The state of an extra's packages, given what `try_all` found."""
    wanted, install = requirements(name), install_hint(name)
    versions = {one.name: version_of(one.name) for one in wanted}
    about: dict[str, Any] = {"enables": ENABLES[name], "versions": versions}
    if missing := absent(wanted):
        return _finding(name, "absent", f"{ENABLES[name]}; needs {', '.join(missing)}", install, **about)
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    if wrong := unfit(wanted):
        words = ", ".join(f"{one.name} {version}, needs {one.specifier}" for one, version in wrong)
        return _finding(name, "broken", f"{ENABLES[name]}; {words}", install, **about)
    if error := answers.get(name, {}).get("error"):
        remedy = _matching_torchaudio(versions) or f"{install} --force-reinstall"
        return _finding(
            name, "broken", f"{installed}, needed for {ENABLES[name]}: {error}", remedy, **about, error=error
        )
    return _finding(name, "ok", f"{installed}: {ENABLES[name]}", **about)


def _matching_torchaudio(versions: Mapping[str, str | None]) -> str:
    """What to type if torchaudio does not go with torch: each of its releases is for the torch of the same number."""
    audio, torch = ((version or "").split(".")[:2] for version in (versions.get("torchaudio"), version_of("torch")))
    release = ".".join(audio)
    return pip_install(f"torch=={release}.*", f"torchaudio=={release}.*") if release and audio != torch else ""


def _hub(answers: Mapping[str, Any]) -> Finding:
    version, enables = version_of("huggingface_hub"), "weights from the model hub"
    if version is None:
        return _finding("huggingface_hub", "absent", enables, pip_install("huggingface_hub"))
    answer = answers.get("huggingface_hub", {})
    if "error" in answer:
        words = f"{version}, needed for {enables}: {answer['error']}"
        return _finding("huggingface_hub", "broken", words, pip_install("--force-reinstall", "huggingface_hub"))
    return _finding("huggingface_hub", "ok", f"{version}: {enables}", version=version, **answer)


def _settings() -> list[Finding]:
    """Environment variables that change what vab does."""
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    found = []
    for name, value in given.items():
        gone = name in ("VAB_WEIGHTS", "VAB_DATA") and not Path(value).expanduser().is_dir()
        found.append(_finding(name, "broken" if gone else "ok", f"{value}: there is no such folder" if gone else value))
    offline = given.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    words = "nothing is fetched" if offline else "weights that are absent are fetched when they are needed"
    return [*found, _finding("offline", "ok" if offline else "absent", words, offline=offline)]
