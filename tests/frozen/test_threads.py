"""On a CPU a result does not depend on the number of threads, nor a row's on the rows beside it."""

import threading

import pytest
import torch
from clip_weights import MODELS, publish
from codec_weights import DAC44, audiogen, dac_of_hub, encodec_24khz, encodec_of_hub, sounds

from vab.frozen.codec import load_codec
from vab.frozen.precision import one_by_one, single_threaded
from vab.frozen.vision import load_vision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread_again():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def codec(request, tmp_path):
    pytest.importorskip("encodec")
    pytest.importorskip("transformers")
    places = {
        "encodec_24khz:6": (encodec_24khz, tmp_path / "encodec_24khz-d7cc33bc.th"),
        "audiogen_16khz": (audiogen, tmp_path / "compression_state_dict.bin"),
        "encodec_32khz": (encodec_of_hub, tmp_path / "encodec_32khz"),
        "dac_16khz": (dac_of_hub, tmp_path / "dac"),
        "dac_44khz": (lambda folder: dac_of_hub(folder, DAC44), tmp_path / "dac"),
    }
    if request.param not in places:
        return load_codec(request.param)
    make, path = places[request.param]
    make(path)
    return load_codec(request.param, weights=path)


@pytest.mark.parametrize(
    "codec",
    ["tiny", "audiogen_16khz", "encodec_32khz", "dac_16khz", "dac_44khz", "encodec_24khz:6"],
    indirect=True,
)
def test_codes_do_not_depend_on_the_number_of_threads(codec):
    waveform = sounds(2, 4 * codec.sample_rate)
    alone = torch.cat([codec.encode(row[None]) for row in waveform])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(codec.encode(waveform), alone)
        assert torch.get_num_threads() == threads
    assert len(alone.unique()) > 30  # else it is no test


@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_features_do_not_depend_on_the_number_of_threads(name, tmp_path):
    if name != "tiny":
        pytest.importorskip("open_clip")
        publish(tmp_path / name, *MODELS[name])
        name = f"local-dir:{tmp_path / name}"
    vision = load_vision(name)
    side = 64 if name == "tiny" else 32
    pixels = torch.randn(10, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = vision.encode(pixels)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(vision.encode(pixels), expected)
    if name != "tiny":  # which says of itself that it does depend on them
        assert torch.equal(torch.cat([vision.encode(frame[None]) for frame in pixels]), expected)


def test_the_number_of_threads_is_one_inside_and_what_it_was_outside():
    torch.set_num_threads(3)
    with single_threaded(CPU) as before:
        assert (before, torch.get_num_threads()) == (3, 1)
    assert torch.get_num_threads() == 3

    def fails():
        with single_threaded(CPU):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert torch.get_num_threads() == 3
    with single_threaded(torch.device("meta")):
        assert torch.get_num_threads() == 3


def test_rows_go_through_alone_at_once_and_come_back_in_order():
    """As many at once as there are threads: each waits for the other."""
    torch.set_num_threads(2)
    both, seen = threading.Barrier(2, timeout=60), []

    def run(row):
        seen.append((tuple(row.shape), torch.get_num_threads(), torch.is_grad_enabled()))
        both.wait()
        return 2 * row

    rows = torch.arange(8.0).view(4, 2)
    assert torch.equal(one_by_one(run, rows), 2 * rows)
    assert seen == [((1, 2), 1, False)] * 4


def test_no_rows_and_other_devices_go_through_as_they_are():
    shapes = []

    def run(rows):
        shapes.append(tuple(rows.shape))
        return rows

    assert one_by_one(run, torch.zeros(0, 3)).shape == (0, 3)
    assert one_by_one(run, torch.zeros(5, 3, device="meta")).shape == (5, 3)
    assert shapes == [(0, 3), (5, 3)]


def test_a_fault_in_one_row_is_the_callers():
    torch.set_num_threads(2)

    def run(row):
        raise RuntimeError(f"row {int(row)}")

    with pytest.raises(RuntimeError, match="row 0"):
        one_by_one(run, torch.arange(3.0)[:, None])
    assert torch.get_num_threads() == 2
