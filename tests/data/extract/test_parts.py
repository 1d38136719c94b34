"""Parts that others make, change or delete meanwhile, and inputs that come and go: nothing is lost in silence."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from socket import gethostname
from typing import ClassVar

import numpy as np
import pytest
import torch

from small_media import video
from vab.data.extract.cutting import Cutting
from vab.data.extract.encode import Encoders
from vab.data.extract.engines import LocalEngine
from vab.data.extract.identity import MISSING, UNKNOWN, describe, file_stats, text_hash
from vab.data.extract.parts import Settings
from vab.data.extract.run import extract_parts
from vab.data.inputs.listing import Sources, find_sources
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.data_set import Contents, publish_data_set, rows_of_part
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import read_manifest
from vab.data.shards.verify import verify
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(6):
        video(folder / f"{number}.mp4", 0.64, seed=number)
    return folder


class Telling(LocalEngine):
    """Calls a function before each part."""

    def __init__(self, before, encoders, cutting):
        super().__init__(encoders, cutting)
        self.before = before

    def run(self, parts, *rest):
        def told():
            for part in parts:
                self.before(part)
                yield part

        return super().run(told(), *rest)


def run(
    listed,
    out,
    before=lambda part: None,
    share=(1, 1),
    kind=Encoders,
    inputs_per_part=3,
    watch=lambda *_: None,
    **settings,
):
    vision = load_vision("tiny")
    encoders = kind(load_codec("tiny"), vision, torch.device("cpu"))
    cutting = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "keep", vision.resizer)
    settings = Settings(0, 1, 60.0, inputs_per_part, **settings)
    engine = Telling(before, encoders, cutting)
    return extract_parts(find_sources(listed), OutFolder(out), engine, settings, watch=watch, share=share)


def listing(tmp_path, *names):
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["file", *(f"media/{name}" for name in names)]) + "\n")
    return path


def test_tasks_that_listed_other_inputs_are_not_joined(media, tmp_path):
    def another_begins(part):
        video(media / "!.mp4", 0.64, seed=9)
        assert run(media, tmp_path / "out", share=(1, 2)) is None

    with pytest.raises(UserError, match=r"out was begun with other inputs \("):
        run(media, tmp_path / "out", another_begins, share=(2, 2))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("names", [["0.mp4", "1.mp4", "2.mp4", "3.mp4"], ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]])
def test_one_file_that_cannot_be_read_never_stops_a_resumed_run(media, tmp_path, names):
    (media / "bad.mp4").write_bytes(b"no video")
    (media / "3.mp4").write_bytes(b"nor this")
    listed = listing(tmp_path, *names)
    first = run(listed, tmp_path / "out")
    assert [(left.source, left.reason) for left in first.left_out] == [(f"media/{names[-1]}", "unreadable")]
    again = run(listed, tmp_path / "out", lambda part: (media / names[-1]).unlink())
    assert [(left.source, left.reason) for left in again.left_out] == [(f"media/{names[-1]}", "missing")]
    assert (again.records, verify(tmp_path / "out")) == (3, [])


def test_a_file_that_comes_while_a_run_is_at_work_is_the_next_runs(media, tmp_path):
    listed = listing(tmp_path, "0.mp4", "late.mp4", "1.mp4", "2.mp4")
    report = run(listed, tmp_path / "out", lambda part: video(media / "late.mp4", 0.64, seed=9))
    assert [(left.source, left.reason) for left in report.left_out] == [("media/late.mp4", "missing")]
    assert run(listed, tmp_path / "out").left_out == []
    assert (run(listed, tmp_path / "whole").records, len(ShardDataset(tmp_path / "out"))) == (4, 4)
    assert verify(tmp_path / "out") == []


def test_rows_of_a_part_that_are_lost_are_named_and_nothing_waits_for_them(media, tmp_path):
    run(media, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "parts" / "000000.npy").unlink()
    with pytest.raises(UserError, match=r"000000\.npy is gone.*delete the \.json of the same number"):
        run(media, tmp_path / "out")
    (tmp_path / "out" / "parts" / "000000.json").unlink()
    assert run(media, tmp_path / "out").records == 6


def test_an_index_of_another_join_is_written_again(media, tmp_path):
    run(media, tmp_path / "out")
    out, (manifest, _) = OutFolder(tmp_path / "out"), read_manifest(tmp_path / "out")
    index = np.load(tmp_path / "out" / "index.npy")
    np.save(tmp_path / "out" / "index.npy", index[:4])
    further = {name: manifest[name] for name in ("versions",)}
    tables = [rows_of_part(out, number) for number in range(2)]
    codebooks = load_codec("tiny").codebooks()
    publish_data_set(out, Contents(manifest, tables, codebooks, [], 6, further))
    assert np.array_equal(np.load(tmp_path / "out" / "index.npy"), index)
    assert verify(tmp_path / "out") == []


def test_features_that_no_shard_can_hold_are_the_entry_of_their_segment(media, tmp_path):
    class Hot(Encoders):
        """Gives the third segment, each time, features beyond float16."""

        seen: ClassVar[list[float]] = []

        def encode(self, segments, num_frames):
            ((codes, features),) = super().encode(segments, num_frames)
            Hot.seen.append(float(segments[0].pixels.sum()))
            is_hot = len(Hot.seen) > 2 and Hot.seen[-1] == Hot.seen[2]
            return [(codes, np.full_like(features, np.inf) if is_hot else features)]

    report = run(media, tmp_path / "out", kind=Hot)
    (left,) = report.left_out
    assert (left.source, left.reason) == ("2.mp4", "error")
    assert "finite as float16" in left.detail
    assert report.records == 5


def test_what_a_killed_second_try_left_is_deleted_by_the_next_run(media, tmp_path):
    good = (media / "0.mp4").read_bytes()
    (media / "0.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    run(media, out)
    shutil.copy(out / "shard-000000.tar", tmp_path / "old.tar")
    (media / "0.mp4").write_bytes(good)
    run(media, out)
    # As if it had been killed after the manifest.
    shutil.copy(tmp_path / "old.tar", out / "shard-000000.tar")
    (out / "report.json").unlink()
    assert run(media, out).already_finished
    assert verify(out) == []
    assert (out / "report.json").exists()


def test_what_killed_processes_left_is_deleted_even_if_there_is_nothing_to_do(media, tmp_path):
    run(media, tmp_path / "out")
    work = tmp_path / "out" / f".vab-{gethostname()}-999999999-0123.tmp"
    work.mkdir()
    run(media, tmp_path / "out")
    assert not work.exists()


def test_a_part_that_was_deleted_is_done_again(media, tmp_path):
    (media / "0.mp4").write_bytes(b"no video")
    run(media, tmp_path / "out")
    (tmp_path / "out" / "parts" / "000000.json").unlink()
    assert run(media, tmp_path / "out").records == 5
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("finished", [True, False])
def test_inputs_that_are_away_are_no_reason_to_delete_what_was_made_of_them(media, tmp_path, finished):
    run(media, tmp_path / "out", share=(1, 1 if finished else 2))
    (media / "0.mp4").rename(tmp_path / "0.mp4")
    listed = listing(tmp_path, *(f"{number}.mp4" for number in range(6)))
    (tmp_path / "0.mp4").rename(media / "0.mp4")
    run(listed, tmp_path / "listed", share=(1, 1 if finished else 2))
    (media / "0.mp4").unlink()
    with pytest.raises(
        UserError, match=r"1 inputs that are not there now, such as .*media/0\.mp4: check that the disk"
    ):
        run(listed, tmp_path / "listed")


def test_each_file_is_asked_for_once_however_often_it_is_listed(media, monkeypatch):
    sources = Sources(str(media))
    for number in range(30_000):
        sources.add(f"{number % 7}.mp4", number / 10)  # of which 6.mp4 is missing
    shutil.copy(media / "1.mp4", media / "5.mp4")
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **rest: asked.append(path) or stat(path, **rest))
    stats = file_stats(sources)
    monkeypatch.undo()
    assert sorted(asked) == [f"{media}/{number}.mp4" for number in range(7)]
    assert stats.sizes[:7].tolist() == [*((media / f"{number}.mp4").stat().st_size for number in range(6)), MISSING]
    sizes = stats.sizes[:6].tolist()
    assert stats.shares_size[:7].tolist() == [*(sizes.count(size) > 1 for size in sizes), False]
    assert stats.shares_size[[1, 5, 8]].all()
    assert all(np.array_equal(column[:-7], column[7:]) for column in stats)


def test_a_fingerprint_is_the_hash_of_the_list_as_json():
    sources, sizes = Sources("media"), [5, MISSING, 7, UNKNOWN]
    for row in (("a.mp4",), ("b\udcff é.mp4", 1 / 3, ("x", 'y"')), ("c.mp4", 1e-7, (), "id"), ("c.mp4", 12345678.0)):
        sources.add(*row)
    rows = [[source.name, source.start, source.labels, size if size >= 0 else None] + [source.given_id] * (number == 2)
            for number, (source, size) in enumerate(zip(sources, sizes, strict=True))]  # fmt: skip
    found = describe(sources, np.array(sizes))
    assert found.text == f"4 sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"
    assert found.inputs.tolist() == [text_hash(json.dumps(row)) for row in rows]


def test_a_run_reads_what_it_needs_of_parts_and_inputs_once(media, tmp_path, monkeypatch):
    opened, described = [], []
    read_bytes, blake2b = Path.read_bytes, hashlib.blake2b
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    monkeypatch.setattr(hashlib, "blake2b", lambda text, **rest: described.append(text) or blake2b(text, **rest))

    def counts(**settings):
        opened.clear()
        described.clear()
        run(listed, tmp_path / "out", inputs_per_part=1, **settings)
        return opened.count("000001.json"), sum(b'"media/1.mp4"' in text for text in described)

    listed = listing(tmp_path, *(f"{number}.mp4" for number in range(6)), "missing.mp4")
    assert counts() == (2, 1)  # to join it, and to see that it is still the one that was joined
    assert counts() == (0, 1)
    (tmp_path / "out" / "manifest.json").unlink()
    assert counts() == (3, 1)  # to see that it is of the same inputs, too


def test_a_retry_that_is_killed_before_the_manifest_keeps_the_data_set_whole(media, tmp_path, monkeypatch):
    out, listed = tmp_path / "out", listing(tmp_path, "0.mp4", "late.mp4", "1.mp4")
    run(listed, out)
    (media / "late.mp4").write_bytes(b"no video")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vab.data.extract.run.publish_data_set", killed)
    with pytest.raises(KeyboardInterrupt):
        run(listed, out)
    monkeypatch.undo()
    report = run(listed, out)
    assert [(left.source, left.reason) for left in report.left_out] == [("media/late.mp4", "unreadable")]
    assert verify(out) == []


def test_versions_of_a_killed_retry_are_those_that_the_first_run_had(media, tmp_path, monkeypatch):
    out, listed = tmp_path / "out", listing(tmp_path, "0.mp4", "late.mp4")
    monkeypatch.setattr("vab.data.extract.run.library_versions", lambda packages: {"torch": "old"})
    run(listed, out)
    monkeypatch.setattr("vab.data.extract.run.library_versions", lambda packages: {"torch": "new"})
    video(media / "late.mp4", 0.64, seed=9)
    (out / "manifest.json").unlink()  # as the retry is killed when it replaces the manifest
    run(listed, out)
    manifest, _ = read_manifest(out)
    assert (manifest["versions"], manifest["appended"]) == ({"torch": "old"}, {"torch": "new"})


def test_the_progress_of_a_task_begins_with_the_inputs_of_parts_that_are_done(media, tmp_path):
    seen = []
    run(media, tmp_path / "out", share=(1, 3), inputs_per_part=1, watch=lambda done, here, _: seen.append((done, here)))
    assert seen == [(1, 1), (2, 2)]
    seen.clear()
    run(media, tmp_path / "out", share=(2, 3), inputs_per_part=1, watch=lambda done, here, _: seen.append((done, here)))
    assert seen == [(3, 1), (4, 2)]


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_dated_in_the_future_is_no_changed_file(media, tmp_path, finished):
    later = time.time() + 1e6
    os.utime(media / "1.mp4", (later, later))
    share = (1, 1 if finished else 2)
    run(media, tmp_path / "out", share=share)
    assert run(media, tmp_path / "out").touched == []
    os.utime(media / "1.mp4", (later + 1, later + 1))
    assert run(media, tmp_path / "out").touched == ["1.mp4"]
