"""The pool of decoding processes: light, in order where that is wanted, and not ended by what a file does."""

import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from light_decoders import Endless, Failing, KilledAtFirst, Slow, TooLarge
from small_media import video
from vab.data.extract import decoders
from vab.data.extract.cutting import Cutting, LeftOut
from vab.data.extract.decoders import DecodingPool, Ended, Job
from vab.data.extract.sounds import Decoded, Listening, Unusable, decode_all
from vab.data.media.write import write_wav
from vab.resizing import Resizer
from vab.spec import UserError

WORKER = """
import pickle, sys
cutting, listening, video = pickle.loads(bytes.fromhex(sys.argv[1]))
items = [*cutting.decode(video, None), *listening.decode(video, None)]
assert {type(item).__name__ for item in items} == {"Segment", "Decoded"}, items
heavy = {"torch", "torchvision", "open_clip", "lightning", "safetensors"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""


def test_decoding_processes_import_no_torch(tmp_path):
    """All that a process does with a file, in a process of its own."""
    cutting = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "leave_out", Resizer((64, 64)))
    video(tmp_path / "x.mp4", 0.64)
    sent = pickle.dumps((cutting, Listening((16_000,), None, "keep", False), tmp_path / "x.mp4")).hex()
    subprocess.run([sys.executable, "-c", WORKER, sent], check=True, timeout=100)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_come_in_order_and_no_more_than_a_look_ahead_is_begun(num_workers, tmp_path):
    jobs = (Job(number, Path(str(number))) for number in range(12))
    items = DecodingPool(Slow(tmp_path), num_workers).run_in_order(jobs, ahead=3)
    assert next(items) == ["0"]
    late = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < (3 if num_workers else 1) and time.monotonic() < late:
        time.sleep(0.01)
    time.sleep(1.0 if num_workers else 0)  # long enough for a fourth
    assert len(list(tmp_path.iterdir())) == (3 if num_workers else 1)
    assert [name for (name,) in items] == [str(number) for number in range(1, 12)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exception_that_nobody_foresaw_ends_its_file_alone(num_workers):
    jobs = [Job(number, Path(str(number))) for number in range(3)]
    first, (error,), last = DecodingPool(Failing(), num_workers).run_in_order(jobs, ahead=2)
    assert (first, last) == (["0"], ["2"])
    assert isinstance(error, LeftOut)
    assert error.reason == "error"
    assert error.detail.startswith("ZeroDivisionError: a bug of ours (light_decoders.py, line ")


class Unforeseen:
    """Stands for a path, and raises what nobody foresaw."""

    def __fspath__(self):
        raise ZeroDivisionError("a bug")


def test_an_exception_that_nobody_foresaw_does_not_end_listening(tmp_path):
    write_wav(tmp_path / "a.wav", np.full(16_000, 0.1, np.float32), 16_000)
    paths = [tmp_path / "a.wav", Unforeseen(), tmp_path / "a.wav"]
    found = list(decode_all(paths, Listening((16_000,), None, "keep", False), num_workers=0, ahead=4))
    assert [type(one) for one in found] == [Decoded, Unusable, Decoded]
    assert found[1].reason.startswith("ZeroDivisionError: a bug (")


def test_closing_does_not_wait_for_the_end_of_a_file():
    items = DecodingPool(Endless(), 1).run([Job(0, Path("0"))])
    assert next(items) == (0, 0)
    items.close()  # else the test would run out of time


def test_a_run_that_is_closed_early_ends_its_processes_and_threads(tmp_path):
    before = set(threading.enumerate())
    items = DecodingPool(Slow(tmp_path), 2).run(Job(number, Path(str(number))) for number in range(1000))
    seen = [item for _, item in (next(items) for _ in range(6))]
    items.close()
    assert sum(isinstance(item, Ended) for item in seen) >= 2
    assert set(threading.enumerate()) == before
    count = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == count < 1000


def test_a_process_that_is_killed_as_it_begins_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "_PAUSES", (0.1, 0.1))
    (first,) = DecodingPool(KilledAtFirst(tmp_path, 2), 1).run_in_order([Job(0, Path("0"))], ahead=1)
    assert first == ["0"]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(UserError, match=r"\(exit code -9, for want of memory\?\): give a lower num_workers"):
        list(DecodingPool(KilledAtFirst(tmp_path, 3), 1).run_in_order([Job(0, Path("0"))], ahead=1))


def test_an_item_that_cannot_be_sent_ends_its_file_alone():
    jobs = [Job(number, Path(str(number))) for number in range(2)]
    found = list(DecodingPool(TooLarge(), 1).run_in_order(jobs, ahead=2))
    assert [(one[0], one[1].reason) for one in found] == [("begun", "error")] * 2
    assert "cannot pickle 'generator' object" in found[0][1].detail
