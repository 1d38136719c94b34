import logging
import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from small_media import save_model
from tone_shards import short_spec, write_shards
from vab.frozen.codec import load_codec
from vab.generation.generator import Generator

torch.set_num_threads(1)  # tests are small; more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests run in the background: what they start must not ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No test may leave this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """No test's random numbers depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def caplog(caplog, monkeypatch):
    """Sees Lightning's messages, too, which end at its own handler where it is imported before pytest's are there."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def shared_data():
    """Real media beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real media at {SHARED_DATA}")
    return SHARED_DATA


def pytest_collection_modifyitems(items):
    for item in items:
        wants_cuda = item.get_closest_marker("needs_cuda") is not None
        if wants_cuda and not torch.cuda.is_available() and os.environ.get("FAIL_WITHOUT_CUDA") != "1":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with ``train`` (48 records) and ``val`` (20 records)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", short_spec(), 48)
    write_shards(folder / "val", short_spec(), 20, seed=1)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with room for 64 kB; only root can make one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained model of segments of 0.64 s."""
    return save_model(tmp_path_factory.mktemp("model") / "last.ckpt", short_spec(), load_codec("tiny").codebooks())


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory):
    """Untrained models of the first two levels, and of the last two for given first ones."""
    folder, spec, codebooks = tmp_path_factory.mktemp("stages"), short_spec(), load_codec("tiny").codebooks()
    coarse = save_model(folder / "coarse.ckpt", replace(spec, num_codebooks=2), codebooks[:2])
    return coarse, save_model(folder / "fine.ckpt", spec, codebooks, conditioning_levels=2)


@pytest.fixture(scope="session")
def generator(checkpoint):
    return Generator.load(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def two_stage_generator(two_stages):
    coarse, fine = two_stages
    return Generator.load(coarse, device="cpu", fine_checkpoint=fine)
