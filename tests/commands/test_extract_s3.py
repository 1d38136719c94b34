"""``vab extract`` from and to an object store: the same bytes as in folders, and nothing lost when it is away."""

import csv
import gc
import json
import os
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import command_line
import fit_runs
from object_store import object_store
from same_batches import same
from small_media import video
from vab.cli import main
from vab.data import addresses
from vab.data.extract.cutting import Cutting
from vab.data.extract.encode import Encoders
from vab.data.extract.engines import LocalEngine
from vab.data.extract.parts import Settings
from vab.data.extract.run import extract_parts
from vab.data.inputs.listing import find_sources
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.folder import OutFolder
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision

FLAGS = ["--segment_seconds=0.64", "--video_fps=12.5", "--min_seconds=0.2", "--device=cpu"]
OUT = "s3://bucket/out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four parts: videos, one that cannot be read, and two with the same bytes."""
    root = tmp_path_factory.mktemp("media")
    (root / "sub").mkdir()
    for number in range(6):
        video(root / f"{number:02d}.mp4", 0.64 + 0.32 * (number % 4), seed=number)
    (root / "04b.mp4").write_text("not a video")
    (root / "sub" / "a::b [1].mp4").write_bytes((root / "03.mp4").read_bytes())
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What a run in folders makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(folder, out)
    return contents(out)


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(addresses, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("VAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with object_store(monkeypatch) as store:
        yield store
    gc.collect()
    assert not list(tmp_path.glob(".vab-*"))  # what was fetched is deleted


def words(media, out, *arguments):
    return [
        "extract",
        "--media",
        str(media),
        "--out",
        str(out),
        "--inputs_per_part=2",
        *FLAGS,
        "--num_workers=0",
        *arguments,
    ]


def run(media, out, *arguments):
    main(words(media, out, *arguments))


def contents(out, store=None):
    """Bytes of all files; the report names the folder, which may be another."""
    if store is not None:
        files = store.contents(out)
    else:
        files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: content.replace(str(out).encode(), b"OUT") for name, content in files.items()}


def refused(capsys, *arguments):
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def test_from_and_to_a_store_come_the_bytes_of_folders(folder, whole, store, capsys):
    media = store.put(folder, "bucket/videos")
    asked = []
    store.away = lambda method, path: asked.append((method, path))
    run(media, OUT)
    assert not [path for method, path in asked if method != "PUT" and path.endswith(".tar")]
    assert contents(OUT, store) == whole
    main(["shards", "verify", OUT])
    main(["shards", "info", OUT])
    assert f"{OUT}: 14 records, all as the manifest says" in capsys.readouterr().out
    run(media, OUT)
    assert "1 inputs that could not be read before were tried again, in vain" in capsys.readouterr().out
    assert contents(OUT, store) == whole


def test_the_parts_of_a_store_are_fetched_many_at_a_time(folder, whole, store):
    run(folder, OUT)
    store.files.rm(f"{OUT}/manifest.json")
    together = threading.Barrier(4)

    def away(method, path):
        if method == "GET" and "/parts/0" in path and path.endswith(".json"):
            together.wait(30)  # breaks, which ends the request, unless the four are asked for at the same time
        return False

    store.away = away
    run(folder, OUT)
    store.away = lambda method, path: False
    assert not together.broken
    assert contents(OUT, store) == whole


def test_nothing_is_deleted_that_is_not_there(folder, whole, store):
    store.away = lambda method, path: method in ("DELETE", "POST")  # as a store that is written once
    run(folder, OUT)
    assert contents(OUT, store) == whole


def test_a_file_that_another_task_has_written_since_the_listing_is_read_as_it_is_now(store):
    store.files.pipe_file(f"{OUT}/parts/000000.json", b"{}")
    out = OutFolder.at(OUT)
    assert out.parts() == {0}
    store.files.pipe_file(f"{OUT}/parts/000000.json", b'{"version": 1}')
    assert out.path("parts/000000.json").read_bytes() == b'{"version": 1}'


def test_parts_that_other_processes_wrote_again_are_joined(folder, store):
    class Elsewhere(LocalEngine):
        def run(self, parts, out, *rest):
            return super().run(parts, OutFolder.at(out.place), *rest)

    vision = load_vision("tiny")
    cutting = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "keep", vision.resizer)
    engine = Elsewhere(Encoders(load_codec("tiny"), vision, torch.device("cpu")), cutting)

    def extract():
        return extract_parts(find_sources(media), OutFolder.at(OUT), engine, Settings(0, 1, 60.0, 2))

    media = store.put(folder, "bucket/videos")
    assert extract().records == 14
    store.files.put_file(str(folder / "04.mp4"), "bucket/videos/04b.mp4")
    assert extract().records == 15
    main(["shards", "verify", OUT])


def test_five_steps_of_training_from_the_store(folder, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(folder, OUT)
    settings = [
        word
        for word in fit_runs.flags(tmp_path, "run", batch_size=2, steps=5, every=5)
        if "/train" not in word and "/val" not in word
    ]
    main([*settings, f"--data.train={OUT}", f"--data.val={OUT}"])
    assert [path.name for path in tmp_path.rglob("last.ckpt")] == ["last.ckpt"]


def test_a_list_of_files_here_in_a_store_and_on_the_web(folder, store, tmp_path):
    store.put(folder, "bucket/videos")
    names = ["00.mp4", "01.mp4", "sub/a::b [1].mp4", "02.mp4", "absent.mp4"]
    with web_server(folder) as web:
        there = [folder / names[0], f"s3://bucket/videos/{names[1]}", f"{web}/sub/a%3A%3Ab%20%5B1%5D.mp4"]
        there += [f"{web}/{name}" for name in names[3:]]
        for place, files in (("here", [folder / name for name in names]), ("there", there)):
            (tmp_path / place).mkdir()
            with (tmp_path / place / "list.csv").open("w") as file:
                csv.writer(file).writerows(
                    [("file", "id"), *((str(name), str(number)) for number, name in enumerate(files))]
                )
            run(tmp_path / place / "list.csv", tmp_path / place / "out")
    mine, theirs = (ShardDataset(tmp_path / place / "out") for place in ("here", "there"))
    assert len(mine) == len(theirs) == 8
    same(mine.read(range(8)), theirs.read(range(8)))
    for place in ("here", "there"):
        (lost,) = json.loads((tmp_path / place / "out" / "report.json").read_text())["left_out"]
        assert (lost["reason"], lost["detail"]) == ("missing", "there is no such file")


@contextmanager
def web_server(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_many_files_of_a_list_take_one_request_for_their_sizes(folder, store, tmp_path):
    names = [f"{number:02d}.mp4" for number in range(16)]
    for name in names:
        store.files.pipe_file(f"bucket/videos/{name}", (folder / "00.mp4").read_bytes())
    (tmp_path / "list.csv").write_text("\n".join(["file", *names, "absent.mp4"]))
    asked = []
    store.away = lambda method, path: asked.append(method)
    run(tmp_path / "list.csv", tmp_path / "out", "--media_root=s3://bucket/videos", "--inputs_per_part=100")
    assert asked.count("HEAD") == 2 * len(names)  # as each is fetched: its size now, and what s3fs asks as it opens it
    assert len(ShardDataset(tmp_path / "out")) == len(names)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["reasons"] == {"missing": 1}


def test_question_marks_are_characters_of_keys(folder, store, tmp_path):
    names = [f"{number:02d} why?.mp4" for number in range(16)]
    for name in names:
        store.files.pipe_file(f"bucket/videos/{name}", (folder / "00.mp4").read_bytes())
    (tmp_path / "list.csv").write_text("\n".join(["file", *names]))
    for number, media in enumerate(["s3://bucket/videos", tmp_path / "list.csv"]):
        run(media, tmp_path / str(number), *(["--media_root=s3://bucket/videos"] if number else []))
        assert len(ShardDataset(tmp_path / str(number))) == len(names)


def test_what_failed_is_tried_again_in_a_store_as_in_a_folder(folder, store, tmp_path):
    outs = []
    for place in ("local", "store"):
        media = tmp_path / place / "media"
        media.mkdir(parents=True)
        (media / "list.csv").write_text("file\n00.mp4\n01.mp4\n02.mp4\n")
        for name in ("00.mp4", "02.mp4"):
            (media / name).write_bytes((folder / name).read_bytes())
        here, out = (media, tmp_path / "out") if place == "local" else (store.put(media, "bucket/media"), OUT)
        run(f"{here}/list.csv", out)
        assert json.loads((contents(out, store if place == "store" else None))["report.json"])["kept"] == 2
        content = (folder / "01.mp4").read_bytes()
        if place == "local":
            (media / "01.mp4").write_bytes(content)
        else:
            store.files.pipe_file("bucket/media/01.mp4", content)
        run(f"{here}/list.csv", out)
        outs.append(contents(out, store if place == "store" else None))
    assert outs[0] == outs[1]
    assert "shard-000000-1.tar" in outs[1]
    assert "shard-000000.tar" not in outs[1]
    assert json.loads(outs[1]["report.json"])["kept"] == 3


def test_tasks_share_the_parts_and_data_sets_are_merged_in_a_store(folder, whole, store, tmp_path):
    run(folder, OUT, "--part=2/2")
    assert "manifest.json" not in contents(OUT, store)
    run(folder, OUT, "--part=1/2")
    assert contents(OUT, store) == whole
    run(folder / "sub", "s3://bucket/other")
    main(["shards", "merge", "--folders", f'["{OUT}", "s3://bucket/other"]', "--out", "s3://bucket/merged"])
    run(folder, tmp_path / "out")
    run(folder / "sub", tmp_path / "other")
    main(["shards", "merge", "--folders", f'["{tmp_path}/out", "{tmp_path}/other"]', "--out", f"{tmp_path}/merged"])
    assert contents("s3://bucket/merged", store) == contents(tmp_path / "merged")


# ---- a store that is away ----


def test_a_store_that_is_away_for_a_moment_leaves_no_trace(folder, whole, store):
    media, calls = store.put(folder, "bucket/videos"), []

    def away(method, path):
        calls.append(path)
        return len(calls) % 10 in (7, 8, 9)

    store.away = away
    run(media, OUT)
    store.away = lambda method, path: False
    assert len(calls) > 60
    assert contents(OUT, store) == whole


@pytest.mark.parametrize("what", ["videos", "out"])
def test_a_store_that_goes_away_ends_the_run_and_nothing_is_lost(folder, whole, store, what, capsys):
    media, puts = store.put(folder, "bucket/videos"), []

    def away(method, path):
        puts.extend([path] if method == "PUT" and "/parts/0" in path and path.endswith(".json") else [])
        return len(puts) >= 2 and f"/{what}/" in path

    store.away = away
    line = refused(capsys, *words(media, OUT, "--batch_size=1"))
    store.away = lambda method, path: False
    if what == "videos":
        assert line.startswith("error: 2 of 2 inputs of part 2 were there when this run began and cannot be opened now")
        assert "such as s3://bucket/videos/" in line
    else:
        assert line.startswith(f"error: {OUT}/parts/000001.json cannot be written (")
        assert line.endswith("): what is done is kept; then run the same command again")
    done = [name for name in contents(OUT, store) if name.startswith("parts/0") and name.endswith(".json")]
    assert done == [f"parts/{number:06d}.json" for number in range(2 if what == "videos" else 1)]
    run(media, OUT)
    assert contents(OUT, store) == whole


def test_credentials_that_expire_end_the_run_and_nothing_is_lost(folder, whole, store, capsys):
    media, puts = store.put(folder, "bucket/videos"), []

    def refuses(method, path):
        puts.extend([path] if method == "PUT" and "/parts/0" in path and path.endswith(".json") else [])
        return len(puts) >= 2 and "/videos/" in path

    store.refuses = refuses
    line = refused(capsys, *words(media, OUT, "--batch_size=1"))
    assert line.startswith("error: 2 of 2 inputs of part 2 were there when this run began and cannot be opened now")
    assert ": check the credentials (" in line
    store.refuses = lambda method, path: False
    run(media, OUT)
    assert contents(OUT, store) == whole


@pytest.mark.parametrize("count", [12, 100])
def test_a_store_that_is_away_at_the_start_is_one_line(store, tmp_path, capsys, count):
    (tmp_path / "list.csv").write_text("\n".join(["file", *(f"s3://bucket/{n}/{n}.mp4" for n in range(count))]))
    asked = []
    store.away = lambda method, path: not asked.append(path)
    line = refused(capsys, *words(tmp_path / "list.csv", tmp_path / "out"))
    assert line.startswith(f"error: {count} of {count} inputs cannot be reached, such as s3://bucket/")
    assert len({*asked}) <= 32  # the others of a server that does not answer so many are not asked


@pytest.mark.parametrize("attempts", [None, "2"])
def test_only_one_layer_tries_again(store, monkeypatch, attempts):
    monkeypatch.setattr(s3fs := type(store.files), "retries", 5)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    if attempts is not None:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    s3fs.clear_instance_cache()
    asked = []
    store.fails = lambda method, path: not asked.append(path)
    with pytest.raises(addresses.AddressError):
        addresses.Remote("s3://bucket/videos").entry("0.mp4")
    assert len(asked) == 5 * int(attempts or 1)


def test_files_that_cannot_be_reached_at_the_start_nor_later_end_the_run(folder, store, tmp_path, capsys):
    store.put(folder, "bucket/videos")
    (tmp_path / "list.csv").write_text("\n".join(["file", *(f"s3://bucket/videos/0{n}.mp4" for n in range(6))]))
    store.away = lambda method, path: path.endswith(("02.mp4", "03.mp4"))
    line = refused(capsys, *words(tmp_path / "list.csv", tmp_path / "out"))
    assert line.startswith("error: 2 of 2 inputs of part 1 cannot be opened now, such as s3://bucket/videos/02.mp4")
    store.away = lambda method, path: False
    run(tmp_path / "list.csv", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["reasons"] == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_in_the_middle_it_resumes_from_what_is_in_the_store(folder, whole, store):
    media = store.put(folder, "bucket/videos")
    process = command_line.start(*words(media, OUT, "--num_workers=1"))
    while not any("/parts/0" in name and name.endswith(".json") for name in store.files.find("bucket/out")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "manifest.json" not in contents(OUT, store)
    run(media, OUT, "--num_workers=1")
    assert contents(OUT, store) == whole


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [["--devices=2"], ["--engine=ray", "--actors=2"]])
def test_other_engines_write_to_a_store_too(folder, whole, store, engine):
    media = store.put(folder, "bucket/videos")
    process = command_line.start(*words(media, OUT, *engine))
    assert process.communicate(timeout=250)[1] == ""
    assert contents(OUT, store) == whole


def test_what_a_store_refuses_is_one_line(folder, store, monkeypatch, capsys):
    assert "bucket does not exist" in refused(capsys, *words(folder, "s3://other/out"))
    for media in ("s3://nobucket/videos", "s3://bucket/nofolder"):
        assert f"{media}: there is no such folder or bucket" in refused(capsys, *words(media, OUT))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(Path(tempfile.gettempdir(), "nobody")))
    type(store.files).clear_instance_cache()
    assert "Unable to locate credentials" in refused(capsys, *words("s3://bucket/videos", OUT))
    assert "Unable to locate credentials" in refused(capsys, *words(folder, OUT))
