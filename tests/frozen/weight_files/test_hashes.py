"""What is known of a file, from whom, and whether it still holds."""

import hashlib
import json

import pytest

from vab.frozen.weight_files.hashes import check, read_record
from vab.spec import UserError

CONTENT = b"some weights"
SHA = hashlib.sha256(CONTENT).hexdigest()


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def record(folder, **files):
    entries = {name: {"sha256": sha} for name, sha in files.items()}
    (folder / "weights.json").write_text(json.dumps({"format": "vab-weights", "files": entries}))


def test_a_hash_of_git_is_gits(tmp_path):
    # printf 'test content\n' | git hash-object --stdin, as in git's own book
    path = put(tmp_path / "a", b"test content\n")
    blob = "d670460b4b4aece5915caf5c68d12f560a9fe3e4"
    assert check(path, blob) == ("ok", blob, "as published", blob)
    assert check(path, "12345678").got == hashlib.sha256(b"test content\n").hexdigest()[:8]


def test_the_strongest_word_counts(tmp_path):
    path = put(tmp_path / f"a-{SHA[:8]}.pth")
    assert check(path) == ("ok", SHA[:8], "as its name says", SHA[:8])
    record(tmp_path, **{path.name: SHA})
    assert check(path) == ("ok", SHA, "as recorded at fetching", SHA)
    assert check(path, "0" * 64) == ("changed", "0" * 64, "as published", SHA)


def test_a_record_covers_folders_below_it(tmp_path):
    path = put(tmp_path / "MODEL" / "TAG.bin")
    assert check(path).state == "unchecked"
    record(tmp_path, **{"MODEL/TAG.bin": SHA})
    assert check(path).state == "ok"
    path.write_bytes(b"other")
    found = check(path)
    assert (found.state, found.expected, found.got) == ("changed", SHA, hashlib.sha256(b"other").hexdigest())


def test_the_hubs_cache_names_files_by_their_hash(tmp_path):
    blob = put(tmp_path / "blobs" / SHA)
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    link = tmp_path / "snapshots" / "1" / "model.safetensors"
    link.symlink_to(blob)
    assert check(link) == ("ok", SHA, "as the hub says", SHA)
    blob.rename(put(tmp_path / "shared" / "blobs" / "ab" / ("ab" * 32)))  # by another hash, for several repositories
    blob.symlink_to(tmp_path / "shared" / "blobs" / "ab" / ("ab" * 32))
    assert check(link) == ("ok", SHA, "as the hub says", SHA)
    blob.write_bytes(b"damaged")
    assert check(link).state == "changed"


def test_a_name_that_ends_in_something_else_accuses_nobody(tmp_path):
    assert check(put(tmp_path / "run-20240131.pth")).state == "unchecked"
    assert check(put(tmp_path / "run.pth")).state == "unchecked"


@pytest.mark.parametrize(
    "text", ["{", '{"format": "vab-weights"}', '{"format": "vab-weights", "files": {"a": {"sha256": "none"}}}']
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(UserError, match=r"weights\.json, the record of fetched weights, cannot be read"):
        read_record(tmp_path)


def test_another_programs_file_is_let_be(tmp_path):
    (tmp_path / "weights.json").write_text('{"layers": []}')
    assert read_record(tmp_path) == {}
