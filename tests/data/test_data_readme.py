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
from vab.data.records import ShardDataset

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "data" / "README.md").read_text()
LINES = [line for line in code_of(TEXT).splitlines() if line.startswith("vab ")]


def test_there_are_commands_for_each_data_set():
    assert set(re.findall(r"^vab lists (\w+)", "\n".join(LINES), re.MULTILINE)) == set(COMMANDS["lists"][1])
    assert len(LINES) > 30


def flags(line):
    """The words of a command, and what follows each."""
    words = shlex.split(line, comments=True)
    return words, dict(itertools.pairwise(words))


def test_lists_and_shards_that_are_read_were_written_before():
    written = {"data/lists/audioset/train.csv"}  # by cat
    for line in LINES:
        words, given = flags(line)
        for name in (given.get("--media", ""), given.get("--vocabulary", ""), given.get("--keys", "")):
            assert not name.startswith("data/lists/") or {name, str(Path(name).parent)} & written, line
        assert words[1:3] != ["shards", "verify"] or words[-1] in written, line
        written |= {given["--out"]} if "--out" in given else set()


def test_recipes_read_the_shards_that_were_written(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VAB_DATA", raising=False)
    written = {flags(line)[1].get("--out") for line in LINES}
    for line in LINES:
        words, _ = flags(line)
        if words[1] in ("fit", "folds", "test"):
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
