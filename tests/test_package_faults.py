"""What the package frechet-audio-distance answers where it should not, and what ours says of the same files."""

import os
import sys
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import soundfile
import torch

from vab.commands.evaluate import evaluate
from vab.metrics.frechet import frechet_distance, moments
from vab.spec import UserError

RATE = 16_000


class FewNumbers(torch.nn.Module):
    """Stands in for VGGish, whose weights are no part of this: levels of eight bands, one row for each 0.1 s."""

    def forward(self, audio, sample_rate):
        windows = torch.from_numpy(np.asarray(audio)).float().unfold(0, 1600, 1600)
        bands = torch.fft.rfft(windows).abs()[:, :800].reshape(len(windows), 8, 100)
        return (bands.mean(2) + 1e-3).log()


@pytest.fixture
def package(monkeypatch):
    """The package's object, built without its weights: nothing of it is replaced but the network."""
    pytest.importorskip("encodec")
    if "frechet_audio_distance" not in sys.modules:
        # It imports this for its CLAP alone, and the import asks a server for a tokenizer.
        monkeypatch.setitem(sys.modules, "laion_clap", ModuleType("laion_clap"))
    package = pytest.importorskip("frechet_audio_distance").FrechetAudioDistance
    built = object.__new__(package)
    settings = {"model_name": "vggish", "model": FewNumbers(), "sample_rate": RATE, "channels": 1}
    built.__dict__.update(settings, verbose=False, audio_load_worker=2, device=torch.device("cpu"))
    return built


def hundred(folder, level=1.0):
    """100 sounds of 0.4 s."""
    folder.mkdir()
    for index in range(100):
        random = np.random.default_rng(index)
        colour = np.convolve(random.standard_normal(6400 + 8), random.standard_normal(9), "valid")
        soundfile.write(folder / f"{index:03}.wav", (0.03 * level * colour).astype(np.float32), RATE, "FLOAT")
    return folder


@pytest.fixture
def folders(tmp_path):
    return hundred(tmp_path / "real"), hundred(tmp_path / "made", level=0.5)


def ours(real, made, out, **options):
    options |= {"metrics": "fad", "seconds": None, "num_workers": 0, "device": "cpu"}
    return evaluate(str(real), str(made), str(out), **options).figures["fad_tiny"]


def heard(package, paths):
    """(M, 8) of the stand-in, file after file."""
    return torch.cat([package.model(soundfile.read(path, dtype="float32")[0], RATE) for path in paths])


def theirs(package, real, made):
    return package.score(str(real), str(made))


def test_whole_folders_are_no_trouble(package, folders, tmp_path):
    assert theirs(package, *folders) > 0
    assert ours(*folders, tmp_path / "report.json").value > 0


def test_one_unreadable_file_among_a_hundred(package, folders, tmp_path, capsys):
    real, made = folders
    (made / "050.wav").write_bytes(b"no sound" * 100)
    assert theirs(package, real, made) == -1  # a number like any other to whoever averages or sorts it
    with pytest.raises(UserError, match=r"050\.wav"):
        ours(real, made, tmp_path / "report.json")
    assert ours(real, made, tmp_path / "report.json", on_error="skip").card.num_generated == 99


def test_one_empty_file_among_a_hundred(package, folders, tmp_path, capsys):
    """The package's loop ends at it, and the distance is of the files before it, as the system lists them."""
    real, made = folders
    place = 60
    soundfile.write(made / os.listdir(made)[place], np.zeros(0, np.float32), RATE, "FLOAT")
    listed = os.listdir(made)
    empty = next(name for name in listed if soundfile.info(made / name).frames == 0)
    answer = theirs(package, real, made)
    before = [made / name for name in listed[: listed.index(empty)]]
    subset = frechet_distance(*moments(heard(package, real.iterdir())), *moments(heard(package, before)))
    assert 0 < len(before) < 99
    assert answer == pytest.approx(float(subset), rel=1e-6)
    assert "throw an exception" in capsys.readouterr().out
    with pytest.raises(UserError, match=empty):
        ours(real, made, tmp_path / "report.json")


def test_one_file_that_is_cut_off(package, folders, tmp_path):
    """It counts as a whole one in the package, without a word."""
    real, made = folders
    path = made / "050.wav"
    path.write_bytes(path.read_bytes()[:15_000])
    assert theirs(package, real, made) > 0
    with pytest.raises(UserError, match=r"050\.wav: is cut off"):
        ours(real, made, tmp_path / "report.json")


def test_a_text_file_in_the_folder(package, folders, tmp_path, capsys):
    real, made = folders
    whole = ours(real, made, tmp_path / "a.json").value
    (made / "captions.txt").write_text("a dog barks")
    assert theirs(package, real, made) == -1
    assert ours(real, made, tmp_path / "b.json").value == whole
    assert "1 other files ignored" in capsys.readouterr().out


def test_scipy_without_disp(package, folders, tmp_path, monkeypatch):
    """SciPy 1.18 took the argument ``disp`` of sqrtm away."""
    real, made = folders
    with_disp, before = theirs(package, real, made), ours(real, made, tmp_path / "a.json").value
    root = scipy.linalg.sqrtm
    package_scipy = sys.modules[type(package).__module__].linalg
    monkeypatch.setattr(package_scipy, "sqrtm", lambda matrix, /: root(matrix))
    assert with_disp > 0
    assert theirs(package, real, made) == -1
    assert ours(real, made, tmp_path / "b.json").value == before
    distance = frechet_distance(*moments(heard(package, real.iterdir())), *moments(heard(package, made.iterdir())))
    assert float(distance) == pytest.approx(with_disp, rel=1e-6)  # on the very embeddings it had
