import json

import numpy as np
import pytest

from small_media import tone, video
from vab.commands.extract import extract
from vab.data.inputs.listing import find_sources
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.verify import verify
from vab.spec import UserError

SETTINGS = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / "a.mp4", 0.64)
    write_wav(tmp_path / "in" / "b.wav", tone(0.64), 16_000)
    write_wav(tmp_path / "in" / "c.wav", tone(0.3), 16_000)
    write_wav(tmp_path / "in" / "d.wav", tone(0.1), 16_000)
    write_wav(tmp_path / "in" / "e.wav", np.zeros(16_000, np.float32), 16_000)
    return tmp_path / "in"


def test_sound_alone_is_kept_when_asked_for(folder, tmp_path):
    report = extract(str(folder), str(tmp_path / "kept"), without_video="keep", **SETTINGS)
    assert (report.inputs, report.kept, report.records) == (5, 3, 3)
    assert report.reasons == {"too_short": 1, "silent": 1}
    dataset = ShardDataset(tmp_path / "kept", check_crc=True)
    batch = dataset.read([0, 1, 2])
    assert [dataset.record(number)["id"] for number in range(3)] == ["a", "b", "c"]
    assert batch.frames.tolist() == [8, 0, 0]
    assert batch.steps.tolist() == [32, 32, 15]
    assert batch.ragged
    assert batch.features[0].abs().max() > 0
    assert not batch.features[1:].any()
    assert dataset.without_video() == 2
    assert len(set(batch.source.tolist())) == 3
    assert verify(tmp_path / "kept") == []


def test_sound_alone_is_left_out_with_its_reason_otherwise(folder, tmp_path):
    report = extract(str(folder), str(tmp_path / "out"), **SETTINGS)
    assert report.reasons == {"no_video": 4}
    with pytest.raises(UserError, match="without_video: None != keep"):
        extract(str(folder), str(tmp_path / "out"), without_video="keep", **SETTINGS)


def test_one_recording_has_one_source_number(tmp_path):
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "long.wav", tone(2.0), 16_000)
    write_wav(tmp_path / "in" / "other.wav", tone(2.0, 700.0), 16_000)
    extract(str(tmp_path / "in"), str(tmp_path / "s"), without_video="keep", **SETTINGS)
    dataset = ShardDataset(tmp_path / "s")
    sources = dataset.read(range(len(dataset))).source.tolist()
    names = [dataset.record(number)["source"] for number in range(len(dataset))]
    assert len(set(zip(sources, names, strict=True))) == len(set(sources)) == 2
    assert len(sources) == 6


def test_chosen_records_are_a_data_set_of_their_own(tmp_path, shards):
    dataset = ShardDataset(shards / "train")
    whole, keys = dataset.manifest_hash, [dataset.key(number) for number in (5, 2, 9)]
    read = dataset.read([5, 2, 9])
    dataset.choose([5, 2, 9])
    assert len(dataset) == 3
    assert [dataset.key(number) for number in range(3)] == keys
    again = dataset.read([0, 1, 2])
    assert again.codes.equal(read.codes)
    assert again.labels.equal(read.labels)
    assert again.index.tolist() == [0, 1, 2]
    assert dataset.manifest_hash != whole
    with pytest.raises(IndexError):
        dataset.read([3])
    with pytest.raises(UserError, match=r"no record of .* was chosen"):
        dataset.choose([])


def test_an_official_split_list_is_read_as_it_is(tmp_path):
    text = 'x_000010.mp4, "bird chirping, tweeting"\ny_000020.mp4,a; b\n'
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "videos").mkdir()
    first, second = find_sources(tmp_path / "list.csv", root=tmp_path / "videos")
    assert first.labels == ("bird chirping, tweeting",)
    assert second.labels == ("a; b",)
    assert first.path == tmp_path / "videos" / "x_000010.mp4"
    assert first.id == "x_000010"
    (tmp_path / "list.csv").write_text("x_000010.mp4,bird chirping, tweeting\n")
    with pytest.raises(UserError, match="needs a column 'file'"):
        find_sources(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("x.mp4,bird\ny.mp4,bird, tweeting\n")
    with pytest.raises(UserError, match="line 2: more values than columns: a label with a comma in it"):
        find_sources(tmp_path / "list.csv")
    with pytest.raises(UserError, match="media_root none: there is no such folder"):
        find_sources(tmp_path / "list.csv", root="none")


def test_labels_are_checked_against_a_vocabulary(folder, tmp_path):
    (tmp_path / "list.csv").write_text("file,labels\nin/b.wav,/m/2\nin/c.wav,Bell\n")
    (tmp_path / "names.csv").write_text('index,mid,display_name\n0,/m/1,Bell\n1,/m/2,"Drum, snare"\n2,/m/3,Horn\n')
    settings = SETTINGS | {"without_video": "keep", "vocabulary": str(tmp_path / "names.csv")}
    extract(str(tmp_path / "list.csv"), str(tmp_path / "s"), **settings)
    dataset = ShardDataset(tmp_path / "s")
    assert dataset.labels == ("Bell", "Drum, snare", "Horn")
    assert [dataset.label_names(number) for number in range(2)] == [["Drum, snare"], ["Bell"]]
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["labels"] == ["Bell", "Drum, snare", "Horn"]
    (tmp_path / "list.csv").write_text("file,labels\nin/b.wav,Bel\n")
    with pytest.raises(UserError, match=r"no class 'Bel' among the 3 of .*names\.csv; the nearest is 'Bell'"):
        extract(str(tmp_path / "list.csv"), str(tmp_path / "t"), **settings)
