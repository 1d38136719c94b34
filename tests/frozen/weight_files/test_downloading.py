"""Files over HTTP from a server of this machine: whole or not at all, and never two at once."""

import errno
import hashlib
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loopback import serving
from vab.frozen.weight_files.downloading import fetch, from_address
from vab.spec import UserError

CONTENT = random.Random(0).randbytes(3_000_001)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serving() as server:
        server.files["/w.bin"] = CONTENT
        yield server


@pytest.fixture
def place(tmp_path):
    return tmp_path / "deep" / "w.bin"


def download(*arguments):
    return fetch("w.bin is not there", "put it there", from_address, *arguments)


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_comes_whole(server, place, capsys):
    download(f"{server.address}/w.bin", place, SHA[:8])
    assert place.read_bytes() == CONTENT
    assert names(place.parent) == ["w.bin"]
    server.files.clear()
    download(f"{server.address}/w.bin", place, SHA)  # it is there: nobody is asked
    assert len(server.log) == 1
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr().err == f"fetching {server.address}/w.bin\n" * 2  # no progress bar without a terminal


def test_what_ends_early_leaves_nothing(server, place):
    server.cut["/w.bin"] = 1_000_000
    with pytest.raises(UserError, match=rf"w\.bin failed: invalid hash value .*{SHA[:8]}"):
        download(f"{server.address}/w.bin", place, SHA)
    assert names(place.parent) == []
    download(f"{server.address}/w.bin", place, SHA)
    assert place.read_bytes() == CONTENT


def test_what_a_killed_process_left_is_deleted(server, place):
    place.parent.mkdir()
    place.with_name("w.bin.0123abcd.partial").write_bytes(b"other beginning")
    place.with_name("w.bin.mine").write_bytes(b"of a user")
    download(f"{server.address}/w.bin", place, SHA)
    assert place.read_bytes() == CONTENT
    assert sorted(names(place.parent)) == ["w.bin", "w.bin.mine"]


def test_another_hash_is_refused_and_deleted(server, place):
    with pytest.raises(UserError, match=rf"failed: invalid hash value \(expected \"{'0' * 8}\", got"):
        download(f"{server.address}/w.bin", place, "0" * 8)
    assert names(place.parent) == []


def test_a_server_that_falls_silent_is_given_up(server, place, monkeypatch):
    monkeypatch.setattr("vab.frozen.weight_files.downloading._TIMEOUT_SECONDS", 0.2)
    server.hold["/w.bin"] = 1_000_000
    with pytest.raises(UserError, match=r"failed: timed out; put it there"):
        download(f"{server.address}/w.bin", place, SHA)
    assert names(place.parent) == []


def test_what_is_not_there_leaves_nothing(server, place):
    with pytest.raises(UserError, match=r"/absent failed: HTTP Error 404: Not Found"):
        download(f"{server.address}/absent", place, SHA)
    assert names(place.parent) == []


def test_a_full_disk_is_left_to_the_command_line(server, small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        download(f"{server.address}/w.bin", small_disk / "w.bin", SHA)
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == []


def test_no_error_of_the_download_is_swallowed(server, place, monkeypatch):
    def busy(*_, **__):
        monkeypatch.undo()
        raise BlockingIOError("busy")

    monkeypatch.setattr(torch.hub, "download_url_to_file", busy)
    with pytest.raises(UserError, match=r"w\.bin failed: busy"):
        download(f"{server.address}/w.bin", place, SHA)
    assert names(place.parent) == []


def test_two_at_once_fetch_it_once(server, place):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(f"{server.address}/w.bin", place, SHA), range(4)))
    assert place.read_bytes() == CONTENT
    assert len(server.log) == 1
    assert names(place.parent) == ["w.bin"]
