"""ESC-50 becomes a list to extract."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from command_line import parsed
from listed import column, touch
from small_media import tone
from vab.cli import main
from vab.commands.datasets import esc50
from vab.data.inputs.listing import find_sources
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError

ROOT = Path(__file__).parents[4]
FOLD = re.compile(yaml.safe_load((ROOT / "configs" / "data" / "base.yaml").read_text())["fold_pattern"])


@pytest.fixture
def root(tmp_path):
    """ESC-50 with one recording of a class in each fold, as published."""
    folder = tmp_path / "ESC-50-master"
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, name, esc10 in ((0, "dog", True), (14, "chirping_birds", False), (10, "rain", True)):
            lines.append(f"{fold}-1000{target}-A-{target}.wav,{fold},{target},{name},{esc10},1000{target},A")
            touch(folder, f"audio/{fold}-1000{target}-A-{target}.wav")
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_classes_and_folds(root, tmp_path, capsys):
    esc50(str(root), str(tmp_path / "lists"))
    table = tmp_path / "lists" / "esc50.csv"
    assert column(table, "labels") == ["dog", "chirping_birds", "rain"] * 5
    assert column(table, "file")[1] == "audio/1-100014-A-14.wav"
    names = [Path(file).with_suffix("").as_posix() for file in column(table, "file")]
    assert [FOLD.search(name)[1] for name in names] == [str(fold) for fold in range(1, 6) for _ in range(3)]
    assert (tmp_path / "lists" / "classes.txt").read_text().split() == ["dog", "rain", "chirping_birds"]
    assert not (tmp_path / "lists" / "missing.txt").exists()
    assert "15 to extract, by vab extract" in capsys.readouterr().out

    esc50(str(root), str(tmp_path / "ten"), esc10=True)
    assert column(tmp_path / "ten" / "esc10.csv", "labels") == ["dog", "rain"] * 5
    assert (tmp_path / "ten" / "classes.txt").read_text().split() == ["dog", "rain"]


def test_what_is_printed_makes_a_record_of_each_recording(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (root / "audio").iterdir():
        if path.name.startswith("1-"):
            path.unlink()
        else:
            write_wav(path, tone(5.3), 16_000)
    (root / "audio" / "1-10000-A-0.ogg").write_bytes(b"")  # another suffix, and broken
    esc50(str(root), str(tmp_path / "lists"))
    assert (tmp_path / "lists" / "missing.txt").read_text().split() == ["1-100014-A-14.wav", "1-100010-A-10.wav"]
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(" to extract, by vab ")[2])
    assert parsed(command, capsys)["segment_seconds"] == 5.0
    main([*command[:-2], "--codec=tiny", "--vision=tiny", "--num_workers=0", "--out", str(tmp_path / "shards")])
    assert "1 unreadable: audio/1-10000-A-0.ogg" in capsys.readouterr().out
    dataset = ShardDataset(tmp_path / "shards")
    assert len(dataset) == 12
    assert dataset.labels == ("dog", "rain", "chirping_birds")
    assert {FOLD.search(str(dataset.record(number)["id"]))[1] for number in range(12)} == {"2", "3", "4", "5"}


def test_the_layout_by_class_has_its_folds_too(shared_data):
    sources = find_sources(shared_data / "esc10", "folder")
    folds = [FOLD.search(source.id)[1] for source in sources]
    assert [folds.count(str(fold)) for fold in range(1, 6)] == [80] * 5
    assert len(sources.labels) == 10


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("2-1-A-0.wav,1,0,dog,True,1,A", "line 2: 2-1-A-0.wav is not of fold 1"),
        ("1-1-A-0.wav,1,x,dog,True,1,A", "or its target no number"),
        ("1-1-A-0.wav,1,0,dog,yes,1,A", "esc10 is True or False, got 'yes'"),
        ("1-1-A-0.wav,1,0,dog,True,1,A\n2-1-A-0.wav,2,0,cat,True,1,A", "line 3: target 0 is cat, before dog"),
        ("1-1-A-0.wav,1,0,dog,True", "line 2: 5 cells for the 7 columns"),
        ("1-9-A-0.wav,1,0,dog,True,9,A", "has none of the 1 files .*, such as 1-9-A-0.wav"),
    ],
)
def test_another_table_is_refused(line, complaint, root, tmp_path):
    table = root / "meta" / "esc50.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=complaint):
        esc50(str(root), str(tmp_path / "lists"))
    table.unlink()
    with pytest.raises(UserError, match=r"is not ESC-50: it lacks meta/esc50\.csv"):
        esc50(str(root), str(tmp_path / "lists"))
