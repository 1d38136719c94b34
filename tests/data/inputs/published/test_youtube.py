"""AudioSet's and VGGSound's lists become lists to extract."""

import shlex
from pathlib import Path

import pytest

from command_line import is_whole, parsed
from listed import column, rows, touch
from small_media import tone, video
from vab.cli import main
from vab.commands.datasets import audioset, vggsound
from vab.commands.extract import extract
from vab.data.inputs.published import youtube
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def segments(tmp_path):
    """A list as AudioSet publishes it."""
    table = tmp_path / "balanced_train_segments.csv"
    table.write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=4, num_segs=4\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr"\n'
        '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"\n'
        'Y1234567890, 30.000, 40.000, "/m/09x0r"\n'
        '-1nilez17Dg, 30.000, 40.000, "/m/09x0r"\n'
    )
    return table


@pytest.fixture
def sounds(tmp_path):
    """A list as VGGSound publishes it."""
    table = tmp_path / "vggsound.csv"
    table.write_text(
        '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,"bird chirping, tweeting",train\n'
        "--56QUhyDQM,185,x,train\n2XQzahrQ_tE,25,sea waves,train\n2XQzahrQ_tE,75,sea waves,test\n"
    )
    return table


def test_audiosets_segments(segments, tmp_path, capsys):
    names = ("--4gqARaEJE.mp4", "deep/Y-0RWZT-miFs.wav", "Y1234567890_30.000.mkv", "notes.txt", ".hidden/x.mp4")
    media, out = touch(tmp_path / "media", *names), tmp_path / "train.csv"
    audioset(str(segments), str(media), str(out))
    assert [(row["file"], row["labels"], row["start"], row["id"]) for row in rows(out)] == [
        ("--4gqARaEJE.mp4", "/m/068hy;/m/07q6cd_;/m/0bt9lr", "", "--4gqARaEJE"),
        ("deep/Y-0RWZT-miFs.wav", "/m/03v3yw", "", "-0RWZT-miFs"),
        ("Y1234567890_30.000.mkv", "/m/09x0r", "", "Y1234567890"),
    ]
    assert (tmp_path / "train.missing.txt").read_text() == "-1nilez17Dg\n"
    assert "1 that are listed have no file" in capsys.readouterr().out
    audioset(str(segments), str(media), str(out), whole_videos=True, overwrite=True)
    assert column(out, "start") == ["0", "420", ""]  # the last is named as a segment

    touch(media, "-1nilez17Dg.flac")
    audioset(str(segments), str(media), str(out), overwrite=True)
    assert not (tmp_path / "train.missing.txt").exists()
    touch(media, "--4gqARaEJE.wav")
    with pytest.raises(UserError, match=r"^1 listed segments have more than one file, such as --4gqARaEJE.mp4 and"):
        audioset(str(segments), str(media), str(out), overwrite=True)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--4gqARaEJE, 0.000, 10.000, /m/068hy,/m/07q6cd_\n", "line 1: not of the form YTID"),
        ('--4gqARaEJE, soon, 10.000, "/m/068hy"\n', "line 1: a start is seconds, 0 or more, got 'soon'"),
        ('--4gqARaEJE, -1, 10.000, "/m/068hy"\n', "line 1: a start is seconds, 0 or more, got '-1'"),
        ('abcdefghijk, 0.000, 10.000, "/m/068hy"\n', "has none of the 1 files that .* lists, such as abcdefghijk"),
        ("", "has none of the 0 files"),
        ('--4gqARaEJE, 0.000, 10.000, "/m/0', "cannot be read as CSV in UTF-8: a double quote is not closed"),
        ("--4gqARaEJE, 0, 10, /m/a\n--4gqARaEJE, 0, 10, /m/b\n", "line 2: --4gqARaEJE at 0 s is there before, with"),
    ],
)
def test_lines_that_are_not_audiosets_are_named(line, complaint, tmp_path):
    (tmp_path / "list.csv").write_text(line)
    media = touch(tmp_path / "media", "--4gqARaEJE.mp4")
    with pytest.raises(UserError, match=complaint):
        audioset(str(tmp_path / "list.csv"), str(media), str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_vggsounds_splits(sounds, tmp_path, capsys):
    media = touch(tmp_path / "media", "---g-f_I2yQ_000001.mp4", "--0PQM4-hqg_30.mp4", "2XQzahrQ_tE.mp4", "holiday.mp4")
    vggsound(str(sounds), str(media), str(tmp_path / "lists"))
    assert column(tmp_path / "lists" / "train.csv", "labels") == ["bird chirping, tweeting"]
    assert column(tmp_path / "lists" / "train.csv", "id") == ["--0PQM4-hqg_000030"]
    assert column(tmp_path / "lists" / "test.csv", "file") == ["---g-f_I2yQ_000001.mp4"]
    missing = (tmp_path / "lists" / "missing.txt").read_text().split()
    assert missing == ["--56QUhyDQM_000185", "2XQzahrQ_tE_000025", "2XQzahrQ_tE_000075"]
    printed = capsys.readouterr().out
    assert "several entries: name them ID_START, or say --whole_videos true: 1, such as 2XQzahrQ_tE.mp4\n" in printed
    assert "such as holiday.mp4\n" in printed
    vggsound(str(sounds), str(media), str(tmp_path / "lists"), whole_videos=True, overwrite=True)
    assert column(tmp_path / "lists" / "train.csv", "start") == ["", "25"]
    assert column(tmp_path / "lists" / "test.csv", "start") == ["", "75"]

    with pytest.raises(UserError, match="there already"):
        vggsound(str(sounds), str(media), str(tmp_path / "lists"))
    sounds.write_text("---g-f_I2yQ,1,people marching,validation\n")
    with pytest.raises(UserError, match="line 1: not of the form"):
        vggsound(str(sounds), str(media), str(tmp_path / "lists"), overwrite=True)
    sounds.write_text("---g-f_I2yQ.mp4,people marching\n")
    with pytest.raises(UserError, match=r"line 1: '---g-f_I2yQ.mp4' is not YTID_START.mp4"):
        vggsound(str(sounds), str(media), str(tmp_path / "lists"), overwrite=True)


@pytest.mark.parametrize(
    "names",
    [
        ("---g-f_I2yQ_000001.mp4", "--0PQM4-hqg_000030.mkv"),
        ("test/---g-f_I2yQ_1.mp4", "train/--0PQM4-hqg_30.webm"),
        ("people marching/---g-f_I2yQ_1_11.mp4", "bird chirping, tweeting/--0PQM4-hqg_30_40.mp4"),
        ("---g-f_I2yQ_1000_11000.wav", "--0PQM4-hqg_30000_40000.flac"),
        ("Y---g-f_I2yQ_1.000_11.000.wav", "Y--0PQM4-hqg.wav"),
        ("a/---g-f_I2yQ_1.0-11.0.MP4", "a/--0PQM4-hqg.mp4"),
    ],
)
def test_layouts_that_people_have(names, sounds, segments, tmp_path):
    media = touch(tmp_path / "media", *names)
    found = youtube.vggsound(sounds, media, names)
    listed = [(row.file, row.start, row.id) for part in ("test", "train") for row in found.rows[part]]
    assert listed == [(names[0], None, "---g-f_I2yQ_000001"), (names[1], None, "--0PQM4-hqg_000030")]
    assert found.unused == {}
    assert len(found.missing) == 3
    vggsound(str(sounds), str(media), str(tmp_path / "lists"))
    assert column(tmp_path / "lists" / "test.csv", "file") == [names[0]]


def test_a_list_of_one_split_keeps_its_name_and_is_not_lost(tmp_path, capsys):
    table = tmp_path / "test.csv"
    table.write_text('---g-f_I2yQ_000001.mp4,people marching\n--0PQM4-hqg_000030.mp4,"bird chirping, tweeting"\n')
    media = touch(tmp_path / "media", "--0PQM4-hqg_30_40.mp4")
    (tmp_path / "stat.csv").write_text('people marching,1,people\n"bird chirping, tweeting",1,animals\n')
    vggsound(str(table), str(media), str(tmp_path / "lists"))
    assert rows(tmp_path / "lists" / "test.csv") == [
        {
            "file": "--0PQM4-hqg_30_40.mp4",
            "labels": "bird chirping, tweeting",
            "start": "",
            "id": "--0PQM4-hqg_000030",
        }
    ]
    assert f"--vocabulary {tmp_path / 'stat.csv'} " in capsys.readouterr().out
    with pytest.raises(UserError, match="is one of the inputs, which would be lost"):
        vggsound(str(table), str(media), str(tmp_path), overwrite=True)


def test_what_is_printed_can_be_typed(segments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "my media").mkdir()
    video(tmp_path / "my media" / "--4gqARaEJE.mp4", 3.0, fps=8)
    write_wav(tmp_path / "my media" / "Y-0RWZT-miFs.wav", tone(2.0), 16_000)
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/07q6cd_,Squeak\n'
        "2,/m/0bt9lr,Dog\n3,/m/03v3yw,Keys\n"
    )
    audioset(str(segments), str(tmp_path / "my media"), str(tmp_path / "new" / "train.csv"))
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(" to extract, by vab ")[2])
    settings = parsed(command, capsys)
    assert is_whole(command, settings)
    assert (settings["segments"], settings["segment_seconds"], settings["codec"]) == ("centre", 10.0, "audiogen_16khz")
    main([*command[:-2], "--codec=tiny", "--vision=tiny", "--segment_seconds=1", "--num_workers=0",
          "--out", str(tmp_path / "shards")])  # fmt: skip
    dataset = ShardDataset(tmp_path / "shards")
    assert len(dataset) == 1
    assert dataset.record(0)["labels"] == ["Domestic animals, pets", "Squeak", "Dog"]
    assert (dataset.record(0)["id"], dataset.record(0)["start_seconds"]) == ("--4gqARaEJE", 1.0)


def test_a_whole_video_is_cut_where_the_list_says(tmp_path):
    table = tmp_path / "vggsound.csv"
    table.write_text("abcdefghijk,1,x,train\nabcdefghijk,2,x,train\n")
    (tmp_path / "media").mkdir()
    video(tmp_path / "media" / "abcdefghijk.mp4", 3.0, fps=8)
    vggsound(str(table), str(tmp_path / "media"), str(tmp_path / "lists"), whole_videos=True)
    extract(str(tmp_path / "lists" / "train.csv"), str(tmp_path / "shards"), media_root=str(tmp_path / "media"),
            segment_seconds=1.0, segments="centre", num_workers=0)  # fmt: skip
    dataset = ShardDataset(tmp_path / "shards")
    records = [(dataset.record(number)["id"], dataset.record(number)["start_seconds"]) for number in range(2)]
    assert records == [("abcdefghijk_000001", 1.0), ("abcdefghijk_000002", 2.0)]


# ---- validation apart from the test ----

IDS = [f"{number:011d}" for number in range(200)]


def many(tmp_path, per_video=2):
    """VGGSound's and AudioSet's lists of many videos, several segments of each; and a folder with files of all."""
    table, other = tmp_path / "vggsound.csv", tmp_path / "segments.csv"
    starts = [10 * number for number in range(per_video)]
    both = [(video, start) for start in starts for video in IDS]
    table.write_text("".join(f"{video},{start},x,{'test' if video < IDS[50] else 'train'}\n" for video, start in both))
    other.write_text("".join(f'{video}, {start}.0, {start + 10}.0, "/m/a"\n' for video, start in both))
    return table, other, touch(tmp_path / "media", *(f"{video}_{start}.mp4" for video, start in both))


def videos(path):
    """Which videos a list has segments of."""
    return {name[:11] for name in column(path, "file")}


def test_a_share_of_the_recordings_is_held_out_by_their_ids_alone(tmp_path, capsys):
    table, other, media = many(tmp_path)
    flags = ["datasets", "vggsound", "--list", str(table), "--media", str(media), "--val_share", "0.2"]
    main([*flags, "--out", str(tmp_path / "lists")])
    train, val, test = (videos(tmp_path / "lists" / f"{part}.csv") for part in ("train", "val", "test"))
    assert (train | val, test) == ({*IDS[50:]}, {*IDS[:50]})  # the test stays what it was
    assert not train & val
    assert 15 <= len(val) <= 45  # of 150
    rows_of = {part: len(rows(tmp_path / "lists" / f"{part}.csv")) for part in ("train", "val", "test")}
    assert rows_of == {"train": 2 * len(train), "val": 2 * len(val), "test": 100}
    printed = capsys.readouterr().out
    for part, count in rows_of.items():
        assert f"{part}.csv: {count} to extract, by vab extract " in printed

    # Files that vanish take nothing from one side to the other, and another list has the same recordings there.
    for name in sorted(media.iterdir())[::3]:
        name.unlink()
    main([*flags, "--out", str(tmp_path / "fewer")])
    assert videos(tmp_path / "fewer" / "val.csv") <= val
    assert videos(tmp_path / "fewer" / "train.csv") <= train
    main(["datasets", "audioset", "--list", str(other), "--media", str(media), "--val_share", "0.2",
          "--out", str(tmp_path / "audioset" / "balanced_train.csv")])  # fmt: skip
    assert videos(tmp_path / "audioset" / "balanced_val.csv") & {*IDS[50:]} <= val
    assert not videos(tmp_path / "audioset" / "balanced_train.csv") & val

    # A larger share has all of a smaller one.
    main([*flags[:-1], "0.5", "--out", str(tmp_path / "half")])
    assert videos(tmp_path / "fewer" / "val.csv") < videos(tmp_path / "half" / "val.csv")


def test_without_a_share_lists_are_what_they_were(tmp_path):
    table, other, media = many(tmp_path)
    vggsound(str(table), str(media), str(tmp_path / "lists"))
    audioset(str(other), str(media), str(tmp_path / "audioset" / "train.csv"))
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == ["test.csv", "train.csv"]
    assert [path.name for path in (tmp_path / "audioset").iterdir()] == ["train.csv"]
    assert videos(tmp_path / "lists" / "train.csv") == {*IDS[50:]}


@pytest.mark.parametrize("name", ["train", "val", "eval_segments"])
def test_where_the_held_out_part_of_a_list_goes(tmp_path, name):
    _, other, media = many(tmp_path)
    listed = other.rename(tmp_path / "val.csv")
    audioset(str(listed), str(media), str(tmp_path / "out" / f"{name}.csv"), val_share=0.5)
    expected = {"train": "val.csv", "val": "val_val.csv", "eval_segments": "eval_segments_val.csv"}[name]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.csv", expected}


@pytest.mark.parametrize(
    ("share", "complaint"),
    [
        (0.0, "must be between 0 and 1"),
        (1.0, "must be between 0 and 1"),
        (2.0, "must be between 0 and 1"),
        (-0.1, "must be between 0 and 1"),
        (float("nan"), "must be between 0 and 1"),
        (1e-9, "val_share 1e-09 of the 300 segments of .* leaves nothing to validate on"),
        (1 - 1e-9, "leaves nothing to train on"),
    ],
)
def test_shares_that_make_no_sense_are_refused(tmp_path, share, complaint):
    table, other, media = many(tmp_path)
    with pytest.raises(UserError, match=complaint):
        vggsound(str(table), str(media), str(tmp_path / "lists"), val_share=share)
    with pytest.raises(UserError, match=complaint.replace("300", "400")):
        audioset(str(other), str(media), str(tmp_path / "train.csv"), val_share=share)
    assert not (tmp_path / "train.csv").exists()
    table.write_text("".join(line for line in table.open() if line.endswith("test\n")))
    with pytest.raises(UserError, match=r"has no part 'train' to divide, only test: leave val_share out"):
        vggsound(str(table), str(media), str(tmp_path / "lists"), val_share=0.5)


def test_the_official_test_list(shared_data, tmp_path):
    table = shared_data / "lists" / "vggsound_test.csv"
    found = youtube.vggsound(table, Path("media"), ["glLQrEijrKg_300.mp4", "2XQzahrQ_tE.mp4", "LDoXsip0BEQ.mp4"])
    assert list(found.rows) == ["vggsound_test"]
    assert [(row.id, row.labels) for row in found.rows["vggsound_test"]] == [
        ("glLQrEijrKg_000300", ("playing hammond organ",)),
        ("LDoXsip0BEQ_000177", ("parrot talking",)),
    ]
    assert len(found.missing) == 15_446 - 2
    assert [number for number, _ in found.unused.values()] == [1]
