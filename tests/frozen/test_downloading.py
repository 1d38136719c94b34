"""Files over HTTP from a server of this machine: whole or not at all, gone on with, never mixed up."""

import errno
import hashlib
import random
import threading

import pytest

from loopback import serving
from vab.frozen.downloading import download
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


def test_a_file_comes_whole_and_is_told_of(server, place):
    told = []
    download(f"{server.address}/w.bin", place, SHA[:8], lambda *words: told.append(words))
    assert place.read_bytes() == CONTENT
    assert [path.name for path in place.parent.iterdir()] == ["w.bin"]
    assert told[-1] == (len(CONTENT), len(CONTENT))
    server.files.clear()
    download(f"{server.address}/w.bin", place, SHA)  # it is there: nobody is asked
    assert len(server.log) == 1


def test_what_ends_early_is_gone_on_with(server, place):
    server.cut["/w.bin"] = 1_000_000
    with pytest.raises(UserError, match=r"ended after 1,000,000 of 3,000,001 bytes.*1,000,000 bytes are there"):
        download(f"{server.address}/w.bin", place, SHA)
    assert not place.exists()
    download(f"{server.address}/w.bin", place, SHA)
    assert place.read_bytes() == CONTENT
    assert server.log[-1] == ("GET", "/w.bin", "bytes=1000000-")
    assert server.sent["/w.bin"] == len(CONTENT)


def test_without_a_hash_it_begins_again_as_nothing_could_tell_a_mixture(server, place):
    server.cut["/w.bin"] = 1_000_000
    with pytest.raises(UserError, match="ended after"):
        download(f"{server.address}/w.bin", place)
    assert list(place.parent.iterdir()) == []
    place.with_name("w.bin.part").write_bytes(b"of another time")
    download(f"{server.address}/w.bin", place)
    assert place.read_bytes() == CONTENT
    assert server.log[-1][2] is None


def test_a_server_that_sends_no_parts_sends_all(server, place):
    server.ranges = False
    place.parent.mkdir()
    place.with_name("w.bin.part").write_bytes(CONTENT[:500])
    download(f"{server.address}/w.bin", place, SHA)
    assert server.log[-1][2] == "bytes=500-"
    assert place.read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"])
def test_a_whole_part_and_one_that_is_too_long(server, place, left):
    place.parent.mkdir()
    place.with_name("w.bin.part").write_bytes(left)
    download(f"{server.address}/w.bin", place, SHA)
    assert place.read_bytes() == CONTENT
    assert server.sent.get("/w.bin", 0) == (0 if left == CONTENT else len(CONTENT))


@pytest.mark.parametrize("left", [b"", b"other beginning"])
def test_another_hash_is_refused_and_deleted(server, place, left):
    place.parent.mkdir()
    place.with_name("w.bin.part").write_bytes(left)
    expected = SHA if left else "0" * 64
    with pytest.raises(UserError, match=f"gave a file of hash [0-9a-f]{{64}}, expected {expected}"):
        download(f"{server.address}/w.bin", place, expected)
    assert list(place.parent.iterdir()) == []


def test_what_is_not_there_leaves_nothing(server, place):
    with pytest.raises(UserError, match=r"/absent could not be fetched \(Not Found\)"):
        download(f"{server.address}/absent", place, SHA)
    assert list(place.parent.iterdir()) == []


def test_a_full_disk_is_left_to_the_command_line(server, small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        download(f"{server.address}/w.bin", small_disk / "w.bin", SHA)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == ["w.bin.part"]


def test_two_at_once_fetch_it_once(server, place):
    threads = [
        threading.Thread(target=download, args=(f"{server.address}/w.bin", place, SHA), daemon=True) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read_bytes() == CONTENT
    assert len(server.log) == 1
    assert [path.name for path in place.parent.iterdir()] == ["w.bin"]
