import csv
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from small_media import video
from sound_folders import Deadly, Endless, band_limited, demo_sound, noisy, shuffled_names, write_folder, write_sound
from vab.audio import resample
from vab.cli import main
from vab.commands.evaluate import evaluate
from vab.data.extract.sounds import Decoded, Listening, Unusable, decode, decode_all
from vab.data.media.segments import read_audio
from vab.evaluation.details import read_labels
from vab.evaluation.figures import Comparison, check_metrics
from vab.evaluation.report import number as shown
from vab.evaluation.sides import Side, find_folder, is_paired
from vab.frozen.batches import JudgeOutputs
from vab.frozen.judges import load_judge
from vab.frozen.weight_files.catalogue import JUDGES
from vab.metrics.card import MetricCard
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_infinity, frechet_infinity_fadtk, moments
from vab.metrics.kernel import kernel_distance, median_bandwidth
from vab.spec import UserError

SECONDS = {"seconds": 4.0, "num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("evaluate") / "real")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The real sounds with noise, as flac."""
    return write_folder(
        tmp_path_factory.mktemp("evaluate") / "made",
        change=lambda sound, index: np.clip(noisy(sound, index, 10), -1, 1),
        suffix="flac",
    )


def values(measured):
    return {name: figure.value for name, figure in measured.figures.items()}


def measure(real, made, out, **options):
    return evaluate(str(real), str(made), str(out), **(SECONDS | options))


def test_a_folder_beside_itself(real, tmp_path, capsys):
    measured = measure(real, real, tmp_path / "report.json")
    found = values(measured)
    assert found["fad_tiny"] == pytest.approx(0, abs=1e-9)
    assert found["kld_tiny"] == found["kld_sigmoid_tiny"] == 0
    assert found["onset_recall"] == found["onset_precision"] == found["onset_f1"] == 1
    assert found["onset_offset_seconds"] == pytest.approx(0, abs=1e-12)
    assert found["kad_tiny"] < 0  # unbiased: below 0 by the share of each embedding with itself
    captured = capsys.readouterr()
    for name, least in (("fad_infinity_tiny", "512 embeddings"), ("fad_infinity_fadtk_tiny", "more than 500")):
        line = next(line for line in captured.out.splitlines() if line.startswith(f"no {name}:"))
        assert least in line
        assert line.endswith("give more sounds")
    assert "kld_tiny" in captured.out
    assert "8 generated embeddings, 128 wide" in captured.err


def test_wavs_with_placeholder_sizes_score_like_their_originals(shared_data, tmp_path):
    cases = shared_data / "cases"
    found = values(measure(cases / "wav_real", cases / "wav_gen", tmp_path / "report.json"))
    assert len(list((cases / "wav_gen").iterdir())) == 7
    assert found["kld_tiny"] == 0
    assert found["fad_tiny"] == pytest.approx(0, abs=1e-9)


def test_the_report_holds_every_figure_with_its_card(real, made, tmp_path):
    measured = measure(real, made, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert {name: entry["value"] for name, entry in report["figures"].items()} == values(measured)
    cards = {name: MetricCard.from_dict(entry["card"]) for name, entry in report["figures"].items()}
    card = cards["fad_tiny"]
    assert (card.judge, card.sample_rate, card.num_real, card.num_generated_rows) == ("tiny", 16_000, 8, 8)
    assert card.length == "first 4 s; shorter ones as long as they are"
    assert card.real_set == report["real"]["set"] != card.generated_set == report["generated"]["set"]
    assert cards["inception_score_tiny"].real_set is None
    assert cards["onset_recall"].judge is None
    assert all(card.better == "higher" for name, card in cards.items() if name.startswith(("inception", "onset_r")))
    assert (report["paired"], report["generated"]["files"], report["generated"]["embeddings"]) == (True, 8, {"tiny": 8})


def test_variants_of_other_tools_have_their_own_names():
    judge, listening = load_judge("tiny"), Listening((16_000,), 4.0, "keep", False)
    seed = torch.Generator().manual_seed(0)

    def side(count, spread):
        """Sounds of 3 windows each that nothing was heard of but embeddings: windows of one sound are alike."""
        windows = torch.randn(count, 1, 128, generator=seed) + 0.5 * torch.randn(count, 3, 128, generator=seed)
        rows = torch.full((count,), 3)
        heard = JudgeOutputs(spread * windows.flatten(0, 1), rows, torch.zeros(count, len(judge.classes)))
        keys = tuple(map(str, range(count)))
        return Side(keys, keys, torch.ones(count), torch.zeros(count), (torch.zeros(0),) * count, {"tiny": heard})

    real, made = side(60, 1.0), side(300, 1.5)
    metrics = ["fad_infinity", "fad_infinity_fadtk", "kad", "kad_kadtk"]
    figures = Comparison(real, made, False, listening, 3, 1).measure([judge], metrics).figures
    assert list(figures) == [f"{name}_tiny" for name in metrics]
    first, second = real.outputs["tiny"].embedding, made.outputs["tiny"].embedding
    files = torch.arange(300).repeat_interleave(3)
    assert figures["fad_infinity_tiny"].value == frechet_infinity(*moments(first), second, files, seed=3).score
    assert figures["fad_infinity_fadtk_tiny"].value == frechet_infinity_fadtk(*moments(first), second, seed=3).score
    for name, width in (("kad_tiny", median_bandwidth(first)), ("kad_kadtk_tiny", torch.pdist(second).median())):
        assert figures[name].value == pytest.approx(float(kernel_distance(first, second, width)), rel=1e-5)
        assert figures[name].details["bandwidth"] == pytest.approx(float(width), rel=1e-5)
    assert figures["kad_tiny"].value != pytest.approx(figures["kad_kadtk_tiny"].value, rel=0.1)
    definitions = {name: figure.card.definition for name, figure in figures.items()}
    assert "without replacement" in definitions["fad_infinity_tiny"]
    assert "bias by the number of real files stays" in definitions["fad_infinity_tiny"]
    assert "fadtk" in definitions["fad_infinity_fadtk_tiny"]
    assert "of the generated side" in definitions["kad_kadtk_tiny"]


def test_figures_are_those_of_the_metrics(real, made, tmp_path):
    """KLD once more by hand: decode, listen, compare."""
    from vab.frozen.batches import judge_sounds

    judge = load_judge("tiny")
    rate = Listening((judge.sample_rate,), 4.0, "keep", False)
    heard = []
    for folder in (real, made):
        sounds = [decode(path, rate).waveforms[judge.sample_rate] for path in find_folder(folder).files]
        heard.append(judge_sounds(judge, [torch.from_numpy(sound) for sound in sounds], judge.sample_rate))
    by_hand = paired_kl(heard[0].logits, heard[1].logits)
    figure = measure(real, made, tmp_path / "report.json", metrics="kld").figures["kld_tiny"]
    assert figure.value == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert figure.error == pytest.approx(float(by_hand.std()) / math.sqrt(8), rel=1e-5)


def test_batches_do_not_matter(real, made, tmp_path):
    whole = values(measure(real, made, tmp_path / "whole.json"))
    for batch_size in (1, 3):
        other = values(measure(real, made, tmp_path / f"{batch_size}.json", batch_size=batch_size))
        assert other == pytest.approx(whole, rel=1e-5, abs=1e-6)  # float32 products round by their company


@pytest.mark.slow  # processes take seconds to start
def test_workers_do_not_matter(real, made, tmp_path):
    alone = values(measure(real, made, tmp_path / "a.json"))
    assert values(measure(real, made, tmp_path / "b.json", num_workers=2)) == alone


def test_a_reference_stands_for_its_audio(real, made, tmp_path):
    reference = str(tmp_path / "real.npz")
    at_first = measure(real, made, tmp_path / "a.json", save_reference=reference, csv=str(tmp_path / "a.csv"))
    later = measure(reference, made, tmp_path / "b.json", csv=str(tmp_path / "b.csv"))
    assert later.figures == at_first.figures  # values, errors and cards, to the last bit
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_a_reference_of_other_settings_is_refused_with_both(real, made, tmp_path):
    reference = tmp_path / "real.npz"
    measure(real, made, tmp_path / "a.json", save_reference=str(reference))
    with pytest.raises(UserError, match=r"first 4 s.* there, first 3 s.* here"):
        measure(reference, made, tmp_path / "b.json", seconds=3.0)
    with np.load(reference) as file:
        arrays = dict(file)
    arrays["facts"] = np.array(str(arrays["facts"]).replace('"weight_hash": "', '"weight_hash": "0'))
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match=r"tiny weight_hash: 0.* there, .* here"):
        measure(tmp_path / "other.npz", made, tmp_path / "b.json")
    np.savez(tmp_path / "odd.npz", keys=np.arange(3))
    reference.write_bytes(reference.read_bytes()[:2000])
    for path in (reference, tmp_path / "odd.npz"):
        with pytest.raises(UserError, match="not a reference"):
            measure(path, made, tmp_path / "b.json")


def test_a_reference_that_would_run_code_is_refused(made, tmp_path):
    np.savez(tmp_path / "bad.npz", facts=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="not a reference"):
        measure(tmp_path / "bad.npz", made, tmp_path / "report.json")


@pytest.mark.parametrize("kind", ["noise", "cut", "empty", "not_finite"])
def test_a_bad_file_stops_with_its_name(real, tmp_path, kind):
    made = write_folder(tmp_path / "made")
    bad = made / "s03.wav"
    if kind == "noise":
        bad.write_bytes(os.urandom(4000))
    elif kind == "cut":
        bad.write_bytes(bad.read_bytes()[:100_000])
    elif kind == "empty":
        write_sound(bad, demo_sound(3)[:0])
    else:
        write_sound(bad, np.full(64_000, np.nan, np.float32))
    with pytest.raises(UserError, match=r"s03\.wav"):
        measure(real, made, tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()
    measured = measure(real, made, tmp_path / "report.json", on_error="skip")
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["generated"]["left_out"]) == ["s03.wav"]
    assert (report["real"]["files"], report["generated"]["files"]) == (7, 7)
    assert (report["real"]["without_counterpart"], report["generated"]["without_counterpart"]) == (1, 0)
    assert measured.figures["kld_tiny"].value == 0
    assert measured.figures["fad_tiny"].card.num_real == 7


def test_other_files_are_ignored_and_counted(real, tmp_path, capsys):
    made = write_folder(tmp_path / "made")
    (made / "notes.txt").write_text("a list")
    (made / ".hidden.wav").write_text("not a sound")
    found = values(measure(real, made, tmp_path / "report.json", metrics="fad"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["generated"]["ignored_files"], report["generated"]["ignored"]) == (1, ["notes.txt"])
    assert found["fad_tiny"] == pytest.approx(0, abs=1e-9)
    assert "1 other files ignored" in capsys.readouterr().out


def test_names_without_counterpart(real, tmp_path):
    made = write_folder(tmp_path / "made", count=7)
    write_sound(made / "extra.wav", demo_sound(9))
    with pytest.raises(UserError, match=r"of 7 pairs.*1 in real only \(s07\).*1 in generated only \(extra\)"):
        measure(real, made, tmp_path / "report.json")
    skipped = measure(real, made, tmp_path / "report.json", on_error="skip")
    assert skipped.figures["kld_tiny"].card.num_real == 7
    whole = measure(real, made, tmp_path / "whole.json", pair="none")
    assert (whole.figures["fad_tiny"].card.num_real, "kld_tiny" in whole.left_out) == (8, True)
    assert whole.left_out["onset_recall"] == "the two sides are not paired"


def test_onset_metrics_have_an_error_and_a_chance_level(real, made, tmp_path, capsys):
    measured = measure(real, made, tmp_path / "report.json", metrics="fad,synchrony")
    saved = json.loads((tmp_path / "report.json").read_text())["figures"]
    lines = capsys.readouterr().out.splitlines()
    for name in ("onset_recall", "onset_precision", "onset_f1", "onset_offset_seconds"):
        figure = measured.figures[name]
        assert 0 <= figure.error < 0.3
        worse = figure.details["chance"] > figure.value if name.endswith("seconds") else figure.details["chance"] < 0.7
        assert worse
        assert figure.details["chance_error"] > 0
        assert saved[name]["error"] == figure.error
        assert saved[name]["details"]["chance"] == figure.details["chance"]
        line = next(line for line in lines if f" {name} " in line)
        assert f"{shown(figure.details['chance'])} +- {shown(figure.details['chance_error'])}" in line
        assert f" {shown(figure.error)} " in line
    assert min(measured.figures[name].error for name in ("onset_recall", "onset_f1")) > 0
    assert "chance" not in measured.figures["fad_tiny"].details
    # Sounds under each other's names: where the chance level says.
    names = sorted(path.name for path in made.iterdir())
    (tmp_path / "turned").mkdir()
    for name, other in zip(names, names[3:] + names[:3], strict=True):
        shutil.copy(made / name, tmp_path / "turned" / other)
    turned = measure(real, tmp_path / "turned", tmp_path / "turned.json", metrics="synchrony", judges="tiny")
    assert turned.figures["onset_f1"].value < measured.figures["onset_f1"].details["chance"] + 0.2


def test_pairing():
    assert is_paired("auto", ["a", "b"], ["b", "a"], skip=False)
    assert not is_paired("auto", ["a", "b"], ["c"], skip=False)
    assert not is_paired("none", ["a"], ["a"], skip=False)
    with pytest.raises(UserError, match="not one name"):
        is_paired("name", ["a"], ["b"], skip=True)
    with pytest.raises(UserError, match="upper and lower case only"):
        is_paired("auto", ["Clip"], ["clip"], skip=False)


def test_subfolders_pair_and_suffixes_do_not_matter(tmp_path):
    for folder, suffix in (("real", "wav"), ("made", "ogg")):
        for part in ("x", "y"):
            write_folder(tmp_path / folder / part, count=2, suffix=suffix)
    measured = measure(tmp_path / "real", tmp_path / "made", tmp_path / "report.json", metrics="kld")
    assert measured.figures["kld_tiny"].card.num_generated == 4
    assert 0 < measured.figures["kld_tiny"].value < 1  # the ogg's coding


def test_the_sound_of_videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(2):
        video(folder / f"{index}.mp4", 1.0, seed=index)
    assert measure(folder, folder, tmp_path / "report.json", metrics="kld").figures["kld_tiny"].value == 0


def test_each_sound_in_a_csv(real, made, tmp_path):
    measured = measure(real, made, tmp_path / "report.json", csv=str(tmp_path / "each.csv"))
    with (tmp_path / "each.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == [f"s{index:02}" for index in range(8)]
    assert np.mean([float(line["kld_tiny"]) for line in lines]) == pytest.approx(measured.figures["kld_tiny"].value)
    assert all(float(line["fad_tiny"]) > 0 and line["top_class_real_tiny"] for line in lines)
    assert float(lines[0]["level_db_generated"]) > float(lines[0]["level_db_real"])  # noise adds power


def test_silence_is_counted_and_no_number_is_infinite(real, tmp_path, capsys):
    made = write_folder(tmp_path / "made", change=lambda sound, index: sound * 0 if index == 2 else sound)
    measure(real, made, tmp_path / "report.json", csv=str(tmp_path / "each.csv"))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["generated"]["silent"] == 1
    assert "inf" not in (tmp_path / "each.csv").read_text()
    assert "1 silent" in capsys.readouterr().out


def test_figures_by_class(tmp_path):
    real = write_folder(tmp_path / "real", count=6)
    made = write_folder(tmp_path / "made", count=6, change=lambda sound, index: sound if index < 4 else sound[::-1])
    lines = ["file,labels", "s00.wav,a", "s01,a;b", "s02.wav,a", "s03,b", "s04,c", "s05,c"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    measured = measure(real, made, tmp_path / "report.json", labels=str(tmp_path / "labels.csv"))
    found = json.loads((tmp_path / "report.json").read_text())["by_class"]
    klds = found["kld_tiny"]["figures"]
    assert klds["a"]["kld"] == klds["b"]["kld"] == 0 < klds["c"]["kld"]
    assert klds["c"]["kld"] * 2 / 6 == pytest.approx(measured.figures["kld_tiny"].value)
    assert set(found["fad_tiny"]["left_out"]) == {"a", "b", "c"}  # too few of each
    (tmp_path / "labels.csv").write_text("file,labels\nother,a\n")
    with pytest.raises(UserError, match="no class for any"):
        measure(real, made, tmp_path / "other.json", labels=str(tmp_path / "labels.csv"))
    for text, words in (
        ("name,class\n", "has no column file, labels in its first line"),
        ("file,labels\ns00,a\ns01\n", "line 3: 1 cells for the 2 columns"),
        ('file,labels\ns00,a\ns01,"a;b', "a double quote is not closed"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            read_labels(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("file, labels\ns00.wav, a\n")
    assert read_labels(tmp_path / "labels.csv") == {"s00": ("a",)}


def test_plots(real, made, tmp_path):
    for folder in (real, made):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        for file in list(copy.iterdir()):
            file.rename(copy / os.fsdecode(b"not utf-8 \xff$_{$" + os.fsencode(file.name)))
    real, made = tmp_path / real.name, tmp_path / made.name
    measure(real, made, tmp_path / "report.json", plots=str(tmp_path / "plots"))
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert written == ["distributions_tiny.png", "pairs_tiny.png"]
    assert all((tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in written)
    with pytest.raises(UserError, match=r"distributions_tiny\.png is there already"):
        measure(real, made, tmp_path / "other.json", plots=str(tmp_path / "plots"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judges": "tinny"}, "unknown judge 'tinny'"),
        ({"judges": "tiny,tiny"}, "different names"),
        ({"metrics": "fid"}, "--metrics fid: there is fad"),
        ({"metrics": ["fad_vggish"]}, "--metrics fad_vggish"),
        ({"seconds": 0.0}, "--seconds must be above 0"),
        ({"batch_size": 0}, "--batch_size must be 1 or more"),
        ({"num_workers": -1}, "--num_workers must be 0 or more"),
        ({"short": "refuse", "seconds": 5.0}, r"s00\.wav: has 4\.00 s"),
        ({"inception_splits": 0}, "--inception_splits"),
        ({"csv": "x.txt"}, "--csv must end in .csv"),
    ],
)
def test_a_mistake_is_refused(real, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        measure(real, real, tmp_path / "report.json", **options)


def test_outputs_are_not_written_over(real, tmp_path):
    out = tmp_path / "report.json"
    measure(real, real, out, metrics="kld")
    with pytest.raises(UserError, match="there already"):
        measure(real, real, out)
    measure(real, real, out, metrics="kld", overwrite=True)
    with pytest.raises(UserError, match="not a folder to write in"):
        measure(real, real, tmp_path / "no" / "report.json")
    with pytest.raises(UserError, match="not there"):
        measure(tmp_path / "no", real, tmp_path / "other.json")


def test_lengths(tmp_path):
    write_sound(tmp_path / "a.wav", demo_sound(0)[:16_000])

    def samples(seconds, short):
        return len(decode(tmp_path / "a.wav", Listening((8000,), seconds, short, False)).waveforms[8000])

    assert samples(0.5, "keep") == samples(0.5, "pad") == samples(0.5, "refuse") == 4000
    assert (samples(2.0, "keep"), samples(2.0, "pad"), samples(None, "keep")) == (8000, 16_000, 8000)


def test_the_mean_is_taken_off_what_is_sound(tmp_path):
    write_sound(tmp_path / "a.wav", demo_sound(0)[:16_000] + 0.1)
    waveform = decode(tmp_path / "a.wav", Listening((16_000,), 2.0, "pad", True)).waveforms[16_000]
    assert waveform[:16_000].mean() == pytest.approx(0, abs=1e-6)
    assert not waveform[16_000:].any()


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac"])
def test_a_file_that_is_cut_off_is_no_short_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, demo_sound(0), 16_000)
    listening = Listening((16_000,), 10.0, "keep", False)
    assert decode(path, listening).seconds == 4
    path.write_bytes(path.read_bytes()[:-5000])
    assert isinstance(decode(path, listening), Unusable)


def test_a_wav_that_was_written_to_a_pipe_is_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", demo_sound(0), 16_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert decode(tmp_path / "a.wav", Listening((16_000,), None, "keep", False)).seconds == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Deadly, Endless])
def test_a_file_that_takes_its_worker_down_costs_nothing_else(tmp_path, kind):
    folder = write_folder(tmp_path / "sounds", count=3)
    paths = [folder / "s00.wav", kind(), folder / "s01.wav", folder / "s02.wav"]
    listening = Listening((16_000,), 4.0, "keep", False)
    found = list(decode_all(paths, listening, num_workers=2, ahead=4, patience=5))
    assert [type(one) for one in found] == [Decoded, Unusable, Decoded, Decoded]
    expected = {Deadly: "its decoder crashed (exit code ", Endless: "nothing was decoded for 5 s"}
    assert found[1].reason.startswith(expected[kind])


def test_changes_move_what_they_should(real, tmp_path):
    """The quick form of the test on real sounds: noise, lost treble, and wrong pairs."""
    names = [f"s{index:02}" for index in range(8)]
    taken = shuffled_names(names, 1.0)
    changes = {
        "noise_30": lambda sound, index: noisy(sound, index, 30),
        "noise_0": lambda sound, index: noisy(sound, index, 0),
        "band_4000": lambda sound, index: band_limited(sound, 4000),
        "band_500": lambda sound, index: band_limited(sound, 500),
        "shuffled": lambda sound, index: demo_sound(int(taken[names[index]][1:])),
    }
    found = {}
    for name, change in changes.items():
        made = write_folder(tmp_path / name, change=change)
        found[name] = values(measure(real, made, tmp_path / f"{name}.json"))
    for weak, strong in (("noise_30", "noise_0"), ("band_4000", "band_500")):
        for figure in ("fad_tiny", "kad_tiny", "kld_tiny", "kld_epsilon_tiny", "kld_sigmoid_tiny"):
            assert found[weak][figure] < found[strong][figure], (weak, figure)
    assert found["noise_0"]["onset_recall"] < found["noise_30"]["onset_recall"]
    assert found["shuffled"]["fad_tiny"] == pytest.approx(0, abs=1e-6)  # the set is the same
    assert found["shuffled"]["kld_tiny"] > 1
    assert found["shuffled"]["onset_recall"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "band", "shuffle"])
def test_real_sounds_changed_more_are_farther_away(kind, shared_data, tmp_path):
    """80 sounds of ESC-10: every figure that can tell the kind of change moves with its strength."""
    sources = [
        path for folder in sorted((shared_data / "esc10").iterdir()) for path in sorted(folder.glob("*.ogg"))[:8]
    ]
    sounds = {path.stem: read_audio(path, 44_100).waveform for path in sources}
    names = list(sounds)
    for folder in ("real", *STRENGTHS[kind]):
        (tmp_path / str(folder)).mkdir()
        taken = shuffled_names(names, folder if kind == "shuffle" and folder != "real" else 0)
        for number, name in enumerate(names):
            sound = sounds[taken[name]]
            if kind == "noise" and folder != "real":
                sound = noisy(sound, number, folder)
            if kind == "band" and folder != "real":
                sound = band_limited(sound, folder, 44_100)
            write_sound(tmp_path / str(folder) / f"{name}.wav", sound, 44_100)
    measure(tmp_path / "real", tmp_path / "real", tmp_path / "real.json", save_reference=str(tmp_path / "real.npz"))
    found = [
        values(measure(tmp_path / "real.npz", tmp_path / str(one), tmp_path / f"{one}.json", metrics=METRICS_THAT_MOVE))
        for one in STRENGTHS[kind]
    ]
    divergences = ["kld_tiny", "kld_epsilon_tiny", "kld_sigmoid_tiny"]
    rising = divergences if kind == "shuffle" else ["fad_tiny", "kad_tiny", *divergences]
    for figure in rising:
        assert strictly_rising([one[figure] for one in found]), figure
    for figure in ("onset_recall", "onset_f1"):
        assert strictly_rising([-one[figure] for one in found]), figure
    if kind == "shuffle":
        assert [one["fad_tiny"] for one in found] == pytest.approx([0] * len(found), abs=1e-6)


STRENGTHS = {"noise": [30, 20, 10, 0], "band": [8000, 4000, 2000, 1000], "shuffle": [0.25, 0.5, 1.0]}
"""dB of signal over noise; Hz of the highest frequency left; share of sounds that have another's name."""
METRICS_THAT_MOVE = ["fad", "kad", "kld", "kld_epsilon", "kld_sigmoid", "synchrony"]


def strictly_rising(numbers):
    return all(left < right for left, right in itertools.pairwise(numbers))


RECIPES = sorted((Path(__file__).parents[2] / "configs" / "evaluate").glob("*.yaml"))
CHOICES = ["judges", "metrics", "pair", "seconds", "short", "remove_mean", "inception_splits", "seed"]
"""What numbers depend on, and a protocol therefore fixes."""


@pytest.mark.parametrize("name", ["vab", "av_benchmark", "demo"])
def test_a_protocol_fixes_every_choice(name, monkeypatch):
    (path,) = [path for path in RECIPES if path.stem == name]
    settings = yaml.safe_load(path.read_text())
    assert list(settings) == CHOICES
    check_metrics(settings["metrics"], settings["judges"])
    assert set(settings["judges"]) <= set(JUDGES)


def test_the_protocol_of_av_benchmark_has_its_audio_columns():
    (path,) = [path for path in RECIPES if path.stem == "av_benchmark"]
    metrics = set(yaml.safe_load(path.read_text())["metrics"])
    assert metrics == {"fad_vggish"} | {
        f"{metric}_{judge}" for metric in ("fad", "kld", "inception_score") for judge in ("panns_16k", "passt")
    }


@pytest.mark.parametrize("rate", [44_100, 16_000])
def test_the_mean_is_the_whole_files_and_goes_before_resampling_and_cutting(tmp_path, rate):
    # Its second half is 0.4 higher: the mean of the first second alone would be 0.
    sound = 0.1 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    sound[rate:] += 0.4
    soundfile.write(tmp_path / "sound.wav", np.stack([sound, sound], 1), rate, "FLOAT")
    # Around the file is silence, of which the resampler is given some.
    before = np.zeros(rate, np.float32)
    expected = resample(np.concatenate([before, sound - np.float32(0.2)]), rate, 16_000)[16_000:32_000]
    listening = Listening((16_000,), 1.0, "keep", True)
    got = decode(tmp_path / "sound.wav", listening).waveforms[16_000]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert float(got.mean()) == pytest.approx(-0.2, abs=1e-3)
    assert "mean over the whole file subtracted before resampling" in listening.mono


def test_a_protocol_by_the_command_line(real, made, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["--real", str(real), "--generated", str(made), "--out", str(out), "--num_workers", "0"]
    main(
        [
            "evaluate",
            "--config",
            str(RECIPES[0].with_name("demo.yaml")),
            *arguments,
            "--seconds",
            "2",
            "--metrics",
            "kld",
        ]
    )
    report = json.loads(out.read_text())
    assert list(report["figures"]) == ["kld_tiny"]
    assert report["figures"]["kld_tiny"]["card"]["length"].startswith("first 2 s")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    assert stop.value.code == 2


@pytest.mark.parametrize("words", [["kld,fad"], ["kld", "fad"], ["[kld, fad]"]])
def test_lists_on_the_command_line(real, made, tmp_path, words):
    report = tmp_path / "report.json"
    options = ["--seconds", "4", "--num_workers", "0", "--metrics", *words, "--out", str(report)]
    main(["evaluate", "--real", str(real), "--generated", str(made), *options])
    assert set(json.loads(report.read_text())["figures"]) == {"fad_tiny", "kld_tiny"}


def test_names_are_not_taken_for_markup(real, tmp_path, capsys):
    folder = write_folder(tmp_path / "gen[v2]" / "[" / "b]")
    measure(real, folder, tmp_path / "report.json", metrics="fad")
    assert "gen[v2]" in capsys.readouterr().out


def test_an_empty_reference_is_refused(made, tmp_path):
    (tmp_path / "empty.npz").touch()
    with pytest.raises(UserError, match=r"empty\.npz is not a reference"):
        measure(tmp_path / "empty.npz", made, tmp_path / "report.json")


def test_a_sound_that_no_judge_can_hear_is_named(real, tmp_path):
    folder = write_folder(tmp_path / "made")
    soundfile.write(folder / "s02.wav", np.full(64000, 1e30, np.float32), 16000, "FLOAT")
    with pytest.raises(UserError, match=r"s02\.wav: makes judge tiny give numbers that are not finite"):
        measure(real, folder, tmp_path / "report.json")
    measured = measure(real, folder, tmp_path / "report.json", on_error="skip")
    whole = [path for path in sorted(folder.iterdir()) if path.stem != "s02"]
    assert measured.figures["fad_tiny"].card.num_generated == len(whole)
    assert measured.figures["fad_tiny"].value == pytest.approx(0, abs=1e-9)


def test_labels_of_other_sounds_are_refused_before_the_work(real, tmp_path):
    (tmp_path / "labels.csv").write_text("file,labels\nother.wav,bell\n")
    with pytest.raises(UserError, match="must list them as 's00'"):
        measure(real, real, tmp_path / "report.json", labels=str(tmp_path / "labels.csv"))
