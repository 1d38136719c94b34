"""Loading timed: vab's loader beside webdataset's usual pipeline, LitData, and plain reading of the same bytes.

    make bench BENCH=loader

All read the same records (random codes 4 x 500 and features 10 x 768, the paper's sizes) from the page cache, shuffled
and in batches, in the types that are stored. Each figure is the best of some passes, after one that is not counted; a
pass with workers is timed from its second batch on, so that starting processes does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.timing import machine, run_as_program
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.loader import Loader
from vab.data.reading.order import Share, permutation, train_batches
from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.spec import SegmentSpec, UserError

SPEC = SegmentSpec(
    segment_seconds=10.0,
    sample_rate=16000,
    code_rate=50.0,
    num_codebooks=4,
    codebook_size=2048,
    code_dim=128,
    num_steps=500,
    video_fps=1.0,
    num_frames=10,
    feature_dim=768,
    codec="audiogen_16khz",
    codec_hash="of random codes",
    vision="EVA02-L-14-336/merged2b_s6b_b61k",
    vision_hash="of random features",
)


def main(argv: list[str] | None = None) -> None:
    """Measure and print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Make the records, read them in all ways, print the table."""
    if options.records < 4 * options.batch_size or min(options.passes, options.batch_size) < 1:
        raise UserError("records must be at least four batches, passes and batch_size 1 or more")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of webdataset and LitData about how they are called
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        shards, optimized = Path(scratch) / "shards", Path(scratch) / "litdata"
        write_records(shards, options.records)
        urls = sorted(map(str, shards.glob("*.tar")))
        plain = max(_read_plainly(urls, options.records) for _ in range(options.passes + 1))
        rows: list[tuple[str, int, float]] = [("reading the tars' bytes, in order", 0, plain)]
        peers: dict[str, Callable[[int], Callable[[], Iterable[Any]]]] = {
            "webdataset": lambda workers: _webdataset(urls, options, workers),
            "vab": lambda workers: _vab(shards, options, workers),
        }
        if not options.without_litdata:
            _write_litdata(optimized, shards)
            peers["LitData"] = lambda workers: _litdata(optimized, options, workers)
        for workers in options.workers:
            for name, make in peers.items():
                epoch = make(workers)
                rates = [_rate(epoch, options.batch_size) for _ in range(options.passes + 1)]
                del epoch
                gc.collect()  # or its workers would be taken over, and complained of, by those that are forked next
                rows.append((name, workers, max(rates[1:])))
    stock = {workers: rate for name, workers, rate in rows if name == "webdataset"}
    table = Table("what", "workers", "records/s", "of webdataset", "of plain reading")
    for name, workers, rate in rows:
        table.add_row(name, str(workers), f"{rate:.0f}", f"{rate / stock[workers]:.1f}", f"{rate / plain:.2f}")
    Console().print(table)
    figures = [{"what": name, "workers": workers, "records_per_second": rate} for name, workers, rate in rows]
    print(json.dumps({"machine": machine(torch.device("cpu")), "records": options.records, "rows": figures}))


def write_records(folder: Path, count: int) -> None:
    """A data set of random records of the paper's sizes."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, SPEC) as writer:
        for number in range(count):
            name = f"v{number:07d}"
            codes = random.integers(0, SPEC.codebook_size, (SPEC.num_codebooks, SPEC.num_steps), dtype=np.uint16)
            features = random.standard_normal((SPEC.num_frames, SPEC.feature_dim), dtype=np.float32).astype(np.float16)
            meta = {"id": name, "source": name, "start_seconds": 0.0, "labels": [], "loudness_db": -20.0}
            meta |= {"steps": SPEC.num_steps, "frames": SPEC.num_frames}
            writer.add(name, [(make_key(name, 0.0), codes, features, meta)])
        shape = (SPEC.num_codebooks, SPEC.codebook_size, SPEC.code_dim)
        writer.finish(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def _read_plainly(paths: list[str], records: int) -> float:
    """Records/s of reading all bytes of the tars, a MiB at a time, into memory that is there already."""
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return records / (time.perf_counter() - begin)


def _rate(epoch: Callable[[], Iterable[Any]], batch_size: int) -> float:
    """Records/s of one pass."""
    batches = iter(epoch())
    next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch_size / (time.perf_counter() - begin)


class _Epoch(Loader):
    """The training order of one rank."""

    batch_size: int
    epoch = -1

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return self.batches()

    def shares(self) -> Iterator[Share]:
        """All full batches of the epoch."""
        return train_batches(permutation(0, self.epoch, len(self.dataset)), self.batch_size, 1, 0)


def _vab(folder: Path, options: argparse.Namespace, workers: int) -> Callable[[], Iterable[Any]]:
    loader = _Epoch(ShardDataset(folder), workers, pin_memory=False)
    loader.batch_size = options.batch_size
    return lambda: loader


def _webdataset(urls: list[str], options: argparse.Namespace, workers: int) -> Callable[[], Iterable[Any]]:
    import webdataset

    def epoch() -> Iterable[Any]:
        data = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000).decode()
        batches = data.to_tuple("codes.npy", "features.npy", "json").batched(options.batch_size, partial=False)
        loader: Iterable[Any] = webdataset.WebLoader(batches, batch_size=None, num_workers=workers)
        return loader

    return epoch


def _write_litdata(folder: Path, shards: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    data = ShardDataset(shards)
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
    for number in range(len(data)):
        batch = data.gather([number]).arrays()
        writer[number] = {"codes": batch["codes"][0], "features": batch["features"][0]}
    writer.done()
    writer.merge()


def _litdata(folder: Path, options: argparse.Namespace, workers: int) -> Callable[[], Iterable[Any]]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    loader: Iterable[Any] = StreamingDataLoader(data, batch_size=options.batch_size, num_workers=workers)
    return lambda: loader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=20_000, help="of the data set")
    parser.add_argument("--batch_size", type=int, default=128, help="records per batch")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="numbers of reading processes")
    parser.add_argument("--passes", type=int, default=3, help="of which the best counts")
    parser.add_argument("--without_litdata", action="store_true", help="leave that peer out")
    parser.add_argument("--scratch", help="folder for temporary files")
    return parser


if __name__ == "__main__":
    main()
