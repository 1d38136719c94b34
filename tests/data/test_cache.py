import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from same_batches import same
from tone_shards import short_spec, write_shards
from vab.cli import main
from vab.data import addresses
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.remote import Cache, local_copy
from vab.data.shards.verify import verify
from vab.files import Lock
from vab.spec import UserError

PIECE = 4096  # so small that files of a test are many pieces
NUM_RECORDS = 40
PROGRAM = textwrap.dedent(
    f"""
    import sys
    from vab.errors import fail
    from vab.data import addresses
    from vab.data.remote import Cache
    from vab.data.reading.dataset import ShardDataset
    from vab.spec import UserError
    addresses.PIECE_BYTES = {PIECE}
    print("begins", flush=True)
    try:
        dataset = ShardDataset(sys.argv[1], cache=Cache(sys.argv[2]))
    except UserError as error:
        fail(str(error))
    print(dataset.read(range(len(dataset))).codes.sum().item())
    """
)


class Server(ThreadingHTTPServer):
    """A web server of a folder on the loopback interface, whose faults a test sets."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent = Counter()  # bytes of each file
        self.asked = Counter()  # requests for each file
        self.cut = Counter()  # how many answers of a file end in the middle
        self.flipped = Counter()  # how many answers of a file have a wrong byte
        self.forbidden = set()  # files that need credentials
        self.ranges = True  # whether parts of files are given
        self.dead = False  # whether nothing is answered
        self.closed_after = None  # bytes of tars, after which answers wait for the gate
        self.gate = threading.Event()
        self.waiting = threading.Event()  # whether an answer waits

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that go away are what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        if server.dead:
            self.close_connection = True
            return
        path = server.folder / self.path.partition("?")[0].strip("/")
        name = path.name
        server.asked[name] += 1
        if name in server.forbidden or not path.is_file():
            self.send_response(403 if name in server.forbidden else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and server.ranges:
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.flipped[name]:
            server.flipped[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if name.endswith(".tar") and server.closed_after is not None:
            server.closed_after -= len(content)
            if server.closed_after < 0:
                server.waiting.set()
                server.gate.wait(60)
        if server.cut[name]:
            server.cut[name] -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        server.sent[name] += len(content)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of three tars."""
    return write_shards(tmp_path_factory.mktemp("made") / "train", short_spec(), NUM_RECORDS, ragged=True)


@pytest.fixture
def server(tmp_path, made):
    """Serves ``/tones/train``, a copy that a test may damage."""
    shutil.copytree(made, tmp_path / "served" / "tones" / "train")
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def address(server):
    return f"{server.address}/tones/train"


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _small_pieces_and_short_pauses(monkeypatch):
    monkeypatch.setattr(addresses, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(addresses, "_FIRST_PAUSE_SECONDS", 0.001)


def sizes(folder):
    """Bytes of each file that is fetched."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".json"}


def start(tmp_path, address, cache):
    program = tmp_path / "fetch.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, program, address, cache.folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def in_use(copy_folder):
    """Whether a process keeps a copy from being deleted."""
    try:
        Lock(copy_folder.with_name(copy_folder.name + ".lock"), wait=False).close()
    except BlockingIOError:
        return True
    return False


def all_same(dataset, folder):
    mine = ShardDataset(folder)
    assert dataset.manifest_hash == mine.manifest_hash
    same(dataset.read(range(len(dataset))), mine.read(range(NUM_RECORDS)))


def test_a_data_set_at_an_address_gives_the_batches_of_the_folder(server, address, cache, made, capfd):
    all_same(ShardDataset(address + "/", cache=cache), made)
    assert {name: server.sent[name] for name in sizes(made)} == sizes(made)
    assert server.asked["manifest.json"] == 1
    assert server.asked["report.json"] == 0  # not in the manifest
    server.asked.clear()
    dataset = ShardDataset(address, cache=cache, levels=2, check_crc=True)
    same(dataset.read([3, 1]), ShardDataset(made, levels=2).read([3, 1]))
    assert dict(server.asked) == {"manifest.json": 1}  # is it still the same there?
    assert dataset.folder.name.startswith("tones_train-")
    assert verify(dataset.folder) == []
    assert torch.equal(dataset.codebooks, ShardDataset(made).codebooks[:2])
    assert capfd.readouterr() == ("", "")  # no terminal, no bar


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_kinds_of_addresses(scheme, cache, made):
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(made), "/tones", recursive=True)
    all_same(ShardDataset(f"file://{made}" if scheme == "file" else "memory://tones", cache=cache), made)


def test_a_query_goes_with_every_file_and_is_nowhere_written_down(server, address, cache, made):
    dataset = ShardDataset(f"{address}?sig=secret", cache=cache)
    all_same(dataset, made)
    assert ShardDataset(address, cache=cache).folder == dataset.folder
    assert not any(b"secret" in path.read_bytes() for path in dataset.folder.iterdir())
    with pytest.raises(UserError) as error:
        ShardDataset(f"{server.address}/nothing?sig=secret", cache=cache)
    assert "secret" not in str(error.value)


def test_a_local_folder_is_copied_if_it_is_asked_for(tmp_path, cache, made, monkeypatch):
    assert ShardDataset(made, cache=cache).folder == made
    dataset = ShardDataset(made, cache=Cache(cache.folder, local=True))
    assert dataset.folder.parent == tmp_path / "cache"
    all_same(dataset, made)
    monkeypatch.setenv("VAB_CACHE", str(tmp_path / "other"))
    assert ShardDataset(f"file://{made}").folder.parent == tmp_path / "other"
    with pytest.raises(UserError, match=r"no folder .*absent: to make a data set"):
        ShardDataset(tmp_path / "absent", cache=Cache(local=True))


def test_a_datamodule_reads_addresses(address, cache, made):
    data = ShardDataModule(train=address, val=address, test=address, cache=cache.folder, cache_gb=1.0)
    assert data.train_dataset.folder == data.val_dataset.folder == data.test_dataset.folder
    all_same(data.test_dataset, made)
    for limit in (-1, float("inf")):
        with pytest.raises(UserError, match=rf"data.cache_gb must be above 0 and finite .*, got {limit}"):
            ShardDataModule(train=address, val=address, cache_gb=limit)
    copied = ShardDataModule(train=str(made), val=str(made), cache=cache.folder, cache_local=True)
    all_same(copied.train_dataset, made)
    assert copied.train_dataset.folder not in (made, data.train_dataset.folder)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_a_copy(context, address, cache, made):
    numbers = [list(range(start, start + 8)) for start in range(0, NUM_RECORDS, 8)]
    loader = DataLoader(
        ShardDataset(address, cache=cache),
        batch_sampler=numbers,
        collate_fn=copy.copy,
        num_workers=1,
        multiprocessing_context=context,
    )
    for batch, wanted in zip(loader, numbers, strict=True):
        same(batch, ShardDataset(made).read(wanted))


def test_a_copy_is_in_use_as_long_as_a_data_set_of_it_exists(address, cache):
    dataset = ShardDataset(address, cache=cache)
    folder = dataset.folder
    sent = pickle.dumps(dataset)
    assert in_use(folder)
    del dataset
    assert not in_use(folder)
    dataset = pickle.loads(sent)
    assert in_use(folder)
    with pytest.raises(UserError, match="levels must be 1 to"):
        ShardDataset(address, levels=99, cache=cache)
    del dataset
    assert not in_use(folder)


def test_a_connection_that_breaks_is_gone_on_with(server, address, cache, made):
    server.cut["shard-000001.tar"], server.cut["codebooks.safetensors"] = 3, 1
    all_same(ShardDataset(address, cache=cache), made)
    size = sizes(made)["shard-000001.tar"]
    assert size < server.sent["shard-000001.tar"] <= size + 3 * PIECE  # at most a piece each time
    assert server.sent["shard-000000.tar"] == sizes(made)["shard-000000.tar"]


def test_a_connection_that_breaks_for_ever_is_one_line_and_what_came_is_kept(server, address, cache, made):
    server.cut["shard-000001.tar"] = 10**6
    with pytest.raises(UserError, match=r"tones/train/shard-000001.tar broke off \(.*\): run it again") as error:
        ShardDataset(address, cache=cache)
    assert "\n" not in str(error.value)
    server.cut.clear()
    server.sent.clear()
    all_same(ShardDataset(address, cache=cache), made)
    assert server.sent["shard-000001.tar"] == sizes(made)["shard-000001.tar"]


def test_a_server_without_parts_of_files(server, address, cache, made):
    server.ranges = False
    server.cut["shard-000001.tar"] = 2
    all_same(ShardDataset(address, cache=cache), made)


def test_a_wrong_byte_is_fetched_again_and_refused_if_it_stays(server, address, cache, made):
    server.flipped["shard-000001.tar"] = 1
    all_same(ShardDataset(address, cache=cache), made)
    assert server.sent["shard-000001.tar"] == 2 * sizes(made)["shard-000001.tar"]
    path = server.folder / "tones" / "train" / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    shutil.rmtree(cache.folder)
    with pytest.raises(UserError) as error:
        ShardDataset(address, cache=cache)
    expected = json.loads((made / "manifest.json").read_bytes())["shards"][2]["sha256"]
    found = re.findall(r"[0-9a-f]{64}", str(error.value))
    assert "tones/train/shard-000002.tar has SHA-256" in str(error.value)
    assert found[1] == expected != found[0]
    assert not list(cache.path.rglob("shard-000002.tar*"))
    assert not list(cache.path.rglob("manifest.json"))


def test_a_copy_that_was_changed_is_mended_also_while_it_is_read(address, cache, made, server):
    dataset = ShardDataset(address, cache=cache)
    before = dataset.read(range(NUM_RECORDS))
    (dataset.folder / "shard-000000.tar").write_bytes(b"short")
    (dataset.folder / "shard-000001.tar").unlink()
    os.utime(dataset.folder / "shard-000002.tar", (1, 1))  # its content is right
    server.sent.clear()
    all_same(ShardDataset(address, cache=cache), made)
    assert server.sent["shard-000002.tar"] == 0
    same(ShardDataset(dataset.folder).read(range(NUM_RECORDS)), before)


@pytest.mark.slow
def test_who_waits_goes_on_with_what_a_killed_process_left(tmp_path, server, address, cache, made, capfd):
    server.closed_after = sum(size for name, size in sizes(made).items() if name.endswith(".tar")) // 2
    process = start(tmp_path, address, cache)
    assert server.waiting.wait(60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ShardDataset, address, cache=cache)
        with pytest.raises(TimeoutError):
            waiting.result(1)
        process.kill()
        process.communicate()
        (folder,) = (path for path in cache.path.iterdir() if path.is_dir())
        assert not (folder / "manifest.json").exists()
        assert 0 < sum(sent for name, sent in server.sent.items() if name.endswith(".tar")) < sum(sizes(made).values())
        server.closed_after = None
        server.gate.set()
        all_same(waiting.result(60), made)
    # What was on its way when the process was killed comes twice: for each tar a piece or two.
    twice = {name: server.sent[name] - size for name, size in sizes(made).items()}
    assert all(0 <= count <= 2 * PIECE for count in twice.values()), twice
    assert capfd.readouterr() == ("", "")


def test_two_processes_fetch_each_file_once(tmp_path, server, address, cache, made):
    processes = [start(tmp_path, address, cache) for _ in range(2)]
    for process in processes:
        out, complaint = process.communicate(timeout=90)
        assert (process.returncode, complaint) == (0, "")
        assert int(out.split()[1]) == ShardDataset(made).read(range(NUM_RECORDS)).codes.sum()
    assert {name: server.sent[name] for name in sizes(made)} == sizes(made)


def test_the_second_sees_the_failure_of_the_first_as_its_own(server, address, cache):
    server.forbidden = {"shard-000000.tar"}
    with ThreadPoolExecutor(2) as pool:
        for failed in [pool.submit(ShardDataset, address, cache=cache) for _ in range(2)]:
            message = r"http.*/shard-000000.tar may not be read \(.*403.*\): check the credentials$"
            with pytest.raises(UserError, match=message):
                failed.result(60)


def test_those_used_longest_ago_make_room(tmp_path, cache, made):
    need = sum(path.stat().st_size for path in made.iterdir() if path.name != "report.json")
    addresses = []
    for name in ("a", "b", "c"):
        shutil.copytree(made, tmp_path / "from" / name)
        addresses.append(f"file://{tmp_path}/from/{name}")
    two = Cache(cache.folder, gb=2.8 * need / 1e9)
    a, b = (ShardDataset(one, cache=two) for one in addresses[:2])
    folders = {"a": a.folder, "b": b.folder}
    with pytest.raises(UserError, match=r"from/c needs .* GB; .* GB are free .* are allowed .* in use take .* GB"):
        ShardDataset(addresses[2], cache=two)
    assert all(verify(folder) == [] for folder in folders.values())
    del a, b
    with pytest.raises(UserError, match=r"are allowed \(--data.cache_gb\): free some"):
        ShardDataset(addresses[2], cache=Cache(cache.folder, gb=0.9 * need / 1e9))
    assert all(folder.is_dir() for folder in folders.values())  # nothing is deleted for nothing
    ShardDataset(addresses[0], cache=two)  # now b is the one used longest ago
    (tmp_path / "cache" / "users-own").mkdir()
    c = ShardDataset(addresses[2], cache=two)
    assert sorted(path.name[:6] for path in cache.path.iterdir() if path.is_dir()) == ["from_a", "from_c", "users-"]
    all_same(c, made)
    all_same(ShardDataset(addresses[1], cache=cache), made)  # without a limit nothing goes
    assert folders["a"].is_dir()


def test_a_disk_that_is_too_small_is_one_line(small_disk, made):
    with pytest.raises(UserError, match=r"needs .* GB; .* GB are free in .*small_disk") as error:
        ShardDataset(f"file://{made}", cache=Cache(str(small_disk)))
    assert "\n" not in str(error.value)
    assert not [path for path in small_disk.iterdir() if path.is_dir()]


def test_a_changed_manifest_is_another_copy(server, address, cache, made):
    before = ShardDataset(address, cache=cache)
    served = server.folder / "tones" / "train"
    shutil.rmtree(served)
    write_shards(served, short_spec(), NUM_RECORDS, seed=5)
    after = ShardDataset(address, cache=cache)
    all_same(after, served)
    assert after.folder != before.folder
    all_same(before, made)


def test_without_the_server_the_copy_of_last_time_is_taken(server, address, cache, made):
    folder = ShardDataset(address, cache=cache).folder
    server.dead = True
    with pytest.warns(UserWarning, match=r"cannot reach http.*going on with the copy of \d{4}-"):
        dataset = ShardDataset(address, cache=cache)
    assert dataset.folder == folder
    all_same(dataset, made)
    with pytest.raises(UserError, match=r"^cannot reach http://127.0.0.1:\d+/tones/val: "):
        ShardDataset(f"{server.address}/tones/val", cache=cache)


BAD_NAMES = [
    "../evil",
    "/evil",
    "a/evil",
    "a\\evil",
    "..",
    ".complete",
    "",
    "evil\n",
    "manifest.json",
    "evil.part",
    3,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_manifest_names_files_of_its_folder_alone(name, server, address, cache):
    path = server.folder / "tones" / "train" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["shards"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"/tones/train: its manifest.json lists"):
        ShardDataset(address, cache=cache)
    assert set(server.asked) == {"manifest.json"}
    assert not cache.path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"].append(m["shards"][0]), "a name that is taken"),
        (lambda m: m["shards"][0].update(bytes=-1), "says -1 bytes"),
        (lambda m: m["shards"][0].update(sha256="0"), "and SHA-256 '0' of shard-000000.tar"),
        (lambda m: m["shards"][0].pop("sha256"), "does not list files with bytes and sha256"),
        (lambda m: m.update(shards=3), "does not list files with bytes and sha256"),
        (lambda m: m["files"].pop("index.npy"), "does not list index.npy"),
        (lambda m: m.update(format_version=99), "has format version 99"),
    ],
)
def test_a_manifest_that_says_too_little_is_refused(change, message, server, address, cache):
    path = server.folder / "tones" / "train" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        ShardDataset(address, cache=cache)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{}/tones/nothing", "no data set at {}/tones/nothing: it has no manifest.json"),
        ("foo://bucket/x", "foo://bucket/x: cannot read foo:// addresses; the kinds are http"),
        ("simplecache::s3://bucket/x", "simplecache::s3://bucket/x: cannot read simplecache::s3:// addresses"),
        ("{}/x::file:///etc", "{}/x::file:///etc: addresses within addresses"),
        ("https://", "https:// names no folder"),
        ("file:///nowhere/at/all", "no data set at file:///nowhere/at/all"),
    ],
)
def test_a_wrong_address_is_one_line(wrong, message, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        main(["shards", "info", wrong.format(server.address)])
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: " + message.format(server.address))
    assert complaint.count("\n") == 1


def test_a_package_that_is_not_installed_is_named(cache):
    with contextlib.suppress(ImportError):
        import s3fs  # noqa: F401

        pytest.skip("s3fs is installed")
    with pytest.raises(UserError, match=r"^s3:// needs the package s3fs: .*pip install s3fs$"):
        local_copy("s3://bucket/x", cache)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, made):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep a copy of file://.*: give a folder that can be written") as error:
        ShardDataset(f"file://{made}", cache=Cache(str(tmp_path / "file")))
    assert "\n" not in str(error.value)


def test_commands_take_addresses(address, tmp_path, made, capsys, monkeypatch):
    monkeypatch.setenv("VAB_CACHE", str(tmp_path / "cache"))
    main(["shards", "verify", address])
    assert capsys.readouterr().out == f"{address}: {NUM_RECORDS} records, all as the manifest says\n"
    main(["shards", "info", address])
    shown = json.loads(capsys.readouterr().out)
    main(["shards", "info", str(made)])
    assert shown == json.loads(capsys.readouterr().out) | {"folder": shown["folder"]}
    assert shown["folder"].startswith(str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        main(["shards", "index", address])
    assert "tars are indexed where they lie" in capsys.readouterr().err


def test_a_terminal_sees_a_bar(address, cache, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    ShardDataset(address, cache=cache)
    shown = capfd.readouterr()
    assert f"fetching {address}" in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.err)
    assert "/s" in shown.err
    assert shown.out == ""
