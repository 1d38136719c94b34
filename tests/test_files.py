import errno
import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import stat
from contextlib import nullcontext

import pytest

from vab import files
from vab.console import ProgressBar, track
from vab.files import Lock, explain_full_disk, sha256_of, write_atomically

FORK = multiprocessing.get_context("fork")  # of which the processes start at once


def hold(path, options, pipe):
    with Lock(path, **options):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def other():
    """Starts another process that holds a lock."""
    started = []

    def start(path, **options):
        mine, its = FORK.Pipe()
        process = FORK.Process(target=hold, args=(path, options, its))
        process.start()
        started.append(process)
        assert mine.poll(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_exclusive_lock_excludes_every_other_until_its_process_is_killed(tmp_path, other, is_folder):
    path = tmp_path if is_folder else tmp_path / "lock"
    process = other(path)
    for shared in (False, True):
        with pytest.raises(BlockingIOError):
            Lock(path, shared=shared, wait=False)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    Lock(path, wait=False).close()


def test_shared_locks_exclude_exclusive_ones_only(tmp_path, other):
    path = tmp_path / "lock"
    other(path, shared=True)
    with Lock(path, shared=True, wait=False) as mine:
        copy = pickle.loads(pickle.dumps(mine))
    with pytest.raises(BlockingIOError):
        Lock(path, wait=False)
    copy.close()


def test_an_exclusive_lock_can_be_shared_later(tmp_path):
    with Lock(tmp_path) as first:
        first.share()
        with Lock(tmp_path, shared=True, wait=False), pytest.raises(BlockingIOError):
            Lock(tmp_path, wait=False)


def test_a_lock_ends_with_its_object(tmp_path):
    lock = Lock(tmp_path / "lock")
    del lock
    Lock(tmp_path / "lock", wait=False).close()
    assert (tmp_path / "lock").exists()


def test_a_temporary_lock_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with Lock(path, temporary=True), pytest.raises(BlockingIOError):
        Lock(path, wait=False, temporary=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wait", [True, False])
def test_a_temporary_lock_whose_file_its_last_holder_deletes_is_taken_again(tmp_path, monkeypatch, wait):
    path, taken = tmp_path / "lock", []
    take = Lock._take

    def after_another(lock, shared, wait):
        if not taken:
            path.unlink()
        taken.append(path)
        take(lock, shared, wait)

    monkeypatch.setattr(Lock, "_take", after_another)
    with Lock(path, temporary=True, wait=wait):
        assert len(taken) == 2
        monkeypatch.undo()
        with pytest.raises(BlockingIOError):
            Lock(path, wait=False)
    assert list(tmp_path.iterdir()) == []


def keep_taking(path, count, pipe):
    try:
        for _ in range(count):
            with Lock(path, temporary=True):
                pass
        pipe.send("done")
    except BaseException as error:
        pipe.send(repr(error))


def test_processes_that_wait_for_a_temporary_lock_all_get_it(tmp_path):
    ends = []
    for _ in range(3):
        mine, its = FORK.Pipe()
        process = FORK.Process(target=keep_taking, args=(tmp_path / "lock", 300, its))
        process.start()
        ends.append((process, mine))
    for process, mine in ends:
        assert mine.poll(60)
        assert mine.recv() == "done"
        process.join()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(handle, wait):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_share", no_locks)
    with pytest.raises(OSError, match="No locks"):
        Lock(tmp_path, shared=True)
    Lock(tmp_path, shared=True, required=False).close()


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_without_fsync_of_folders(tmp_path, monkeypatch, number, passes):
    fsync = os.fsync

    def of_files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with nullcontext() if passes else pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "file", b"content")


def test_a_full_disk_is_told_for_a_folder_that_is_not_there(tmp_path):
    error = explain_full_disk(OSError(errno.ENOSPC, "full"), tmp_path / "not" / "there", 0)
    assert re.match(rf"no space left in {tmp_path}/not/there: [\d,]+ bytes are free;", str(error))


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    assert sha256_of(tmp_path / "file") == hashlib.sha256(bytes(3_000_000)).hexdigest()


def test_a_progress_bar_shows_counts_rates_and_notes_on_a_terminal_only(monkeypatch, capsys):
    def use(unit):
        with ProgressBar("reading [x]", 2_000_000, unit) as bar:
            for done in (500_000, 500_000):
                bar.advance(done)
            bar.update(1_500_000, note="note [x]")
        return capsys.readouterr()

    assert use("files") == ("", "")
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    shown = use("files")
    assert shown.out == ""
    for words in ("reading [x]", "1500000/2000000", "files/s", "note [x]"):
        assert words in shown.err
    assert "1.5/2.0 MB" in use("bytes").err
    assert list(track("abc", "reading", 3, "letters")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "letters/s" in shown
    with ProgressBar("hidden", 3, show=False) as bar:
        bar.advance()
        bar.update(2, note="n")
    assert capsys.readouterr() == ("", "")
