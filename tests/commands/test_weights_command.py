"""``vab weights``: from a server of this machine into a folder that needs no network; what was changed is named."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from command_line import start
from frozen.codec_weights import audiogen, dac_of_hub
from loopback import COMMIT, hub_hash, serving
from vab.cli import main
from vab.commands.weights import fetch_weights, verify_weights
from vab.frozen.codec import load_codec
from vab.frozen.weight_files.catalogue import PUBLISHED, published_as
from vab.frozen.weight_files.found import weights_found
from vab.spec import UserError

CONTENT = random.Random(1).randbytes(2_000_003)
SHA = hashlib.sha256(CONTENT).hexdigest()
AUDIOGEN = "/facebook/audiogen-medium/resolve/main/compression_state_dict.bin"
DAC = "/descript/dac_16khz/resolve/main/"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """No weights of this machine, and none fetched to its caches."""
    for name in ("VAB_WEIGHTS", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "home" / "hub"))
    return tmp_path / "weights"


@pytest.fixture
def server(monkeypatch):
    """A hub and an address; the hub is for processes that begin afterwards."""
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        stand_in = dataclasses.replace(
            published_as("vggish"), url=f"{server.address}/vggish-10086976.pth", sha256=SHA[:8]
        )
        for name in ("vggish", "vggish_relu"):
            monkeypatch.setitem(PUBLISHED["judge"], name, stand_in)
        server.files["/vggish-10086976.pth"] = CONTENT
        yield server


def vab(*arguments):
    """Output, errors and exit status of the command line in a process of its own."""
    child = start(*arguments)
    out, err = child.communicate(timeout=100)
    assert "Traceback" not in err
    return out, err, child.returncode


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def gets(server):
    return [path for method, path, _ in server.log if method == "GET"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_from_the_hub_to_codecs_without_a_network(server, places, tmp_path, monkeypatch):
    pytest.importorskip("encodec")
    pytest.importorskip("transformers")
    audiogen(tmp_path / "a.bin")
    dac_of_hub(tmp_path / "dac")
    server.files[AUDIOGEN] = (tmp_path / "a.bin").read_bytes()
    for name in ("config.json", "model.safetensors"):
        server.files[DAC + name] = (tmp_path / "dac" / name).read_bytes()
    out, err, status = vab("weights", "fetch", "--names", "audiogen_16khz", "dac_16khz", "--out", places)
    assert (status, out.splitlines()[-1]) == (
        0,
        f"they are found if VAB_WEIGHTS names the folder: export VAB_WEIGHTS={places}",
    )
    assert err.splitlines() == [
        "codec audiogen_16khz: weights under CC BY-NC 4.0: not for commercial use",
        "fetching facebook/audiogen-medium",
        "codec dac_16khz: weights under MIT licence",
        "fetching descript/dac_16khz",
    ]
    names = [
        "audiogen_16khz/compression_state_dict.bin", "dac_16khz/config.json", "dac_16khz/model.safetensors",
    ]  # fmt: skip
    assert files_below(places) == [*names, "weights.json"]
    record = json.loads((places / "weights.json").read_text())["files"]
    assert list(record) == names
    assert record[names[0]] == {
        "sha256": hashlib.sha256(server.files[AUDIOGEN]).hexdigest(),
        "bytes": len(server.files[AUDIOGEN]),
        "source": f"facebook/audiogen-medium@{COMMIT}/compression_state_dict.bin",
        "licence": "CC BY-NC 4.0: not for commercial use",
    }

    before = len(server.log)
    out, _, status = vab("weights", "fetch", "--names", "audiogen_16khz", "dac_16khz", "--out", places)
    assert (status, out.splitlines()[:2]) == (0, ["audiogen_16khz: there already", "dac_16khz: there already"])
    assert len(server.log) == before

    monkeypatch.setenv("VAB_WEIGHTS", str(places))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, file in (("audiogen_16khz", names[0]), ("dac_16khz", names[2])):
        assert load_codec(name).weight_hash == record[file]["sha256"]
    found = {finding["name"]: finding for finding in weights_found()}
    assert found["codec dac_16khz"]["detail"] == (
        f"{places}/dac_16khz, {sum(record[name]['bytes'] for name in names[1:]) / 1e6:,.1f} MB; "
        "hash as recorded at fetching; MIT licence"
    )


def test_a_folder_of_the_hub_is_there_when_all_of_it_is(server, places):
    server.files[DAC + "config.json"] = b'{"model_type": "dac"}'
    _, err, status = vab("weights", "fetch", "--names", "dac_16khz", "--out", places)
    assert status == 2
    assert "/weights, and fetching it from descript/dac_16khz failed: 404 Client Error. Entry Not Found" in err
    assert "/model.safetensors" in err
    assert [path.name for path in places.iterdir()] == [".dac_16khz.fetching"]
    server.files[DAC + "model.safetensors"] = CONTENT
    _, _, status = vab("weights", "fetch", "--names", "dac_16khz", "--out", places)
    assert status == 0
    assert files_below(places) == ["dac_16khz/config.json", "dac_16khz/model.safetensors", "weights.json"]
    assert (places / "dac_16khz" / "model.safetensors").read_bytes() == CONTENT
    assert gets(server).count(DAC + "config.json") == 1


def test_a_killed_fetch_leaves_nothing_under_the_name(server, places):
    server.files[AUDIOGEN] = CONTENT
    server.hold[AUDIOGEN] = 1_200_000
    child = start("weights", "fetch", "--names", "audiogen_16khz", "--out", places)
    assert server.holding.wait(60)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not [name for name in files_below(places) if "/." not in name]
    server.hold.clear()
    with pytest.raises(UserError, match="no weights are in"):
        verify_weights(str(places))
    _, _, status = vab("weights", "fetch", "--names", "audiogen_16khz", "--out", places)
    assert status == 0
    assert files_below(places) == ["audiogen_16khz/compression_state_dict.bin", "weights.json"]
    assert (places / "audiogen_16khz" / "compression_state_dict.bin").read_bytes() == CONTENT


def test_a_folder_of_the_hub_is_of_one_commit(server, places):
    server.files |= {DAC + "config.json": b"{}", DAC + "model.safetensors": CONTENT}
    server.commits = ["1" * 40, "2" * 40]
    _, err, status = vab("weights", "fetch", "--names", "dac_16khz", "--out", places)
    assert status == 0, err
    record = json.loads((places / "weights.json").read_text())["files"]
    assert {entry["source"].split("/")[1] for entry in record.values()} == {f"dac_16khz@{'1' * 40}"}


@pytest.mark.parametrize("without_symlinks", ["0", "1"])
def test_a_file_of_another_hash_than_the_hub_states_is_refused(server, places, monkeypatch, without_symlinks):
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", without_symlinks)
    server.files[AUDIOGEN] = CONTENT
    server.hashes[AUDIOGEN] = "0" * 64
    _, err, status = vab("weights", "fetch", "--names", "audiogen_16khz", "--out", places)
    assert status == 2
    assert (
        f"gave another compression_state_dict.bin: its hash is {SHA}, expected {'0' * 64} as the hub says; it was "
        "deleted; type the same command again" in err
    )
    assert not list(places.rglob("*.bin"))


def in_a_process(script):
    """Lines that a script prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_another_file_of_weights_is_taken_only_if_the_hub_lacks_the_first(server):
    wrong, lacking = "/them/wrong/resolve/main/", "/them/lacking/resolve/main/"
    model_cfg = {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}
    facts = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": 0, "std": 1}}
    config = json.dumps(facts).encode()
    for model in (wrong, lacking):
        server.files |= {model + "open_clip_config.json": config, model + "pytorch_model.bin": b"other"}
    server.files[wrong + "open_clip_model.safetensors"] = CONTENT
    server.hashes[wrong + "open_clip_model.safetensors"] = "0" * 64
    script = """
from vab.frozen.vision.clip_files import parse, place_of
for name in ("wrong", "lacking"):
    try:
        print(place_of(parse(f"hf-hub:them/{name}"), None, None).file.name)
    except ValueError as error:
        print(error)
"""
    message, file = in_a_process(script)
    assert f"gave another open_clip_model.safetensors: its hash is {SHA}, expected {'0' * 64}" in message
    assert file == "pytorch_model.bin"


def test_a_file_of_another_hash_does_not_stay_in_the_hubs_cache(server):
    server.files[DAC + "config.json"] = b"{}"
    server.hashes[DAC + "config.json"] = "0" * 40
    script = """
from vab.frozen.weight_files.downloading import cached, fetch, from_hub
wanted = ("descript/dac_16khz", ["config.json"])
try:
    fetch("it is not here", "wait", from_hub, *wanted)
except ValueError as error:
    print(error, cached(*wanted), sep="\\n")
"""
    message, found = in_a_process(script)
    assert f"its hash is {hub_hash('.json', b'{}')}, expected {'0' * 40} as the hub says; it was deleted" in message
    assert found == "None"


def test_what_the_hub_does_not_have_is_one_line(server, places):
    _, err, status = vab("weights", "fetch", "--names", "clap", "--out", places)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith(f"error: clap is not in {places}, and fetching it from laion/clap-htsat-unfused failed: 404")
    assert files_below(places) == []


def test_from_an_address(server, places, capsys):
    server.cut["/vggish-10086976.pth"] = 500_000
    with pytest.raises(UserError, match=r"vggish-10086976\.pth failed: invalid hash value"):
        fetch_weights(["vggish"], str(places))
    assert files_below(places) == []
    main(["weights", "fetch", "--names", "vggish", "vggish_relu", "--out", str(places)])
    assert (places / "vggish-10086976.pth").read_bytes() == CONTENT
    assert f"SHA-256 {SHA}" in capsys.readouterr().out
    assert len(server.log) == 2


def test_what_is_there_and_was_changed_is_not_taken(server, places):
    fetch_weights(["vggish"], str(places))
    (places / "vggish-10086976.pth").write_bytes(b"changed")
    with pytest.raises(UserError, match=rf"is there, but its hash is \w{{8}}, expected {SHA[:8]} as published: delete"):
        fetch_weights(["vggish"], str(places))


def test_offline_it_says_so_before_anything(server, places, monkeypatch):
    fetch_weights(["vggish"], str(places))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch_weights(["vggish"], str(places))  # all of it is there
    before = len(server.log)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE forbids to fetch dac_16khz, clap: unset it, or type this on"):
        fetch_weights(["vggish", "dac_16khz", "clap"], str(places))
    assert len(server.log) == before


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["weights", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_verify_names_what_was_changed_with_both_hashes(server, places, capsys):
    fetch_weights(["vggish"], str(places))
    (places / "own").mkdir()
    (places / "own" / "mine.pth").write_bytes(b"mine")
    capsys.readouterr()
    main(["weights", "verify", "--folder", str(places)])
    assert capsys.readouterr().out.splitlines() == [
        f"unchecked  {places}/own/mine.pth: unchecked, no hash is known",
        f"ok         {places}/vggish-10086976.pth: hash as published",
        "1 of 2 files have their known hash; the others have none",
    ]
    record = json.loads((places / "weights.json").read_text())
    record["files"] |= {"own/mine.pth": {"sha256": hashlib.sha256(b"mine").hexdigest()}, "gone.pth": {"sha256": SHA}}
    (places / "weights.json").write_text(json.dumps(record))
    (places / "own" / "mine.pth").write_bytes(b"mime")
    assert complaint(capsys, "verify", "--folder", places) == [
        "error: 2 of 3 files are not what they were; delete those, and type vab weights fetch --names NAME --out "
        f"{places}, with a name of vab weights list",
        f"{places}/own/mine.pth: its hash is {hashlib.sha256(b'mime').hexdigest()}, "
        f"expected {hashlib.sha256(b'mine').hexdigest()} as recorded at fetching",
        f"{places}/gone.pth is not there, but weights.json says that it was fetched",
    ]


def test_verify_without_a_folder_takes_what_vab_finds(server, places, monkeypatch, capsys):
    with pytest.raises(UserError, match="no weights are in the places of vab weights list"):
        verify_weights()
    fetch_weights(["vggish"], str(places))
    monkeypatch.setenv("VAB_WEIGHTS", str(places))
    verify_weights()
    assert f"ok         {places}/vggish-10086976.pth: hash as published" in capsys.readouterr().out
    (places / "vggish-10086976.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=rf"expected {SHA[:8]} as published"):
        verify_weights()


def test_the_list_shows_places_and_what_to_type(server, places, monkeypatch, capsys):
    fetch_weights(["vggish"], str(places))
    monkeypatch.setenv("VAB_WEIGHTS", str(places))
    capsys.readouterr()
    main(["weights", "list"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    place = f"{places}/vggish-10086976.pth"
    assert f"ok judge vggish, vggish_relu {place}, 2.0 MB; hash as published; Apache-2.0" in lines
    assert "-> vab weights fetch --names panns_16k --out FOLDER" in lines
    assert "ok codec tiny ships with vab" in lines
    (places / "vggish-10086976.pth").write_bytes(b"changed")
    broken = next(finding for finding in weights_found() if "vggish" in finding["name"])
    assert (broken["state"], broken["needed"]) == ("broken", False)
    assert broken["remedy"] == "delete it, and type vab weights fetch --names vggish --out FOLDER"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch", "--names", "vgish", "--out", "w"], "no weights are called 'vgish'; did you mean 'vggish'?"),
        (["fetch", "--names", "tiny", "--out", "w"], "tiny ships with vab: there is nothing to fetch"),
        (["fetch", "--names", "vggish", "--out", sys.executable], "cannot be written: File exists"),
        (["fetch", "--names", "vggish", "--folder", "w"], "--folder"),
        (["verify", "--folder", "absent"], "there is no folder absent"),
        (["get"], "no command 'get' in vab weights: it has list, fetch, verify"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = complaint(capsys, *arguments)
    assert len(lines) == 1
    assert words in lines[0]


def test_another_programs_record_is_kept(server, places):
    places.mkdir()
    (places / "weights.json").write_text("{}")
    with pytest.raises(UserError, match=r"weights\.json is of another program"):
        fetch_weights(["vggish"], str(places))
    assert (places / "weights.json").read_text() == "{}"


def test_one_fetch_at_a_time_in_a_folder(server, places):
    server.hold["/vggish-10086976.pth"] = 1000
    server.files[AUDIOGEN] = CONTENT
    server.hold[AUDIOGEN] = 1000
    child = start("weights", "fetch", "--names", "audiogen_16khz", "--out", places)
    assert server.holding.wait(60)
    with pytest.raises(UserError, match="another vab weights fetch is writing to"):
        fetch_weights(["vggish"], str(places))
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
