"""Published lists of data sets become lists to extract."""

import csv
import wave
from collections import Counter

import numpy as np
import pytest

from vab.commands.extract import extract
from vab.commands.lists import audioset, speech_commands, vggsound
from vab.data.official import KEYWORDS, WORDS
from vab.data.records import ShardDataset
from vab.spec import UserError


def write_wav(path, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.random.default_rng(0).normal(0, 3000, round(16000 * seconds)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(sound.tobytes())


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def words(tmp_path):
    """Speech Commands, of which there is very little."""
    root, test = tmp_path / "data" / "v1", tmp_path / "data" / "test"
    for word in (*WORDS, "bed", "cat"):
        for speaker in ("train", "val", "test"):
            write_wav(root / word / f"{speaker}_nohash_0.wav")
    write_wav(root / "_background_noise_" / "pink.wav", 12.5)
    for name, speaker in (("validation", "val"), ("testing", "test")):
        listed = [f"{word}/{speaker}_nohash_0.wav" for word in (*WORDS, "bed", "cat")]
        (root / f"{name}_list.txt").write_text("\n".join(listed) + "\n")
    for name in KEYWORDS:
        write_wav(test / name / "one.wav")
    return root, test


def test_twelve_classes_of_speech_commands(words, tmp_path, capsys):
    root, test = words
    speech_commands(str(root), str(tmp_path / "lists"), str(test))
    assert "--segment_seconds 1" in capsys.readouterr().out
    found = {part: rows(tmp_path / "lists" / f"{part}.csv") for part in ("train", "val", "test")}
    counts = {part: Counter(row["labels"] for row in listed) for part, listed in found.items()}
    one_of_each = dict.fromkeys(WORDS, 1)
    assert counts["train"] == {**one_of_each, "_unknown_": 2, "_silence_": 10}
    assert counts["val"] == {**one_of_each, "_unknown_": 2, "_silence_": 2}
    assert counts["test"] == dict.fromkeys(KEYWORDS, 1)
    silence = {part: [row["start"] for row in found[part] if row["labels"] == "_silence_"] for part in ("train", "val")}
    assert silence["val"] == ["0", "10"]
    assert sorted(map(int, silence["train"] + silence["val"])) == list(range(12))
    assert not any("test_nohash" in row["file"] for part in ("train", "val") for row in found[part])

    media, names = str(words[0].parent), str(tmp_path / "lists" / "classes.txt")
    extract(
        str(tmp_path / "lists" / "val.csv"), str(tmp_path / "shards"), media_root=media, vocabulary=names,
        without_video="keep", segment_seconds=1.0, num_workers=0,
    )  # fmt: skip
    dataset = ShardDataset(tmp_path / "shards")
    assert len(dataset) == 14
    assert tuple(dataset.labels) == KEYWORDS
    assert dataset.spec.segment_seconds == 1


def test_speech_commands_that_is_not_whole_is_refused(words, tmp_path):
    root, _ = words
    with pytest.raises(UserError, match=r"is not the test set .*: it lacks _unknown_, _silence_"):
        speech_commands(str(root), str(tmp_path / "lists"), str(root.parent / "v1"))
    with pytest.raises(UserError, match="put both into one folder"):
        speech_commands(str(root), str(tmp_path / "lists"), str(tmp_path / "elsewhere" / "x"))
    (root / "testing_list.txt").unlink()
    with pytest.raises(UserError, match=r"it lacks testing_list\.txt"):
        speech_commands(str(root), str(tmp_path / "lists"))


def test_audiosets_segments(tmp_path, capsys):
    table = tmp_path / "balanced_train_segments.csv"
    table.write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=4, num_segs=4\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr"\n'
        '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"\n'
        'Y1234567890, 30.000, 40.000, "/m/09x0r"\n'
        '-1nilez17Dg, 30.000, 40.000, "/m/09x0r"\n'
    )
    media = tmp_path / "media"
    for name in ("--4gqARaEJE.mp4", "deep/Y-0RWZT-miFs.wav", "Y1234567890_30.000.mkv", "notes.txt"):
        path = media / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    out = tmp_path / "train.csv"
    audioset(str(table), str(media), str(out))
    assert [(row["file"], row["labels"], row["start"], row["id"]) for row in rows(out)] == [
        ("--4gqARaEJE.mp4", "/m/068hy;/m/07q6cd_;/m/0bt9lr", "", "--4gqARaEJE"),
        ("deep/Y-0RWZT-miFs.wav", "/m/03v3yw", "", "-0RWZT-miFs"),
        ("Y1234567890_30.000.mkv", "/m/09x0r", "", "Y1234567890"),
    ]
    assert (tmp_path / "train.missing.txt").read_text() == "-1nilez17Dg\n"
    assert "1 that are listed have no file" in capsys.readouterr().out
    audioset(str(table), str(media), str(out), whole_videos=True, overwrite=True)
    assert [row["start"] for row in rows(out)] == ["0", "420", "30"]

    (media / "--4gqARaEJE.wav").touch()
    with pytest.raises(UserError, match="are both of --4gqARaEJE: keep one"):
        audioset(str(table), str(media), str(out), overwrite=True)
    table.write_text("--4gqARaEJE, 0.000, 10.000, /m/068hy,/m/07q6cd_\n")
    with pytest.raises(UserError, match="line 1: not of the form YTID"):
        audioset(str(table), str(media), str(out), overwrite=True)
    table.write_text('abcdefghijk, 0.000, 10.000, "/m/068hy"\n')
    with pytest.raises(UserError, match="has none of the 1 files"):
        audioset(str(table), str(media), str(out), overwrite=True)


def test_vggsounds_splits(tmp_path):
    table = tmp_path / "vggsound.csv"
    table.write_text(
        '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,"bird chirping, tweeting",train\n'
        "--56QUhyDQM,185,x,train\n"
    )
    media = tmp_path / "media"
    media.mkdir()
    (media / "---g-f_I2yQ_000001.mp4").touch()
    (media / "--0PQM4-hqg_30.mp4").touch()
    vggsound(str(table), str(media), str(tmp_path / "lists"))
    assert [row["labels"] for row in rows(tmp_path / "lists" / "train.csv")] == ["bird chirping, tweeting"]
    assert [row["file"] for row in rows(tmp_path / "lists" / "test.csv")] == ["---g-f_I2yQ_000001.mp4"]
    assert (tmp_path / "lists" / "missing.txt").read_text() == "--56QUhyDQM_185\n"
    with pytest.raises(UserError, match="there already"):
        vggsound(str(table), str(media), str(tmp_path / "lists"))
    table.write_text("---g-f_I2yQ,1,people marching,validation\n")
    with pytest.raises(UserError, match="line 1: not of the form"):
        vggsound(str(table), str(media), str(tmp_path / "lists"), overwrite=True)
