import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from small_media import tone, video
from tasks_help import saved
from tone_shards import LABELS, short_spec
from vab.backbone import Backbone
from vab.commands.classify import classify
from vab.commands.extract import extract
from vab.commands.retrieve import retrieve
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.evaluation.embedding import embed_file, load_encoders
from vab.evaluation.retrieval.results import Hit, results_page
from vab.frozen.codec import load_codec
from vab.metrics.recall import match_ranks, retrieval_table
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, load_task

SPEC = short_spec()


def backbone():
    torch.manual_seed(1)
    made = Backbone(SPEC, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    made.set_codebooks(load_codec("tiny").codebooks())
    return made


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    return saved(AlignTask(backbone(), embedding_dim=8), tmp_path_factory.mktemp("align") / "a.ckpt")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for number in range(4):
        video(folder / f"{number}.mp4", SPEC.segment_seconds, seed=number)
    write_wav(folder / "sound.wav", tone(SPEC.segment_seconds, 700.0), 16_000)
    video(folder / "silent.mp4", SPEC.segment_seconds, sound=False, seed=9)
    return folder


@pytest.fixture(scope="module")
def data(media, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "s"
    extract(
        str(media), str(out), segment_seconds=SPEC.segment_seconds, video_fps=SPEC.video_fps, min_seconds=0.1,
        without_video="keep", num_workers=0, silence_db=-100.0,
    )  # fmt: skip
    return out


def test_a_file_is_embedded_as_its_record_is(align, media, data):
    task, dataset = load_task(align), ShardDataset(data)
    encoders = load_encoders(task.spec, torch.device("cpu"), audio=True, video=True)
    places = {dataset.record(number)["id"]: number for number in range(len(dataset))}
    assert set(places) == {"0", "1", "2", "3", "sound"}
    for name in ("0", "3"):
        audio, seen = task(dataset.read([places[name]]))
        torch.testing.assert_close(
            embed_file(task, encoders, media / f"{name}.mp4", "audio"), audio[0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            embed_file(task, encoders, media / f"{name}.mp4", "video"), seen[0], atol=1e-5, rtol=0
        )
    heard = task.embed_audio(dataset.read([places["sound"]]).codes)
    torch.testing.assert_close(embed_file(task, encoders, media / "sound.wav", "audio"), heard[0], atol=1e-5, rtol=0)


def test_a_file_is_cut_and_encoded_bit_for_bit_as_extraction_does(align, media, tmp_path):
    (tmp_path / "long").mkdir()
    video(tmp_path / "long" / "x.mp4", 2.6 * SPEC.segment_seconds, seed=5)
    extract(
        str(tmp_path / "long"), str(tmp_path / "s"), segment_seconds=SPEC.segment_seconds, video_fps=SPEC.video_fps,
        min_seconds=SPEC.segment_seconds - 0.02, num_workers=0, silence_db=-100.0,
    )  # fmt: skip
    batch = ShardDataset(tmp_path / "s").read(range(2))
    encoders = load_encoders(load_task(align).spec, torch.device("cpu"), audio=True, video=True)
    for audio, seen in ((True, True), (True, False), (False, True)):
        (segments,) = encoders.encode(tmp_path / "long" / "x.mp4", audio=audio, video=seen)
        assert {len(part) for part in segments if part is not None} == {2}
        if audio:
            assert torch.equal(segments.codes, batch.codes)
            assert torch.equal(segments.steps, batch.steps)
        if seen:
            assert torch.equal(segments.features, batch.features)
            assert torch.equal(segments.frames, batch.frames)
    (silent,) = encoders.encode(media / "silent.mp4", audio=False, video=True)
    assert len(silent.features) == 1
    with pytest.raises(UserError, match="has no sound track"):
        next(encoders.encode(media / "silent.mp4", audio=True, video=False))
    with pytest.raises(UserError, match="has no video track"):
        next(encoders.encode(media / "sound.wav", audio=True, video=True))
    video(tmp_path / "short.mp4", 0.2)  # shorter than a last segment may be, but all that there is
    (short,) = encoders.encode(tmp_path / "short.mp4", audio=True, video=True)
    assert short.frames.tolist() == [2]


def test_figures_of_shards_and_of_saved_embeddings_agree(align, data, tmp_path, capsys):
    kept, out = str(tmp_path / "e.npz"), str(tmp_path / "r.json")
    report = retrieve(align, str(data), out=out, save_embeddings=kept, batch_size=3, device="cpu")
    printed = capsys.readouterr().out
    assert "retrieval among 4" in printed
    assert "1 records without video are not in the gallery" in printed
    assert report["N"] == 4
    assert report["without_video"] == 1
    assert json.loads(Path(out).read_text())["figures"] == report["figures"]
    again = retrieve(embeddings=kept)
    assert again["figures"] == report["figures"]
    assert again["gallery_sha256"] == report["gallery_sha256"]
    with np.load(kept) as content:
        assert content["audio"].shape == content["video"].shape == (4, 8)
        assert set(json.loads(str(content["about"]))) == {"vab", "checkpoint_sha256", "data_sha256"}


def test_segments_of_one_file_are_right_for_each_other(align, tmp_path, capsys):
    for number in range(3):
        video(tmp_path / "long" / f"{number}.mp4", 2 * SPEC.segment_seconds, seed=number)
    extract(
        str(tmp_path / "long"), str(tmp_path / "s"), segment_seconds=SPEC.segment_seconds, video_fps=SPEC.video_fps,
        min_seconds=0.1, num_workers=0, silence_db=-100.0,
    )  # fmt: skip
    kept = str(tmp_path / "e.npz")
    report = retrieve(align, str(tmp_path / "s"), save_embeddings=kept, device="cpu")
    assert (report["by"], report["recordings"], report["N"]) == ("recording", 3, 6)
    assert "by recording (3 recordings)" in capsys.readouterr().out
    dataset = ShardDataset(tmp_path / "s")
    with torch.no_grad():
        audio, seen = load_task(align)(dataset.read(range(6)))
    ids = [dataset.record(number)["id"] for number in range(6)]
    groups = torch.tensor([sorted(set(ids)).index(name) for name in ids])
    ranks = [match_ranks(*way, groups=groups) for way in ((audio, seen), (seen, audio))]
    table = {name: float(value) for name, value in retrieval_table(*ranks).items()}
    assert report["figures"] == pytest.approx({name: table[name] for name in report["figures"]})
    again = retrieve(embeddings=kept)
    assert (again["figures"], again["by"], again["chance"]) == (report["figures"], "recording", report["chance"])
    by_segment = retrieve(embeddings=kept, by="segment")
    assert by_segment["chance"]["recall_at_1"] == pytest.approx(1 / 6)
    assert report["chance"]["recall_at_1"] == pytest.approx(2 / 6)


def test_a_list_makes_the_gallery(align, data, tmp_path):
    (tmp_path / "keys.txt").write_text("0\n2\n3\n")
    assert retrieve(align, str(data), keys=str(tmp_path / "keys.txt"), expected=3)["N"] == 3
    (tmp_path / "keys.txt").write_text("0\n2\nother\n")
    with pytest.raises(UserError, match="of 3 keys 1 are missing"):
        retrieve(align, str(data), keys=str(tmp_path / "keys.txt"))
    assert retrieve(align, str(data), keys=str(tmp_path / "keys.txt"), on_error="skip")["missing"] == 1
    (tmp_path / "keys.txt").write_text("0\n0\n")
    with pytest.raises(UserError, match="1 keys are there more than once"):
        retrieve(align, str(data), keys=str(tmp_path / "keys.txt"))


@pytest.mark.parametrize("place", ["data", "media"])
def test_a_query_finds_itself_by_the_other_side(align, media, data, tmp_path, capsys, place):
    where = {"data": str(data)} if place == "data" else {"media": str(media)}
    page = tmp_path / "p.html"
    hits = retrieve(align, query=str(media / "1.mp4"), top=3, page=str(page), device="cpu", **where)
    printed = capsys.readouterr().out
    assert "sounds nearest to the picture of 1.mp4" in " ".join(printed.split())
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert hits[0].cosine >= hits[1].cosine >= hits[2].cosine
    by_sound = retrieve(align, query=str(media / "sound.wav"), top=9, **where)
    assert len(by_sound) == (4 if place == "data" else 5)  # videos; the silent one is no record
    text = page.read_text()
    assert text.count("<li>") == 3
    assert ("data:audio/wav;base64," in text) == (place == "data")


def test_a_query_of_a_silent_video_and_one_by_the_sound_of_a_video(align, media, data):
    assert len(retrieve(align, str(data), query=str(media / "silent.mp4"), top=2)) == 2
    by_picture = retrieve(align, str(data), query=str(media / "0.mp4"), top=4)
    by_sound = retrieve(align, str(data), query=str(media / "0.mp4"), query_by="audio", top=4)
    assert [hit.cosine for hit in by_picture] != [hit.cosine for hit in by_sound]
    with pytest.raises(UserError, match=r"silent\.mp4: has no sound to search by"):
        retrieve(align, str(data), query=str(media / "silent.mp4"), query_by="audio")


def test_what_cannot_be_retrieved_is_one_clear_line(align, checkpoint, media, data, tmp_path):
    query = str(media / "0.mp4")
    np.savez(tmp_path / "wide.npz", keys=np.array(["a"]), audio=np.ones((1, 5)), video=np.ones((1, 5)))
    np.savez(tmp_path / "twice.npz", keys=np.array(["a", "a"]), audio=np.ones((2, 8)), video=np.ones((2, 8)))
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ({"checkpoint": checkpoint, "data": str(data)}, "is a checkpoint of PretrainTask: retrieve needs an AlignTask"),
        ({"checkpoint": align}, "give what is searched"),
        ({"data": str(data)}, "give the model that embeds"),
        ({"checkpoint": align, "media": str(media)}, "--media is searched with a --query"),
        ({"checkpoint": align, "data": str(data), "query": query, "top": 0}, "--top and --batch_size must be 1"),
        ({"checkpoint": align, "data": str(data), "query": "none.mp4"}, "there is no such file"),
        ({"checkpoint": align, "media": str(tmp_path / "empty"), "query": query}, "no media file in"),
        (
            {"checkpoint": align, "embeddings": str(tmp_path / "wide.npz"), "query": query},
            "have width 5, the ",
        ),
        ({"embeddings": str(tmp_path / "twice.npz")}, "1 keys are there more than once"),
        ({"checkpoint": align, "data": str(data), "top": 3}, "--top and --page are of a search"),
        ({"checkpoint": align, "data": str(data), "query": query, "by": "segment"}, "are of metrics"),
        ({"checkpoint": align, "media": str(media), "query": query, "keys": "k.txt"}, "records of --data"),
        ({"checkpoint": align, "media": str(media), "query": query, "save_embeddings": "e.npz"}, "keeps both sides"),
        ({"checkpoint": align, "data": str(data), "out": str(data / "manifest.json")}, "is there already"),
    ):
        with pytest.raises(UserError, match=words):
            retrieve(**arguments)


@pytest.mark.parametrize("inputs", ["audio_video", "audio", "video"])
def test_classes_of_files(media, tmp_path, capsys, inputs):
    path = saved(ClassifyTask(backbone(), [*LABELS, "third, odd"], inputs=inputs), tmp_path / "c.ckpt")
    (guess,) = classify(path, str(media / "0.mp4"), top=5)
    assert {name for name, _ in guess.classes} == {*LABELS, "third, odd"}
    values = [value for _, value in guess.classes]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1.0, abs=1e-5)
    capsys.readouterr()
    lacking = {"audio_video": 2, "audio": 1, "video": 1}[inputs]
    out = tmp_path / "c.csv"
    with pytest.raises(UserError, match=f"{lacking} of 6 files gave no result"):
        classify(path, str(media), top=1, out=str(out))
    rows = out.read_text().splitlines()
    assert rows[0] == "file,class_1,probability_1,error"
    assert len(rows) == 7
    assert sum(row.endswith("track") for row in rows) == lacking


def test_what_cannot_be_classified_is_one_clear_line(align, media, tmp_path):
    path = saved(ClassifyTask(backbone(), LABELS), tmp_path / "c.ckpt")
    (tmp_path / "x.txt").write_text("x")
    for arguments, words in (
        ((align, str(media)), "is a checkpoint of AlignTask: classify needs a ClassifyTask"),
        ((path, "none.mp4"), "there is no such file or folder"),
        ((path, str(tmp_path / "x.txt")), "is no media file"),
        ((path, str(media), 0), "--top must be 1 or more"),
        ((path, str(media / "silent.mp4")), "has no sound track"),
    ):
        with pytest.raises(UserError, match=words):
            classify(*arguments)


def test_names_on_the_page_are_text_and_no_markup(tmp_path):
    bad = "<b>a&b</b>\"'<script>"
    hit = Hit(1, bad, 0.5, f"{bad}.mp4", 0.0, (bad,))
    page = results_page(tmp_path / f"{bad}.mp4".replace("/", "_"), "video", [hit], 3, tmp_path, {})
    assert "<script>" not in page
    assert "a&b" not in page
    text = html.unescape(page)
    assert text.count(bad) == 3  # the name, its file and its class
    assert text.count(bad.replace("/", "_")) == 2  # title and heading
