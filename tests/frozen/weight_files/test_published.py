"""Files of weights: where they are looked for, what is read from them, what is refused."""

import hashlib
import logging
import pickle

import huggingface_hub as hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging

from vab.files import sha256_of
from vab.frozen.judges import load_judge
from vab.frozen.weight_files.catalogue import JUDGES
from vab.frozen.weight_files.downloading import fetch, from_hub
from vab.frozen.weight_files.published import Published
from vab.frozen.weight_files.reading import AUDIOSET_FILE, audioset_classes, read_checkpoint
from vab.spec import UserError

WANTED = Published("judge some", ("some=1.pth", "some%3D1.pth"), "a place")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for folder in ("own", "hub/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_places_are_searched_in_order(places):
    with pytest.raises(UserError, match=r"judge some needs some=1\.pth, published in a place.*own or .*checkpoints"):
        WANTED.find(None)
    expected = [places / "hub" / "some%3D1.pth", places / "hub/checkpoints" / "some%3D1.pth", places / "own/some=1.pth"]
    for path in expected:  # from the last place to the first
        path.write_bytes(b"")
        assert WANTED.find(None) == path
    assert WANTED.find(expected[0]) == expected[0]
    with pytest.raises(UserError, match=r"there is no .*absent"):
        WANTED.find(places / "absent")


@pytest.mark.parametrize("name", [name for name in JUDGES if name != "tiny"])
def test_absent_weights_are_one_line(name):
    judge = name.removesuffix("_relu")
    words = rf"judge {judge} needs .*VAB_WEIGHTS|^judges? .*{judge}.* needs? a package"  # tests/test_extras.py
    with pytest.raises(UserError, match=words) as caught:
        load_judge(name)
    assert "\n" not in str(caught.value)


def test_arrays_beside_the_weights_are_read(tmp_path):
    path = tmp_path / "a.pth"
    contents = {"model": {"w": torch.ones(2)}, "sampler": [np.arange(3), np.float64(2.0), np.zeros(2, np.float32)]}
    torch.save(contents, path)
    got = read_checkpoint(path)
    assert torch.equal(got["model"]["w"], torch.ones(2))
    np.testing.assert_array_equal(got["sampler"][0], np.arange(3))


def test_a_hub_that_does_not_answer_is_one_whole_line(monkeypatch, capsys):
    log = hub_logging.get_logger("huggingface_hub.utils._http")

    def without_network(*_, **__):
        log.warning("Retrying in 1s [Retry 1/5].")
        try:
            raise OSError("[Errno -2] Name or service not known")
        except OSError as error:
            raise LocalEntryNotFoundError("An error happened. Please check your connection " * 9) from error

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "hf_hub_download", without_network)
    with pytest.raises(UserError) as caught:
        fetch("codec x needs file.bin: it is not here", "give a folder", from_hub, "owner/name", ["file.bin"])
    assert str(caught.value) == (
        "codec x needs file.bin: it is not here, and fetching it from owner/name failed: [Errno -2] Name or"
        " service not known; give a folder"
    )
    assert capsys.readouterr().err == "fetching owner/name\n"
    assert log.isEnabledFor(logging.WARNING)


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_what_could_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "a.pth"
    torch.save({"model": Harm()}, path)
    with pytest.raises(UserError, match=r"a\.pth cannot be read as a file of weights"):
        read_checkpoint(path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps(3)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="fetch it again"):
        read_checkpoint(path)


def test_hash_is_that_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_class_names_come_from_the_file_beside(tmp_path):
    assert audioset_classes(tmp_path / "w.pth")[526] == "audioset_526"
    rows = [f'{number},/m/{number},"Name, {number}"' for number in range(527)]
    (tmp_path / AUDIOSET_FILE).write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    assert audioset_classes(tmp_path / "w.pth")[5] == "Name, 5"
    (tmp_path / AUDIOSET_FILE).write_text("\n".join(["index,mid,display_name", *rows])[:-3])
    with pytest.raises(UserError, match="cannot be read as CSV"):
        audioset_classes(tmp_path / "w.pth")
    (tmp_path / AUDIOSET_FILE).write_text("\n".join(["index,mid,display_name", *rows[1:]]) + "\n")
    with pytest.raises(UserError, match="does not list AudioSet's 527 classes"):
        audioset_classes(tmp_path / "w.pth")
