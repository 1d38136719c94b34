"""Speech Commands becomes lists to extract."""

import shlex
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from command_line import parsed
from listed import rows
from vab.cli import main
from vab.commands.datasets import speech_commands
from vab.data.inputs.published.keywords import KEYWORDS, WORDS
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError


def write_wav(path, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.random.default_rng(0).normal(0, 3000, round(16000 * seconds)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(sound.tobytes())


@pytest.fixture
def words(tmp_path):
    """Speech Commands, of which there is very little."""
    root, test = tmp_path / "data" / "v1", tmp_path / "data" / "test"
    for word in (*WORDS, "bed", "cat"):
        for speaker in ("train", "val", "test"):
            write_wav(root / word / f"{speaker}_nohash_0.wav", 0.4 if word in ("yes", "bed") else 1.0)
    write_wav(root / "_background_noise_" / "pink.wav", 12.5)
    for name, speaker in (("validation", "val"), ("testing", "test")):
        listed = [f"{word}/{speaker}_nohash_0.wav" for word in (*WORDS, "bed", "cat")]
        (root / f"{name}_list.txt").write_text("\n".join(listed) + "\n")
    for name in KEYWORDS:
        write_wav(test / name / "one.wav")
    return root, test


def test_twelve_classes_of_speech_commands(words, tmp_path, capsys, monkeypatch):
    root, test = words
    monkeypatch.chdir(Path(__file__).parents[4])  # where the recipes are
    speech_commands(str(root), str(tmp_path / "lists"), str(test))
    printed = capsys.readouterr().out.splitlines()
    says = {line.split(": ")[0]: shlex.split(line.partition("by vab ")[2]) for line in printed}
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

    command = says[str(tmp_path / "lists" / "val.csv")]
    assert parsed(command, capsys)["codec"] == "audiogen_16khz"
    tiny = ["--codec=tiny", "--vision=tiny", "--num_workers=0", "--out", str(tmp_path / "shards")]
    main([*command[:-2], *tiny])
    dataset = ShardDataset(tmp_path / "shards")
    assert len(dataset) == 14
    assert tuple(dataset.labels) == KEYWORDS
    assert dataset.spec.segment_seconds == 1
    assert dataset.read(range(14)).steps.tolist().count(20) == 2  # recordings of 0.4 s


def test_lists_that_are_there_are_replaced_if_asked(words, tmp_path):
    places = str(words[0]), str(tmp_path / "lists")
    speech_commands(*places)
    (tmp_path / "lists" / "train.csv").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        speech_commands(*places)
    speech_commands(*places, overwrite=True)
    assert rows(tmp_path / "lists" / "train.csv")[0]["file"] != "mine"


def test_speech_commands_that_is_not_whole_is_refused(words, tmp_path):
    root, _ = words
    with pytest.raises(UserError, match=r"is not the test set .*: it lacks _unknown_, _silence_"):
        speech_commands(str(root), str(tmp_path / "lists"), str(root.parent / "v1"))
    with pytest.raises(UserError, match="put both into one folder"):
        speech_commands(str(root), str(tmp_path / "lists"), str(tmp_path / "elsewhere" / "x"))
    (root / "testing_list.txt").unlink()
    with pytest.raises(UserError, match=r"it lacks testing_list\.txt"):
        speech_commands(str(root), str(tmp_path / "lists"))
