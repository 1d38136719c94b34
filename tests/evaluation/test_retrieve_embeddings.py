import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vab import cli
from vab.commands.retrieve import retrieve
from vab.metrics.recall import chance_table, match_ranks, retrieval_table
from vab.spec import UserError

PROTOCOL = Path(__file__).parents[2] / "configs" / "evaluate" / "cav_mae_retrieval.yaml"


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """audio.npz and video.npz of 30 records, in unlike order, in the folder of the test; (audio, video) by key."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((30, 8)).astype(np.float32)
    video = (audio + rng.standard_normal((30, 8))).astype(np.float32)
    keys = np.array([f"clip_{number:03d}" for number in range(30)])
    order = rng.permutation(30)
    np.savez("audio.npz", keys=keys, embeddings=audio)
    np.savez("video.npz", keys=keys[order], embeddings=video[order])
    return dict(zip(keys.tolist(), zip(audio, video, strict=True), strict=True))


def expected(sides, keys):
    audio, video = (torch.from_numpy(np.stack([sides[key][side] for key in keys])) for side in (0, 1))
    table = retrieval_table(match_ranks(audio, video), match_ranks(video, audio))
    sure = [f"recall_at_{cut}" for cut in (1, 5, 10) if cut >= len(keys)]  # by chance, too
    return {name: float(value) for name, value in table.items() if name[:-4] not in sure}


def test_sides_are_paired_by_key(sides, capsys):
    report = retrieve(audio="audio.npz", video="video.npz", out="report.json")
    assert json.loads(Path("report.json").read_text()) == report
    assert report["figures"] == expected(sides, sorted(sides))
    assert report["figures"]["recall_at_1_a2v"] not in (0, 1)
    assert report["N"] == 30
    assert report["gallery_sha256"] == hashlib.sha256("\n".join(sorted(sides)).encode()).hexdigest()
    assert (report["similarity"], report["missing"]) == ("cosine", 0)
    assert "count against" in report["ties"]
    printed = capsys.readouterr().out
    assert f"{100 * report['figures']['recall_at_5_v2a']:.1f}" in printed
    assert report["gallery_sha256"][:12] in printed


def with_recordings(sides, recordings, other=None):
    """The same files with the array recordings, by key."""
    for side, name in enumerate(("audio", "video")):
        told = recordings if other is None or name == "audio" else other
        keys = sorted(sides)[:: 1 - 2 * side]
        rows = np.stack([sides[key][side] for key in keys])
        np.savez(f"{name}.npz", keys=np.array(keys), x=rows, recordings=np.array([told[key] for key in keys]))


def test_segments_of_one_recording_are_right_for_each_other(sides, capsys):
    recordings = {key: f"video_{number // 3}" for number, key in enumerate(sorted(sides))}
    with_recordings(sides, recordings)
    report = retrieve(audio="audio.npz", video="video.npz", out="report.json")
    printed = capsys.readouterr().out
    audio, video = (torch.from_numpy(np.stack([sides[key][side] for key in sorted(sides)])) for side in (0, 1))
    groups = torch.arange(30) // 3
    ranks = [match_ranks(*way, groups=groups) for way in ((audio, video), (video, audio))]
    table = {name: float(value) for name, value in retrieval_table(*ranks).items()}
    assert report["figures"] == table
    assert report["chance"] == chance_table(groups)
    assert (report["by"], report["recordings"], report["N"]) == ("recording", 10, 30)
    assert json.loads(Path("report.json").read_text())["by"] == "recording"
    assert "by recording (10 recordings)" in printed
    row = next(line for line in printed.splitlines() if "chance" in line)
    assert f"{100 * report['chance']['recall_at_1']:.1f}" in row
    by_segment = retrieve(audio="audio.npz", video="video.npz", by="segment")
    assert by_segment["figures"] == expected(sides, sorted(sides)) != report["figures"]
    assert by_segment["chance"]["recall_at_1"] == pytest.approx(1 / 30)
    assert by_segment["by"] == "segment"
    assert "by segment (10 recordings)" in capsys.readouterr().out


def test_without_recordings_it_is_by_segment_and_says_so(sides, capsys):
    report = retrieve(audio="audio.npz", video="video.npz")
    assert (report["by"], report["recordings"]) == ("segment", None)
    assert "by segment (recordings not known)" in capsys.readouterr().out


def test_recordings_that_differ_or_do_not_fit_are_refused(sides):
    first = {key: f"video_{number // 3}" for number, key in enumerate(sorted(sides))}
    with_recordings(sides, first, first | {"clip_004": "video_0"})
    with pytest.raises(UserError, match="name different recordings"):
        retrieve(audio="audio.npz", video="video.npz")
    np.savez("audio.npz", keys=np.arange(3), x=np.ones((3, 8)), recordings=np.array(["a"]))
    with pytest.raises(UserError, match="1 recordings and 3 embeddings"):
        retrieve(audio="audio.npz", video="audio.npz")


def test_rows_without_keys_are_paired_in_order(sides):
    keys = sorted(sides)
    for side, name in enumerate(("audio", "video")):
        np.save(f"{name}.npy", np.stack([sides[key][side] for key in keys]))
    report = retrieve(audio="audio.npy", video="video.npy")
    assert report["figures"] == expected(sides, keys)
    assert (report["gallery_sha256"], report["paired"]) == (None, "row by row")


LISTS = {
    "keys.txt": ("{0}\n{1}\n\n{2}\n", {}),
    "named.csv": ("id,label\n{0},a\n{1},b\n{2},b\n", {"key_column": "id"}),
    "bare.csv": ("{0},dog barking\n{1},rain\n{2},rain\n", {"key_column": "0"}),
    "plain.json": ('["{0}", "{1}", "{2}"]', {}),
    "tables.json": ('{{"data": [{{"video_id": "{0}"}}, {{"video_id": "{1}"}}, {{"video_id": "{2}"}}]}}', {}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_makes_the_gallery(sides, name):
    keys = ["clip_003", "clip_011", "clip_029"]
    text, options = LISTS[name]
    Path(name).write_text(text.format(*keys))
    report = retrieve(audio="audio.npz", video="video.npz", keys=name, **options)
    assert report["N"] == 3
    assert report["figures"] == expected(sides, keys)
    assert report["gallery_sha256"] == hashlib.sha256("\n".join(keys).encode()).hexdigest()
    assert report["list"]["file"] == name


def test_a_report_is_not_written_over(sides):
    Path("mine.json").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.json is there already"):
        retrieve(audio="audio.npz", video="video.npz", out="mine.json")
    assert Path("mine.json").read_text() == "mine"
    retrieve(audio="audio.npz", video="video.npz", out="mine.json", overwrite=True)
    assert json.loads(Path("mine.json").read_text())["N"] == 30


def test_missing_keys_stop_it_or_are_counted(sides):
    Path("keys.txt").write_text("clip_000\nother_1\nclip_001\nother_2\n")
    with pytest.raises(UserError, match=r"of 4 keys 2 are missing: audio.npz lacks 2 \(other_1, other_2\)"):
        retrieve(audio="audio.npz", video="video.npz", keys="keys.txt")
    report = retrieve(audio="audio.npz", video="video.npz", keys="keys.txt", on_error="skip")
    assert (report["N"], report["missing"], report["on_missing"]) == (2, 2, "skip")
    assert report["figures"] == expected(sides, ["clip_000", "clip_001"])


def test_a_key_of_one_side_alone_is_missing(sides):
    keys = sorted(sides)[:-1]
    np.savez("video.npz", keys=np.array(keys), embeddings=np.stack([sides[key][1] for key in keys]))
    with pytest.raises(UserError, match=r"video.npz lacks 1 \(clip_029\)"):
        retrieve(audio="audio.npz", video="video.npz")
    assert retrieve(audio="audio.npz", video="video.npz", on_error="skip")["figures"] == expected(sides, keys)


def _save(name, **arrays):
    np.savez(name, **arrays)
    return name


ONES = np.ones((3, 8))
BAD = [
    (lambda: {"audio": "absent.npz"}, "absent.npz: there is no such file"),
    (lambda: {"audio": _text("bad.npz", "no numbers")}, "bad.npz cannot be read"),
    (lambda: {"audio": _save("bad.npz", embeddings=ONES)}, "must hold the array keys"),
    (lambda: {"audio": _save("bad.npz", keys=np.array(["a", "b", "a"]), x=ONES)}, "1 keys are there more"),
    (lambda: {"audio": _save("bad.npz", keys=np.array(["a", "b"]), x=ONES)}, "2 keys and 3 embeddings"),
    (lambda: {"audio": _save("bad.npz", keys=np.array(["a", 1, "b"], dtype=object), x=ONES)}, "objects are not read"),
    (lambda: {"audio": _save("bad.npz", keys=np.arange(3), x=np.ones(3))}, r"embeddings are \(N, E\)"),
    (lambda: {"audio": _save("bad.npz", keys=np.arange(3), x=np.ones((3, 5)))}, "one width"),
    (lambda: {"audio": _save("bad.npz", keys=np.arange(3), x=ONES), "on_error": "skip"}, "at least 2 items, got 0"),
    (lambda: {"audio": _rows("bad.npy")}, "bad.npy has no keys and the other side has"),
    (lambda: {"audio": _rows("bad.npy"), "keys": _text("keys.txt", "a")}, "bad.npy has no keys to find"),
    (lambda: {"audio": _rows("bad.npy"), "video": _rows("other.npy", 4)}, "equally many: bad.npy has 3"),
    (lambda: {"audio": _rows("bad.npy", fill=np.nan), "video": _rows("v.npy")}, r"not finite \(row 0, row 1, row 2\)"),
    (lambda: {"audio": _rows("bad.npy", fill=0), "video": _rows("v.npy")}, "no direction"),
    (lambda: {"keys": "absent.txt"}, "absent.txt cannot be read"),
    (lambda: {"keys": _text("keys.txt", "clip_000\nclip_001\nclip_000")}, r"more than once \(clip_000\)"),
    (lambda: {"keys": _text("keys.txt", "\n")}, "names no key"),
    (lambda: {"keys": _text("keys.txt", "a"), "key_column": "id"}, "has no columns"),
    (lambda: {"keys": _text("keys.csv", "id,label\nclip_000,a\n")}, "has the columns id, label: say which"),
    (lambda: {"keys": _text("keys.csv", "id,label\nclip_000,a\n"), "key_column": "key"}, "no text in column 'key'"),
    (lambda: {"keys": _text("keys.json", "{")}, "not JSON"),
    (lambda: {"keys": _text("keys.json", '{"data": [1]}')}, "must be a list"),
    (lambda: {"key_column": "id"}, "give it as --keys FILE"),
    (lambda: {"per_class": 5}, "--per_class needs --class_column"),
    (lambda: {"expected": 31}, "the gallery has 30 items"),
    (lambda: {"query": "x.mp4", "checkpoint": "x.ckpt"}, "--query does not go with --audio and --video"),
    (lambda: {"checkpoint": "x.ckpt"}, "--checkpoint does not go with --audio and --video"),
    (lambda: {"save_embeddings": "e.npz"}, "--save_embeddings keeps both sides"),
    (lambda: {"video": None}, "--audio FILE with --video FILE"),
    (lambda: {"audio": None, "video": None, "embeddings": _rows("one.npy")}, "one.npy has no keys"),
    (
        lambda: {"audio": None, "video": None, "embeddings": "audio.npz"},
        "the arrays keys, audio and video, it holds keys",
    ),
    (lambda: {"out": "report.txt"}, r"must end in \.json"),
    (lambda: {"out": "absent/report.json"}, "not a folder to write in"),
]


def _text(name, text):
    Path(name).write_text(text)
    return name


def _rows(name, count=3, fill=1.0):
    np.save(name, np.full((count, 8), fill))
    return name


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_a_mistake_is_one_clear_line(sides, arguments, words):
    with pytest.raises(UserError, match=words) as refused:
        retrieve(**{"audio": "audio.npz", "video": "video.npz", "out": "report.json"} | arguments())
    assert "\n" not in str(refused.value)
    assert not Path("report.json").exists()


def _official(count=1545):
    """Embeddings and a list in the form of the official one."""
    rng = np.random.default_rng(0)
    keys = np.array([f"id{number:08d}_000010" for number in range(count)])
    audio = rng.standard_normal((count, 4))
    np.savez("audio.npz", keys=keys, embeddings=audio)
    np.savez("video.npz", keys=keys, embeddings=audio + 0.1 * rng.standard_normal((count, 4)))
    return [{"video_id": key, "wav": "x.wav", "labels": f"vgg_{row // 5}"} for row, key in enumerate(keys.tolist())]


def _run(*options):
    arguments = ["retrieve", "--config", str(PROTOCOL), "--audio", "audio.npz", "--video", "video.npz"]
    cli.main([*arguments, "--keys", "list.json", *options])


def test_the_protocol_is_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = _official()
    _text("list.json", json.dumps({"data": entries}))
    _run("--out", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert (report["N"], report["per_class"], report["on_missing"]) == (1545, 5, "stop")
    assert 0 < report["figures"]["recall_at_1_a2v"] < 1
    _text("list.json", json.dumps({"data": entries[1:]}))
    with pytest.raises(SystemExit) as stop:
        _run()
    assert stop.value.code == 2
    assert "list.json must have 5 keys of each class; 1 differ (vgg_0: 4)" in capsys.readouterr().err
    _text("list.json", json.dumps({"data": entries[5:]}))
    with pytest.raises(SystemExit):
        _run()
    assert "the gallery has 1540 items, --expected 1545" in capsys.readouterr().err


def test_the_official_list_is_read(tmp_path, monkeypatch, shared_data):
    monkeypatch.chdir(tmp_path)
    path = shared_data / "lists" / "vggsound_retrieval_5_per_class.json"
    keys = np.array([entry["video_id"] for entry in json.loads(path.read_text())["data"]])
    side = np.random.default_rng(0).standard_normal((len(keys), 4))
    np.savez("audio.npz", keys=keys, embeddings=side)
    np.savez("video.npz", keys=keys[::-1], embeddings=side[::-1])
    _text("list.json", path.read_text())
    _run("--out", "report.json")
    assert json.loads(Path("report.json").read_text())["figures"]["recall_at_1_v2a"] == 1
