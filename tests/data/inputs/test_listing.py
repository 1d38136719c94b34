"""Lists as spreadsheets, Windows and people save them; folders and lists at addresses."""

import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fsspec
import pytest

from vab.data.extract.identity import file_stats
from vab.data.inputs.listing import Source, find_sources
from vab.data.inputs.tables import Table, read_columns
from vab.data.reading.labels import read_keys, read_vocabulary
from vab.spec import UserError


def listed(path, *settings, **others):
    return [(one.file, one.labels, one.start) for one in find_sources(path, *settings, **others)]


SPREADSHEET = [("plain.mp4", ("dog", "cat"), 0.5), ("UPPER.MP4", ("café",), None)]
READ = {
    "BOM and CRLF": ('\ufefffile,labels,start\r\nplain.mp4,"dog;cat",0.5\r\nUPPER.MP4,café,\r\n'.encode(), ".csv"),
    "semicolons and decimal commas": (
        '\ufefffile;labels;start\r\nplain.mp4;"dog;cat";0,5\r\nUPPER.MP4;café;\r\n'.encode(),
        ".csv",
    ),
    "UTF-16 and tabs": (
        'file\tlabels\tstart\r\nplain.mp4\t"dog;cat"\t0,5\r\nUPPER.MP4\tcafé\t\r\n'.encode("utf-16"),
        ".csv",
    ),
    "big-endian UTF-16": (
        "\ufefffile,labels,start\nplain.mp4,dog;cat,0.5\nUPPER.MP4,café,\n".encode("utf-16-be"),
        ".csv",
    ),
    "tabs": ("file\tlabels\tstart\nplain.mp4\tdog;cat\t0.5\nUPPER.MP4\tcafé\t\n".encode(), ".tsv"),
    "tabs in a .csv": ("labels\tfile\tstart\ndog;cat\tplain.mp4\t0.5\ncafé\tUPPER.MP4\t\n".encode(), ".csv"),
    "trailing commas": ("file,labels,start,\nplain.mp4,dog;cat,0.5,\nUPPER.MP4,café,,\n".encode(), ".csv"),
    "returns alone": ("file,labels,start\rplain.mp4,dog;cat,0.5\rUPPER.MP4,café,\r".encode(), ".csv"),
}


def test_a_list_is_sliced_like_a_list(tmp_path):
    (tmp_path / "list.csv").write_text("file\n" + "".join(f"{number}.mp4\n" for number in range(7)))
    sources = find_sources(tmp_path / "list.csv")
    for part in (slice(2, 5), slice(5, 2), slice(None, None, -1), slice(4, 0, -2), slice(1, None, 3), slice(-3, None)):
        assert sources[part] == list(sources)[part]


@pytest.mark.parametrize("kind", READ)
def test_a_list_is_read_however_it_was_saved(tmp_path, kind):
    content, suffix = READ[kind]
    (tmp_path / f"list{suffix}").write_bytes(content)
    assert listed(tmp_path / f"list{suffix}") == SPREADSHEET


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "file,labels\r\nplain.mp4,dog\r\nx.mp4,café\r\n".encode("cp1252"),
            r"list\.csv cannot be read as CSV in UTF-8: byte 0xe9 in line 3: save the file as UTF-8$",
        ),
        ("file,labels\nplain.mp4,dog\n".encode("utf-16-le"), r"list\.csv, line 1: a zero byte: save the file as text"),
        ("file,labels\nplain.mp4,dog\n".encode("utf-16")[:-1], r"cannot be read as CSV in UTF-8: .*truncated data"),
        (b"file,labels\nplain.mp4,dog\nplain.mp4,dog\n", r"lists 'plain\.mp4' more than once \(1 such\)"),
        (b'file;start\nplain.mp4;"1.234,5"\n', r"line 2: start must be seconds, 0 to 9999999, got '1.234,5'"),
        (b'file,start\nplain.mp4,"1,5"\n', r"line 2: start must be seconds, 0 to 9999999, got '1,5'"),
        (b"", r"needs a column 'file' in its first line, got \[\]"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, content, words):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        find_sources(tmp_path / "list.csv")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="there it is the separator")
def test_paths_as_windows_writes_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/plain.mp4", "odd\\name.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("file\nsub\\plain.mp4\nodd\\name.mp4\nsub\\gone.mp4\n")
    assert [one.file for one in find_sources(tmp_path / "list.csv")] == [
        "sub/plain.mp4",
        "odd\\name.mp4",  # there is such a file
        "sub\\gone.mp4",
    ]
    assert listed(tmp_path / "list.csv", "folder")[0][1] == ("sub",)


def test_all_readers_of_tables_are_one(tmp_path):
    (tmp_path / "classes.csv").write_bytes(
        "index;mid;display_name\r\n0;/m/a;Bell, dog\r\n1;/m/b;Ünter\r\n".encode("utf-16")
    )
    assert read_vocabulary(tmp_path / "classes.csv").names == ("Bell, dog", "Ünter")
    (tmp_path / "names.csv").write_text("dog; cat\nbell\n")
    assert read_vocabulary(tmp_path / "names.csv").names == ("dog; cat", "bell")
    (tmp_path / "names.txt").write_bytes("Bell\r\nÜnter\r\n".encode("utf-16"))
    assert read_vocabulary(tmp_path / "names.txt").names == ("Bell", "Ünter")
    (tmp_path / "keys.tsv").write_text("video_id\tcaption\nvideo1\ta dog; a cat\n")
    assert read_keys(str(tmp_path / "keys.tsv"), None, None, None) == ("video1",)
    (tmp_path / "table.csv").write_text("file;labels\na.wav;dog\n")
    assert list(read_columns(tmp_path / "table.csv", "file", "labels")) == [(2, {"file": "a.wav", "labels": "dog"})]
    for read in (lambda path: list(Table(path)), read_vocabulary, lambda path: list(read_columns(path, "file"))):
        (tmp_path / "bad.csv").write_bytes(b"file\nb\xe9ll\n")
        with pytest.raises(UserError, match=r"bad\.csv cannot be read as CSV in UTF-8: byte 0xe9 in line 2"):
            read(tmp_path / "bad.csv")
        (tmp_path / "bad.csv").write_bytes(b'file\n"a\nb"\n')
        with pytest.raises(UserError, match="line 3: a line break inside of double quotes"):
            read(tmp_path / "bad.csv")


# ---- addresses ----

FILES = {
    "b.mp4": 3, "a.mkv": 1, "a.mp4": 2, "sub/c.WAV": 4, "sub/deep er/d.mp4": 5, "sub-2/e.webm": 0, "notes.txt": 6,
    ".hidden/f.mp4": 7, "sub/.g.mp4": 8, "sub/h.xyz": 9, "sub/naïve.mp3": 1,
}  # fmt: skip


@pytest.fixture
def everywhere(tmp_path):
    """The same files in a folder and in memory; their addresses."""
    memory = fsspec.filesystem("memory")
    for name, size in FILES.items():
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(bytes(size))
        memory.pipe_file(f"/{tmp_path.name}/videos/{name}", bytes(size))
    yield tmp_path / "videos", f"memory://{tmp_path.name}/videos"
    memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("labels_from", ["none", "folder"])
def test_a_folder_is_listed_alike_wherever_it_is(everywhere, labels_from):
    folder, address = everywhere
    here = find_sources(folder, labels_from)
    assert [one.file for one in here] == [
        "a.mkv", "a.mp4", "b.mp4", "sub-2/e.webm", "sub/c.WAV", "sub/deep er/d.mp4", "sub/naïve.mp3"
    ]  # fmt: skip
    for place in (f"file://{folder}", address, f"{address}/"):
        there = find_sources(place, labels_from)
        assert [(one.name, one.id, one.labels) for one in there] == [(one.name, one.id, one.labels) for one in here]
        assert there.ignored == here.ignored
    assert [one.size for one in find_sources(address)] == [FILES[one.file] for one in here]
    assert [one.location for one in find_sources(address)] == [f"{address}/{one.file}" for one in here]
    assert [one.location for one in find_sources(f"file://{folder}")] == [str(folder / one.file) for one in here]
    assert all(fsspec.open(one.location).open().read() == bytes(one.size) for one in find_sources(address))


def test_a_folder_of_a_web_server_is_listed_by_its_index_pages(everywhere, tmp_path):
    folder, _ = everywhere
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/videos"
        here, there = find_sources(folder), find_sources(address)
        assert [(one.name, one.id) for one in there] == [(one.name, one.id) for one in here]
        assert there.ignored == here.ignored
        assert [fsspec.open(one.location).open().read() for one in there] == [one.path.read_bytes() for one in here]
        (tmp_path / "list.csv").write_text("file\nvideos/sub/naïve.mp3\n")
        (source,) = find_sources(f"{address.removesuffix('videos')}list.csv?sig=1")
        assert source.location == f"{address}/sub/na%C3%AFve.mp3?sig=1"
        with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:\d+/nothing: there is no such folder"):
            find_sources(f"{address.removesuffix('videos')}nothing?sig=1")
        server.shutdown()


def test_a_list_at_an_address_names_files_beside_it_and_elsewhere(everywhere, tmp_path):
    folder, address = everywhere
    text = "file,labels\nsub\\c.WAV,dog\nmemory://other/x y.mp4,cat\n"
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/list.csv", text.encode("utf-16"))
    there = find_sources(f"memory://{tmp_path.name}/list.csv", root=address)
    assert [(one.location, one.id, one.labels) for one in there] == [
        (f"{address}/sub/c.WAV", "sub/c", ("dog",)),
        ("memory://other/x y.mp4", "other/x y", ("cat",)),
    ]
    assert find_sources(f"memory://{tmp_path.name}/list.csv").root == f"memory://{tmp_path.name}"
    (folder / "list.csv").write_text("file\na.mp4\n")
    assert [one.location for one in find_sources(folder / "list.csv", root=address)] == [f"{address}/a.mp4"]
    assert Source("https://host/f?sig=1", "a b/é.mp4").location == "https://host/f/a%20b/%C3%A9.mp4?sig=1"
    with pytest.raises(UserError, match=rf"a.mp4 of {address} is not on this machine: copy the media here"):
        _ = find_sources(folder / "list.csv", root=address)[0].path


def test_names_and_ids_are_without_the_secrets_of_addresses(tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text(
        "file,start,id\nhttp://u:pass@h/cls/00.mp4?X-Signature=a/b.c,,\nhttps://h/00.mp4?sig=1,2.5,\n"
        "https://h/get?n=1,,one\nhttps://h/get?n=2,1,two\n/videos/a?b.mp4,,\n"
    )
    sources = find_sources(listed, "folder")
    assert [(one.name, one.id) for one in sources] == [
        ("http://u@h/cls/00.mp4", "u@h/cls/00"), ("https://h/00.mp4@2.5", "h/00"),
        ("https://h/get#one", "one"), ("https://h/get#two@1", "two"), ("/videos/a?b.mp4", "/videos/a?b"),
    ]  # fmt: skip
    assert sources[0].labels == ("cls",)
    assert sources[0].location == "http://u:pass@h/cls/00.mp4?X-Signature=a/b.c"
    listed.write_text("file\nhttps://h/get?n=1\nhttps://h/get?n=2\n")
    with pytest.raises(
        UserError, match=r"lists 'https://h/get' more than once \(1 such\): .*queries.* give each an id$"
    ):
        find_sources(listed)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp2://host/videos", r"^ftp2://host/videos: cannot read ftp2:// addresses; the kinds are http"),
        ("memory://nothing/videos", r"^memory://nothing/videos: there is no such folder or bucket"),
        ("memory://nothing/list.csv", r"^memory://nothing/list.csv cannot be read \(FileNotFoundError"),
        ("https://127.0.0.1:9/list.csv?sig=secret", r"^https://127.0.0.1:9/list.csv cannot be read \((?!.*secret)"),
        ("https://127.0.0.1:9/videos?sig=secret", r"^https://127.0.0.1:9/videos cannot be listed \((?!.*secret)"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_line(place, words):
    with pytest.raises(UserError, match=words) as raised:
        find_sources(place)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs:// needs the package gcsfs: .*pip install gcsfs$"):
        find_sources("gs://bucket/videos")


def test_files_of_a_list_in_the_working_folder_are_looked_for_there(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"12345")
    (tmp_path / "list.csv").write_text("file\na.mp4\n")
    monkeypatch.chdir(tmp_path)
    assert file_stats(find_sources("list.csv")).sizes.tolist() == [5]


def test_twins_are_named_by_the_first_that_comes_again(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("file,start\na.mp4,1\nb.mp4,1\nc.mp4,2\nb.mp4,1\na.mp4,1\na.mp4,1.0\n")
    with pytest.raises(UserError, match=r"lists 'b\.mp4@1' more than once \(2 such\)"):
        find_sources(path)
    path.write_text("file,start\na.mp4,1\na.mp4,2\na.mp3,2\na.mp4,1.0001\n")
    with pytest.raises(UserError, match=r"gives the id 'a' and one start to several inputs \(2 such\)"):
        find_sources(path)
    path.write_text("file,start\na.mp4,1\nb.mp4,2\nb.mp4,\n")
    with pytest.raises(UserError, match=r"lists 'b' both whole and with a start"):
        find_sources(path)
