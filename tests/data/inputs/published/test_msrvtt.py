"""MSR-VTT becomes a list to extract."""

import json
from pathlib import Path

import pytest

from listed import column, rows, touch
from small_media import video
from vab.cli import main
from vab.commands.datasets import msrvtt
from vab.data.inputs.published.msrvtt import CATEGORIES
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.labels import read_keys
from vab.spec import UserError

TWEAK = str(Path(__file__).parents[4] / "configs" / "extract" / "tweak" / "centre.yaml")


@pytest.fixture
def table(tmp_path):
    """Its list, as published."""
    videos = [
        {"id": number, "video_id": f"video{number}", "category": category, "url": "https://x", "start time": 1.5,
         "end time": 12.0, "split": split}
        for number, category, split in ((0, 9, "train"), (6513, 0, "validate"), (7010, 19, "test"), (7011, "4", "test"),
                                        (7012, 6, "test"))
    ]  # fmt: skip
    content = {"info": {}, "videos": videos, "sentences": [{"sen_id": 0, "video_id": "video0", "caption": "a car"}]}
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    return str(tmp_path / "MSRVTT_data.json")


def test_a_split_with_its_categories(table, tmp_path, capsys):
    media, out = touch(tmp_path / "MSRVTT", "all/video7011.mp4", "all/video7010.mp4", "video0.mp4"), tmp_path / "t.csv"
    msrvtt(table, str(media), str(out), split="test")
    assert rows(out) == [
        {"file": "all/video7010.mp4", "labels": "advertisement", "start": "", "id": "video7010"},
        {"file": "all/video7011.mp4", "labels": "news/events/politics", "start": "", "id": "video7011"},
    ]
    assert (tmp_path / "t.missing.txt").read_text() == "video7012\n"
    assert "2 to extract, by vab extract" in capsys.readouterr().out
    assert len(set(CATEGORIES)) == 20
    assert read_keys(str(out), "id", None, None) == ("video7010", "video7011")
    for split, complaint in ((None, "train, validate: give one of them as --split, none"), ("val", "got 'val'")):
        with pytest.raises(UserError, match=complaint):
            msrvtt(table, str(media), str(out), split=split, overwrite=True)


def test_a_csv_is_one_split_without_categories(tmp_path):
    lines = 'key,vid_key,video_id,sentence\nret0,msr9,video9,"a man, driving"\nret1,msr7,video7,x\nret2,msr9,video9,y\n'
    (tmp_path / "1ka.csv").write_text(lines)
    media, out = touch(tmp_path / "media", "video7.mp4", "video9.webm", "video70.mp4"), tmp_path / "out" / "1ka.csv"
    msrvtt(str(tmp_path / "1ka.csv"), str(media), str(out))
    assert column(out, "file") == ["video9.webm", "video7.mp4"]
    assert column(out, "labels") == ["", ""]
    with pytest.raises(UserError, match="list of one split: leave --split out"):
        msrvtt(str(tmp_path / "1ka.csv"), str(media), str(tmp_path / "other.csv"), split="test")
    touch(media, "sound/video9.wav")
    with pytest.raises(UserError, match=r"^1 listed names have more than one file"):
        msrvtt(str(tmp_path / "1ka.csv"), str(media), str(tmp_path / "other.csv"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[1]", "has no list 'videos'"),
        ('{"videos": [{"id": 1}]}', "of tables with a 'video_id'"),
        ("video1,video2\n", "cannot be read as JSON, and is not called .csv"),
        ('{"videos": [{"video_id": "v", "category": 20, "split": "test"}]}', "v has category 20, there are 0 to 19"),
        ('{"videos": [{"video_id": "v", "category": "a", "split": "test"}]}', "v has category 'a', there are 0 to 19"),
        ('{"videos": [{"video_id": "v", "category": 2, "split": "test"}]}', "has none of the 1 files .* such as v$"),
    ],
)
def test_another_list_is_refused(content, complaint, tmp_path):
    (tmp_path / "list.json").write_text(content)
    media = touch(tmp_path / "media", "video1.mp4")
    with pytest.raises(UserError, match=complaint):
        msrvtt(str(tmp_path / "list.json"), str(media), str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_videos_without_sound_are_counted_by_the_extraction(table, tmp_path, capsys):
    (tmp_path / "media").mkdir()
    video(tmp_path / "media" / "video7010.mp4", 3.0, fps=8)
    video(tmp_path / "media" / "video7011.mp4", 3.0, sound=False, fps=8)
    msrvtt(table, str(tmp_path / "media"), str(tmp_path / "test.csv"), split="test")
    main(["extract", "--config", TWEAK, "--media", f"{tmp_path}/test.csv", "--media_root", f"{tmp_path}/media",
          "--segment_seconds=1", "--num_workers=0", "--out", f"{tmp_path}/shards"])  # fmt: skip
    assert "1 no_audio: video7011.mp4" in capsys.readouterr().out
    dataset = ShardDataset(tmp_path / "shards")
    assert [dataset.record(number)["id"] for number in range(len(dataset))] == ["video7010"]
    assert dataset.record(0)["start_seconds"] == 1.0
