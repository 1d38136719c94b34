"""Make the weights of the tiny networks: ``python -m tools.tiny_networks --part all --out DIR --minutes 62``.

``--part decoder`` trains the decoder of the codec in DIR further, or of the shipped codec if DIR has none; it leaves
encoder, codebooks and codes as they are. ``--part codec8`` makes the further levels of the codec in DIR. ``all`` makes
the codec, vision and judge, then runs ``decoder`` and ``codec8``. ``--part report`` prints how good the codec is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from tools.tiny_networks.codec_report import codec_report
from tools.tiny_networks.train_codec import make_codec, make_finer_levels, refine_decoder
from tools.tiny_networks.train_judge import make_judge
from tools.tiny_networks.train_vision import make_vision
from tools.tiny_networks.weights import AnyNetwork, levels_to_bytes, weights_to_bytes
from vab.files import write_atomically
from vab.frozen.codec.tiny import TinyCodec, TinyCodec8
from vab.frozen.judges import golden
from vab.frozen.judges.tiny import TinyJudge
from vab.frozen.tiny import shipped_weights

MAKERS: dict[str, tuple[Callable[..., AnyNetwork], float, int]] = {
    "codec": (make_codec, 0.4, 1500),
    "vision": (make_vision, 0.42, 2500),
    "judge": (make_judge, 0.18, 3000),
}
"""Of each part: the function that trains it, its share of the minutes under `all`, and its number of demo segments.

The shipped weights were trained with these settings, 62 minutes in total and one thread. The minutes are wall time, so
another training gives weights that are about as good, not equal bit by bit.
"""

FINER_SEGMENTS = 1500
"""Demo segments that the codec's further levels are clustered on. It takes a few minutes; `minutes` has no effect."""

DECODER_STEPS, DECODER_SEGMENTS = 1000, 1500
"""Steps of ``--part decoder`` (some minutes on one thread), and demo segments that it trains on. The shipped codec was
trained before its output was limited; its decoder was then trained further with the limit."""


def write_weights(path: Path, contents: bytes) -> str:
    """Write a weights file, complete or not at all; returns its SHA-256 in hex."""
    write_atomically(path, contents)
    return hashlib.sha256(contents).hexdigest()


def make_part(part: str, out: Path, minutes: float, segments: int | None = None) -> Path:
    """Train one of the tiny networks and write its weights; each progress report writes a usable file.

    Args:
        part: "codec", "vision" or "judge".
        out: Folder of the file.
        minutes: Wall time of training.
        segments: How many demo segments to train on; the part's default if None.

    Returns:
        Path of the file, named as the package expects it.
    """
    maker, _, default_segments = MAKERS[part]
    segments = segments or default_segments
    path, start = out / f"tiny_{part}.safetensors", time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    made_by = {"maker": f"tools.tiny_networks --part {part}", "minutes": minutes, "segments": segments}

    def on_progress(network: AnyNetwork, step: int, message: str) -> None:
        write_weights(path, weights_to_bytes(network, {**made_by, "steps": step, "unfinished": True}))
        print(f"{part} {(time.monotonic() - start) / 60:.1f} min, step {step}: {message}", flush=True)

    network = maker(minutes, segments, on_progress)
    print(f"{part}: wrote {path}, sha256 {write_weights(path, weights_to_bytes(network, made_by))}", flush=True)
    if part == "judge":
        golden.store(TinyJudge(path), out / "golden")
    return path


def make_decoder(out: Path, steps: int, segments: int | None = None) -> Path:
    """Train the decoder of the tiny codec further: of the one in the folder, or of the shipped one if there is none.

    The file of that codec's further levels names the hash of its codec, so it is written again for the new codec.

    Args:
        out: Folder of the file.
        steps: Training steps.
        segments: How many demo segments to train on; DECODER_SEGMENTS if None.

    Returns:
        Path of the codec's file.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, segments = out / "tiny_codec.safetensors", segments or DECODER_SEGMENTS
    has_codec = path.is_file()
    base = path if has_codec else shipped_weights("codec")
    levels = out / "tiny_codec8.safetensors" if has_codec else shipped_weights("codec8")
    codec, finer = TinyCodec(base), None
    if levels.is_file():
        finer = TinyCodec8(base, levels).codebooks()[codec.num_codebooks :]
        with safe_open(levels, framework="pt") as file:
            levels_made_by = json.loads(file.metadata()["levels"])["made"]
    made_by = {
        "maker": "tools.tiny_networks --part decoder",
        "steps": steps,
        "segments": segments,
        "encoder_and_codebooks_of": codec.weight_hash,
    }
    network = refine_decoder(
        codec, steps, segments, lambda step, message: print(f"decoder step {step}: {message}", flush=True)
    )
    written = write_weights(path, weights_to_bytes(network, made_by))
    if finer is not None:
        write_weights(out / "tiny_codec8.safetensors", levels_to_bytes(finer, written, levels_made_by))
    print(f"decoder: wrote {path}, sha256 {written}", flush=True)
    return path


def make_codec8(out: Path, segments: int | None = None) -> Path:
    """Make the further levels of the tiny codec: of the one in the folder, or of the shipped one if there is none.

    Args:
        out: Folder of the file.
        segments: How many demo segments to cluster; FINER_SEGMENTS if None.

    Returns:
        Path of the file, named as the package expects it.
    """
    out.mkdir(parents=True, exist_ok=True)
    base, path, segments = out / "tiny_codec.safetensors", out / "tiny_codec8.safetensors", segments or FINER_SEGMENTS
    codec = TinyCodec(base if base.is_file() else None)
    levels = make_finer_levels(codec, segments, lambda message: print(f"codec8 {message}", flush=True))
    made_by = {"maker": "tools.tiny_networks --part codec8", "segments": segments}
    written = write_weights(path, levels_to_bytes(levels, codec.weight_hash, made_by))
    print(f"codec8: wrote {path}, sha256 {written}", flush=True)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line on `argv`, or on the process's own arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_networks", description=__doc__)
    parser.add_argument("--part", choices=[*MAKERS, "decoder", "codec8", "all", "report"], required=True)
    parser.add_argument("--out", type=Path, help="folder for the weights; for a report, the folder they are read from")
    parser.add_argument(
        "--minutes",
        type=float,
        default=62.0,
        help="wall time of training; divided among the parts if all are made; no effect on decoder and codec8",
    )
    parser.add_argument("--steps", type=int, default=DECODER_STEPS, help="training steps of decoder")
    parser.add_argument("--segments", type=int, help="demo segments to train on, or to report on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--esc10", type=Path, help="report: folder of sound files")
    parser.add_argument("--av", type=Path, help="report: folder of videos with sound")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.part == "report":
        folders = {"ESC-10": arguments.esc10, "real video": arguments.av}
        print(codec_report(arguments.out, arguments.segments or 300, {k: v for k, v in folders.items() if v}))
        return
    if arguments.out is None:
        parser.error("--out is needed: the folder for the weights")
    for part, (_, share, _) in MAKERS.items():
        if arguments.part in (part, "all"):
            minutes = arguments.minutes * (share if arguments.part == "all" else 1.0)
            make_part(part, arguments.out, minutes, arguments.segments)
    if arguments.part in ("decoder", "all"):
        make_decoder(arguments.out, arguments.steps, arguments.segments)
    if arguments.part in ("codec8", "all"):
        make_codec8(arguments.out, arguments.segments)


if __name__ == "__main__":
    main()
