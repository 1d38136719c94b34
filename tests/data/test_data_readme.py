"""What data/README.md says adds up; that it can be typed: tests/test_readme.py."""

import itertools
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import yaml

from command_line import code_of, parsed
from small_media import video
from vab.cli import COMMANDS
from vab.commands.extract import extract
from vab.data.reading.dataset import ShardDataset
from vab.training.recipes import load

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "data" / "README.md").read_text()
BLOCKS = code_of(TEXT)
LINES = [line for line in BLOCKS.splitlines() if line.startswith("vab ")]


def test_there_are_commands_for_each_data_set():
    assert set(re.findall(r"^vab datasets (\w+)", "\n".join(LINES), re.MULTILINE)) == set(COMMANDS["datasets"][1])
    assert len(LINES) > 30


def flags(line):
    """The words of a command, and what follows each."""
    words = shlex.split(line, comments=True)
    return words, dict(itertools.pairwise(words))


def test_lists_and_shards_that_are_read_were_written_before():
    written = {*re.findall(r" > (data/lists/\S+)", BLOCKS)}  # by cat
    for line in LINES:
        words, given = flags(line)
        for name in (given.get("--media", ""), given.get("--vocabulary", ""), given.get("--keys", "")):
            assert not name.startswith("data/lists/") or {name, str(Path(name).parent)} & written, line
        assert words[1:3] != ["shards", "verify"] or words[-1] in written, line
        written |= {given["--out"]} if "--out" in given else set()
        if words[1] == "datasets" and "--val_share" in given:
            written |= {given["--out"].replace("train.csv", "val.csv")}


def parts(path):
    """The folders that a file of configs/data names, by part, as from the repository's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VAB_DATA", raising=False)
        named = load(path.read_text(), path.parent)
    train = named["train"] if isinstance(named["train"], dict) else [named["train"]]
    # What a mapping's key interpolates is filled in when the data set is opened.
    folders = {"train": [folder.replace("${oc.env:VAB_DATA,data}", "data") for folder in train]}
    return folders | {part: [named[part]] for part in ("val", "test") if named[part]}


DATA_SETS = {path.stem: parts(path) for path in sorted((ROOT / "configs/data").glob("*.yaml")) if path.stem != "base"}


def test_no_recipe_chooses_its_checkpoint_by_the_test_set_of_any():
    tests = {folder for named in DATA_SETS.values() for folder in named.get("test", [])}
    measured = re.findall(r"vab (?:retrieve|test) .*?--data(?:\.test)? (\S+)", BLOCKS)
    tests |= {*measured}
    assert {"data/vggsound/test", "data/audioset/eval", "data/speech_commands/test", "data/msrvtt/test"} <= tests
    for name, named in DATA_SETS.items():
        assert not {*named["val"], *named["train"]} & tests, name
        assert all(not folder.endswith(("/test", "/eval")) for folder in named["val"]), name
        assert name == "esc50" or not {*named["val"]} & {*named["train"]}, name  # divided by folds
    for line in LINES:  # nor is another val given on the way
        given = flags(line)[1]
        assert given.get("--data.val", "data/esc10") == "data/esc10", line


@pytest.mark.parametrize("name", [name for name in DATA_SETS if not name.startswith("demo")])
def test_the_commands_make_each_folder_that_a_recipe_names(name):
    made = {flags(line)[1]["--out"] for line in LINES if line.startswith("vab extract ")}
    assert {folder for folders in DATA_SETS[name].values() for folder in folders} <= made


def test_what_a_benchmark_reports_chooses_its_checkpoint_and_a_fold_chooses_none():
    monitors = {}
    for path in (ROOT / "configs/classify").glob("*.yaml"):
        trainer = path.parent / yaml.safe_load(path.read_text())["trainer"]
        trainer = load(trainer.read_text(), trainer.parent)
        (kept,) = (one for one in trainer["callbacks"] if one["class_path"] == "vab.callbacks.Checkpoints")
        monitors[path.stem] = kept["init_args"].get("monitor")
        assert kept["init_args"]["save_top_k"] == (1 if monitors[path.stem] else 0)
    assert monitors == {
        "vggsound": "val/top_1", "audioset_20k": "val/map", "audioset_2m": "val/map", "esc50": None,
        "speech_commands": "val/top_1",
    }  # fmt: skip


def test_data_that_a_flag_names_were_written(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VAB_DATA", raising=False)
    written = {flags(line)[1].get("--out") for line in LINES}
    for line in LINES:
        words, _ = flags(line)
        if words[1] in ("fit", "folds", "test") and "--data." in line:
            data = parsed(words[1:], capsys)["data"]
            assert {data["train"], data["val"], data["test"]} - {None} <= written, line


def record_bytes(levels, steps, frames, channels, json_bytes):
    """Of a record in a tar: three files, each with a head and filled up."""
    sizes = (128 + 2 * levels * steps, 128 + 2 * frames * channels, json_bytes)
    return sum(512 + -(-size // 512) * 512 for size in sizes)


def test_a_record_has_as_many_bytes_as_the_arithmetic_says(tmp_path):
    (tmp_path / "media").mkdir()
    for number in range(3):
        video(tmp_path / "media" / f"{number}.mp4", 2.0, seed=number)
    extract(str(tmp_path / "media"), str(tmp_path / "out"), segment_seconds=1.0, video_fps=8.0, num_workers=0)
    spec = ShardDataset(tmp_path / "out").spec
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    texts = [member.size for member in members if member.name.endswith(".json")]
    expected = [record_bytes(spec.num_codebooks, spec.num_steps, spec.num_frames, spec.feature_dim, n) for n in texts]
    end = max(member.offset_data + -(-member.size // 512) * 512 for member in members)
    assert (len(texts), max(texts) < 512) == (6, True)
    assert sum(expected) == end
    assert 0 <= (tmp_path / "out" / "shard-000000.tar").stat().st_size - end <= 2 * tarfile.RECORDSIZE


def test_the_table_of_sizes_adds_up():
    fps = {
        name: yaml.safe_load((ROOT / f"configs/extract/{name}.yaml").read_text())["video_fps"]
        for name in ("paper", "dac")
    }
    rows = re.findall(
        r"^\| [^|]+ \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE
    )
    assert len(rows) == 6
    for row in rows:
        seconds, records, *stated = (float(cell.replace(",", "")) for cell in row)
        for levels, name, size, gigabytes in ((4, "paper", *stated[:2]), (12, "dac", *stated[2:])):
            steps, frames = round(seconds * 50), round(seconds * fps[name])
            assert size == record_bytes(levels, steps, frames, 768, 511)
            assert gigabytes == pytest.approx(records * size / 1e9, abs=0.005001)
