"""``vab doctor``: an installation that works, and ones with faults put before it on the path."""

import json
import os
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from command_line import start
from vab.cli import main
from vab.commands import doctor
from vab.commands.doctor import ENABLES, needed_packages, try_all
from vab.cores import usable_cores
from vab.extras import install_hint, requirements
from vab.frozen.weight_files.catalogue import CODECS, JUDGES, VISION, all_weights

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def package(folder, name, number=None, code=""):
    """A package that Python finds before an installed one: its code, and the version that it is said to have."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)
    if number:
        about = folder / f"{name}-{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return folder


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A folder before all others on the path of this process and of those that it starts."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def examined(folder, *arguments):
    """Lines and exit status of ``vab doctor``, and its report; no spaces but single ones."""
    child = start("doctor", "--out", folder / "report.json", *arguments)
    out, err = child.communicate(timeout=200)
    assert err == ""
    assert "Traceback" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    return lines, child.returncode, json.loads((folder / "report.json").read_text())


def finding(report, section, name):
    return next(found for found in report[section] if found["name"] == name)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_installation_that_works(tmp_path, monkeypatch):
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("av", "soundfile", "json"):  # a user's own files, which are no packages
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "report.json").write_text("an older one")
    lines, status, report = examined(tmp_path, "--overwrite=true")
    assert (status, lines[-1]) == (0, "all that is needed works (exit status 0)")
    assert (report["exit_status"], report["verdict"], report["vab"]) == (0, lines[-1], version("vab"))
    assert f"ok lightning {version('lightning')}, needs !=2.6.2,!=2.6.3,<3,>=2.6.4" in lines
    assert {found["name"] for found in report["needed"]} >= {"vab", "python", "torch", "numpy", "tiny networks"}
    assert all(found["state"] == "ok" and found["needed"] for found in report["needed"] + report["media"])
    assert "writes H.264 and AAC" in finding(report, "media", "av")["detail"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", finding(report, "media", "av")["libraries"]["libavcodec"])
    cores = usable_cores()
    assert finding(report, "devices", "cpu")["cores"] == cores
    assert finding(report, "devices", "disk of data")["path"] == str(tmp_path / "data")
    assert finding(report, "devices", "disk of data")["free_bytes"] > 0
    shown = [name for found in report["weights"] for name in found["names"]]
    assert sorted(shown) == sorted([*CODECS, *VISION, *JUDGES])
    assert finding(report, "weights", "codec dac_16khz")["licence"] == "MIT licence"
    assert f"broken VAB_WEIGHTS {tmp_path}/nowhere: there is no such folder" in lines
    assert "ok offline nothing is fetched" in lines
    for extra, enables in ENABLES.items():
        found = finding(report, "extras", extra)
        assert found["enables"] == enables
        assert found["remedy"] is None or install_hint(extra) in found["remedy"]
        assert (found["state"] == "absent") == any(number is None for number in found["versions"].values())


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_malware_is_refused_and_never_imported_and_broken_extras_are_a_line(faulty, tmp_path):
    marker = tmp_path / "stolen"
    steal = f"open({str(marker)!r}, 'w').close()"
    package(faulty, "lightning", "2.6.3", steal)
    mismatch = "PyTorch and TorchAudio were compiled with different CUDA versions.\nPyTorch has 13.2."
    package(faulty, "torchaudio", "2.10.0", f"raise RuntimeError({mismatch!r})")
    package(faulty, "encodec", "0.1.1", "import torchaudio")
    package(faulty, "open_clip", None, "import os; os.abort()")
    package(faulty, "open_clip_torch", "3.3.0")
    package(faulty, "torchvision", "0.26.0")
    lines, status, report = examined(tmp_path)
    assert status == 2
    assert lines[-1] == "lightning is forbidden (exit status 2)"
    lightning = finding(report, "needed", "lightning")
    assert lightning["state"] == "forbidden"
    assert "steal passwords, tokens and keys as soon as they are imported (GHSA-w37p-236h-pfx3)" in lightning["detail"]
    assert "pip install 'lightning!=2.6.2,!=2.6.3,<3,>=2.6.4'" in lightning["remedy"]
    assert not marker.exists()
    encodec = finding(report, "extras", "encodec")
    assert encodec["error"] == "RuntimeError: PyTorch and TorchAudio were compiled with different CUDA versions."
    assert encodec["remedy"].endswith("pip install 'torch==2.10.*' 'torchaudio==2.10.*'")
    hub = version("huggingface_hub")
    found = f"broken encodec encodec 0.1.1, huggingface-hub {hub}, torchaudio 2.10.0, needed for {ENABLES['encodec']}"
    assert found in "\n".join(lines)
    assert finding(report, "extras", "clip")["error"] == "the process that tried it crashed (SIGABRT)"
    assert finding(report, "needed", "tiny networks")["state"] == "ok"
    assert len(report["weights"]) == len(all_weights())


def test_it_runs_where_torch_does_not(faulty, tmp_path):
    package(faulty, "torch", None, "raise OSError('libcudart.so.13: cannot open shared object file')")
    lines, status, report = examined(tmp_path)
    assert status == 2
    assert lines[-1] == "torch is broken, lightning is broken, tiny networks is broken (exit status 2)"
    torch = finding(report, "needed", "torch")
    assert torch["error"] == "OSError: libcudart.so.13: cannot open shared object file"
    assert torch["remedy"].endswith("pip install --force-reinstall 'torch>=2.8'")
    assert finding(report, "media", "av")["state"] == "ok"
    assert len(report["weights"]) == len(all_weights())


@pytest.mark.parametrize(
    ("name", "number", "state", "words"),
    [
        ("lightning", "2.6.2", "forbidden", "2.6.2, needs !=2.6.2,!=2.6.3,<3,>=2.6.4: 2.6.2 and 2.6.3 steal"),
        ("lightning", "2.6.1", "broken", "2.6.1, needs !=2.6.2,!=2.6.3,<3,>=2.6.4"),
        ("lightning", "2.6.1.dev20260101", "broken", "2.6.1.dev20260101, needs"),
        ("lightning", "2.6.7.dev20261101", "ok", "2.6.7.dev20261101, needs"),
        ("torch", "2.7.1+cu128", "broken", "2.7.1+cu128, needs >=2.8"),
        ("torch", "2.15.0+cu132", "ok", "2.15.0+cu132, needs >=2.8"),
        ("jsonargparse", "5.0.0", "broken", "5.0.0, needs <5,>=4."),
    ],
)
def test_versions_are_held_against_what_the_metadata_asks_for(faulty, name, number, state, words):
    package(faulty, name, number)
    found = next(found for found in needed_packages() if found["name"] == name)
    assert (found["state"], found["needed"]) == (state, True)
    assert words in found["detail"]
    assert ("pip install '" in (found["remedy"] or "")) == (state != "ok")


def test_the_metadata_is_read_not_repeated():
    names = {requirement.name for requirement in requirements()}
    assert names >= {"torch", "lightning", "webdataset", "av", "rich"}
    assert not names & {"encodec", "pytest", "transformers"}
    encodec = {requirement.name for requirement in requirements("encodec")}
    assert encodec >= {"encodec", "torchaudio"}


def test_every_extra_says_what_it_is_for():
    assert set(ENABLES) == PROJECT["optional-dependencies"].keys() - {"all", "bench", "dev"}
    for weights in all_weights():
        if weights.published and weights.published.extra and weights.kind != "vision encoder":
            assert weights.published.name in ENABLES[weights.published.extra]


def test_what_hangs_or_ends_is_outlived(faulty):
    package(faulty, "soxr", None, "import time; time.sleep(60)")
    package(faulty, "av", None, "import os; os._exit(3)")
    answers = try_all(["av", "soxr", "soundfile"], seconds=8)
    assert answers["av"] == {"error": "the process that tried it ended with exit status 3"}
    assert answers["soxr"] == {"error": "no answer in 8 s"}
    assert "libsndfile" in answers["soundfile"]["detail"]


def test_a_device_is_believed_when_it_computes(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "broken GPU", 8 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    cpu, gpu = doctor.devices()
    assert (cpu["state"], cpu["cores"]) == ("ok", usable_cores())
    assert (gpu["name"], gpu["state"]) == ("cuda:0", "broken")
    assert gpu["detail"].startswith("broken GPU, 8 GiB, compute capability 9.0; it does not compute: ")


@pytest.mark.parametrize(("number", "fits"), [(version("torch").split("+")[0], True), ("2.99.1", False)])
def test_torchaudio_of_another_torch_is_told_which_go_together(faulty, number, fits):
    package(faulty, "torchaudio", number, "raise OSError('undefined symbol')")
    package(faulty, "encodec", "0.1.1")
    extra = doctor.examine_extra("encodec", {"encodec": {"error": "OSError: undefined symbol"}})
    assert extra["remedy"].endswith("pip install 'torch==2.99.*' 'torchaudio==2.99.*'") == (not fits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "report.txt"], "--out must end in .json, got report.txt"),
        (["--out", sys.executable + ".json"], "is there already: give another name, or --overwrite true"),
        (["--out", "absent/report.json"], "is not a folder to write in"),
        (["--fast", "true"], "fast"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_tried(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words.startswith("is there"):
        arguments = ["--out", "there.json"]
        (tmp_path / "there.json").touch()
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
