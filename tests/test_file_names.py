"""Names of files as file systems allow them: as long as they may be, and of bytes that are not UTF-8."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from small_media import picture_hash, tone, video
from tasks_help import saved, small_backbone
from tone_shards import short_spec
from vab.cli import main
from vab.data.inputs.listing import find_sources
from vab.data.media.write import write_video, write_wav
from vab.data.reading.dataset import ShardDataset
from vab.files import MAX_NAME_BYTES, as_utf8, fitting_name, write_atomically
from vab.frozen.codec import load_codec
from vab.generation.outputs import many_jobs
from vab.generation.request import Request
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask

LONG = "long_" + "x" * (MAX_NAME_BYTES - len("long_.mp4"))
"""With .mp4 or .wav as long as may be."""
UMLAUTS = "ä" * ((MAX_NAME_BYTES - len(".mp4")) // 2)
"""As long, in half as many characters."""
NOT_UTF8 = os.fsdecode(b"bell\xe9_\xff")
NAMES = [LONG, UMLAUTS, NOT_UTF8]


def run(*arguments):
    """``vab`` as from a shell; its exit status."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def rows(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(["plain", *NAMES]):
        shutil.move(video(folder / "v.mp4", 0.5, seed=number), folder / f"{name}.mp4")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from small_media import save_model

    return save_model(tmp_path_factory.mktemp("model") / "last.ckpt", short_spec(), load_codec("tiny").codebooks())


def trained(kind, folder, **settings):
    task = kind(small_backbone(), **settings).eval()
    task.backbone.set_codebooks(load_codec("tiny").codebooks())
    return saved(task, folder / "last.ckpt")


@pytest.mark.parametrize("name", [f"{LONG}.mp4", f"{UMLAUTS}.mp4", f"{NOT_UTF8}.mp4", "x" * 255, "ä" * 127 + "x"])
def test_a_file_of_any_name_is_written_whole_and_leaves_nothing_else(name, tmp_path):
    write_atomically(tmp_path / name, b"content")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"content")]


@pytest.mark.parametrize("name", NAMES)
def test_media_of_any_name_are_written(name, tmp_path):
    write_wav(tmp_path / f"{name}.wav", tone(0.1), 16_000)
    write_video(tmp_path / f"{name}.mp4", np.zeros((2, 16, 16, 3), np.uint8), 10, None, 16_000)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.wav", f"{name}.mp4"}


def test_a_shortened_name_is_legal_its_own_and_still_readable():
    assert fitting_name("short", ".wav") == "short.wav"
    assert fitting_name("x" * 251, ".wav") == "x" * 251 + ".wav"
    for name in ("y" * 252, "ä" * 126, "y" * 1000, "a" + "ä" * 125 + "b", os.fsdecode(b"z\xff" * 126)):
        shortened = fitting_name(name, ".wav")
        assert MAX_NAME_BYTES - 4 < len(os.fsencode(shortened)) <= MAX_NAME_BYTES or "z" in name
        assert shortened.endswith(".wav")
        assert shortened[:50] == name.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")[:50]
        shortened.encode()  # no character is cut in two
        assert fitting_name(name + "!", ".wav") != shortened


def test_text_with_names_is_written_in_the_names_own_bytes(tmp_path):
    assert as_utf8("ä" + NOT_UTF8) == "ä".encode() + b"bell\xe9_\xff"
    assert as_utf8("\ud800") == b"\xed\xa0\x80"
    write_atomically(tmp_path / "t.txt", NOT_UTF8)
    assert (tmp_path / "t.txt").read_bytes() == b"bell\xe9_\xff"


def test_generate_makes_sound_for_names_of_any_length_and_bytes(videos, model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["generate", "--checkpoint", model, "--video", videos, "--out", out, "--num_variations", 2]
    assert run(*command) == 0
    assert "Traceback" not in capsys.readouterr().err
    table = rows(out / "generations.csv")
    assert [row["file"] for row in table[::2]] == sorted(path.name for path in videos.iterdir())
    assert [row["error"] for row in table] == [""] * 8
    assert len({row["output"] for row in table}) == 8
    assert {path.name for path in out.iterdir()} == {row["output"] for row in table} | {
        "generations.csv",
        "generations.json",
    }
    for row in table:
        assert picture_hash(videos / row["file"]) == picture_hash(out / row["output"])
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert run(*command) == 0  # all are there
    assert "0 made, 8 there before" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}


@pytest.mark.parametrize("name", NAMES)
def test_generate_writes_one_file_of_any_name_with_its_note(name, videos, model, tmp_path, capsys):
    target = tmp_path / f"{name}.wav"
    assert run("generate", "--checkpoint", model, "--video", videos / f"{name}.mp4", "--out", target) == 0
    assert target.is_file()
    (note,) = tmp_path.glob("*.json")
    assert json.loads(note.read_text())["name"] == f"{name}.mp4"
    assert name in (LONG, UMLAUTS) or note.name == f"{name}.wav.json"
    capsys.readouterr()


def test_an_output_that_the_file_system_cannot_name_is_that_inputs_own_error(
    videos, model, tmp_path, monkeypatch, capsys
):
    from vab.generation import recipe

    write = recipe.write_sound

    def narrow(job, *rest):
        if len(os.fsencode(job.target.name)) > 143:  # as on encrypted folders
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(job.target))
        return write(job, *rest)

    monkeypatch.setattr(recipe, "write_sound", narrow)
    assert run("generate", "--checkpoint", model, "--video", videos, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("takes no name this long") == 2
    errors = {row["file"]: row["error"] for row in rows(tmp_path / "out" / "generations.csv")}
    assert [name for name, error in errors.items() if not error] == [f"{NOT_UTF8}.mp4", "plain.mp4"]


def test_long_ids_of_a_list_become_legal_names(videos, tmp_path):
    listed = tmp_path / "list.csv"
    template = Request(Path(), "")
    listed.write_text(f"file,id\n{videos / 'plain.mp4'},{'a' * 300}/{'b' * 300}\n")
    (job,) = many_jobs(listed, template, tmp_path / "out", "wav", 1)
    job.target.parent.mkdir(parents=True)
    job.target.touch()
    assert job.target.relative_to(tmp_path / "out").parts[0].startswith("a" * 200)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two folders of sounds of the same names."""
    folders = [tmp_path_factory.mktemp(name) for name in ("real", "made")]
    for number, folder in enumerate(folders):
        for place, name in enumerate(["plain", *NAMES]):
            with (folder / f"{name}.wav").open("wb") as file:
                soundfile.write(file, tone(1.0, 200 + 100 * place + 3 * number), 16_000, format="WAV")
    return folders


def test_evaluate_compares_sounds_of_any_name(sounds, tmp_path, capsys):
    real, made = sounds
    out, table = tmp_path / "report.json", tmp_path / "files.csv"
    (made / "notes.txt").touch()
    command = ["evaluate", "--real", real, "--generated", made, "--out", out, "--csv", table, "--pair", "name"]
    assert run(*command, "--num_workers", 0, "--device", "cpu") == 0
    assert "Traceback" not in capsys.readouterr().err
    assert {row["file"] for row in rows(table)} == {"plain", *NAMES}
    assert json.loads(out.read_text())["real"]["files"] == 4


def test_evaluate_names_a_file_that_it_cannot_read(sounds, tmp_path, capsys):
    real, made = (shutil.copytree(folder, tmp_path / folder.name) for folder in sounds)
    (made / f"{NOT_UTF8}.wav").write_bytes(b"no sound")
    command = ["evaluate", "--real", real, "--generated", made, "--out", tmp_path / "r.json", "--on_error", "skip"]
    assert run(*command, "--num_workers", 0, "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert "1 left out as unusable" in " ".join(printed.out.split())
    assert list(json.loads((tmp_path / "r.json").read_text())["generated"]["left_out"]) == [f"{NOT_UTF8}.wav"]


def test_classify_lists_files_of_any_name(videos, tmp_path, capsys):
    model = trained(ClassifyTask, tmp_path, labels=["cat", NOT_UTF8])
    out = tmp_path / "classes.csv"
    assert run("classify", "--checkpoint", model, "--media", videos, "--out", out, "--device", "cpu") == 0
    assert [row["file"] for row in rows(out)] == sorted(path.name for path in videos.iterdir())
    assert "bell" in capsys.readouterr().out


def test_retrieve_finds_files_of_any_name_and_links_them(videos, tmp_path, capsys):
    model = trained(AlignTask, tmp_path, embedding_dim=16)
    page, out = tmp_path / "p.html", tmp_path / "found.json"
    query = videos / f"{NOT_UTF8}.mp4"
    command = ["retrieve", "--checkpoint", model, "--media", videos, "--query", query, "--top", 4, "--device", "cpu"]
    assert run(*command, "--page", page, "--out", out) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert b"bell%E9_%FF.mp4" in page.read_bytes()
    assert b"bell\xe9_\xff" in page.read_bytes()
    assert LONG.encode() in page.read_bytes()
    assert json.dumps(NOT_UTF8)[1:-1] in out.read_text()


def test_retrieve_takes_keys_of_any_bytes(tmp_path, capsys):
    keys = np.array([NOT_UTF8, "b", "\ud800"], dtype=str)
    for name in ("a", "v"):
        np.savez(tmp_path / f"{name}.npz", embeddings=np.eye(3, dtype=np.float32), keys=keys)
    arguments = ["--audio", tmp_path / "a.npz", "--video", tmp_path / "v.npz", "--out", tmp_path / "r.json"]
    assert run("retrieve", *arguments) == 0
    assert "R@1" in capsys.readouterr().out


def test_extract_takes_files_of_any_name_from_folders_and_lists(videos, tmp_path, capsys):
    settings = ["--segment_seconds", 0.5, "--min_seconds", 0.1, "--video_fps", 4, "--device", "cpu", "--num_workers", 0]
    assert run("extract", "--media", videos, "--out", tmp_path / "shards", *settings) == 0
    dataset = ShardDataset(tmp_path / "shards")
    found = {dataset.record(number)["id"] for number in range(len(dataset))}
    assert found == {"plain", *NAMES}
    assert run("shards", "info", tmp_path / "shards") == 0
    # A list that names them, as `vab datasets` writes it.
    listed = tmp_path / "list.csv"
    lines = "".join(f"{path.name},cat\n" for path in sorted(videos.iterdir()))
    write_atomically(listed, f"file,labels\n{lines}")
    command = ["extract", "--media", listed, "--media_root", videos, "--out", tmp_path / "listed", *settings]
    assert run(*command) == 0
    assert len(ShardDataset(tmp_path / "listed")) == len(dataset)
    capsys.readouterr()


@pytest.mark.parametrize(
    "text",
    [
        b"file,labels\nplain.mp4,bell\xe9\n",
        b"file,bell\xe9\nplain.mp4,\n",
        b"file\nmissing_bell\xe9.mp4\n",
        b"\xff\xfe\x00",
    ],
)
def test_a_list_in_another_encoding_is_still_refused(text, videos, tmp_path):
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(UserError, match="cannot be read as CSV in UTF-8"):
        find_sources(tmp_path / "list.csv", root=videos)


def test_a_listening_test_of_any_names(videos, sounds, tmp_path, capsys):
    out = tmp_path / ("o" * MAX_NAME_BYTES)
    assert run("listen", "--systems", *sounds, "--videos", videos, "--num_pairs", 4, "--out", out) == 0
    assert (out / "page" / "index.html").is_file()
    assert {trial["video"] for trial in json.loads((out / "key.json").read_text())["trials"]} == {"plain", *NAMES}
    capsys.readouterr()


def test_an_exported_folder_may_have_the_longest_name(model, tmp_path, capsys):
    out = tmp_path / ("e" * MAX_NAME_BYTES)
    assert run("export", "--checkpoint", model, "--out", out) == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    capsys.readouterr()
