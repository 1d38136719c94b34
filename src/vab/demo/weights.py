"""Makes the weights of the tiny networks: ``python -m vab.demo.weights --part all --out DIR --minutes 62``.

``--part decoder`` trains the decoder of the codec in DIR further, or of the shipped codec if DIR has none; encoder,
codebooks and codes stay as they are. ``--part codec8`` makes the further levels of the codec in DIR. ``all`` makes the
codec, then its decoder, and ends with codec8. ``--part report`` makes nothing; it prints how good the codec is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from vab.demo.codec_maker import make_codec, make_finer_levels, refine_decoder
from vab.demo.codec_report import codec_report
from vab.demo.judge_maker import make_judge
from vab.demo.vision_maker import make_vision
from vab.frozen.tiny import AnyNetwork, TinyCodec, TinyCodec8, levels_to_bytes, shipped_weights, weights_to_bytes

MAKERS: dict[str, tuple[Callable[..., AnyNetwork], float, int]] = {
    "codec": (make_codec, 0.4, 1500),
    "vision": (make_vision, 0.42, 2500),
    "judge": (make_judge, 0.18, 3000),
}
"""Of each part: its maker, its share of the time when all are made, and how many demo segments it trains on.

So, with 62 minutes on one thread each, the shipped weights were made. Training goes by the clock: made again they will
be about as good, not equal bit by bit.
"""

FINER_SEGMENTS = 1500
"""Demo segments that the codec's further levels are made on, in a few minutes whatever time the other parts get."""

DECODER_STEPS, DECODER_SEGMENTS = 1000, 1500
"""Steps of ``--part decoder``, some minutes on one thread, and demo segments that it trains on. The shipped codec's
encoder and codebooks are older than the limit on its output; its decoder was trained further with the limit."""


def write_weights(path: Path, contents: bytes) -> str:
    """Write a weights file, complete or not at all.

    Args:
        path: Where to.
        contents: Of the file.

    Returns:
        SHA-256 of the file, in hex.
    """
    partial_path = path.with_name(path.name + ".partial")
    with partial_path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)
    return hashlib.sha256(contents).hexdigest()


def make_part(part: str, out: Path, minutes: float, segments: int | None = None) -> Path:
    """Train one of the tiny networks and write its weights; a usable file is there from the first news on.

    Args:
        part: "codec", "vision" or "judge".
        out: Folder of the file.
        minutes: Of training, by the clock.
        segments: How many demo segments to train on; the part's usual number if None.

    Returns:
        Path of the file, named as the package expects it.
    """
    maker, _, usual_segments = MAKERS[part]
    segments = segments or usual_segments
    path, start = out / f"tiny_{part}.safetensors", time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    facts = {"maker": f"vab.demo.weights --part {part}", "minutes": minutes, "segments": segments}

    def on_progress(network: AnyNetwork, step: int, news: str) -> None:
        write_weights(path, weights_to_bytes(network, {**facts, "steps": step, "unfinished": True}))
        print(f"{part} {(time.monotonic() - start) / 60:.1f} min, step {step}: {news}", flush=True)

    network = maker(minutes, segments, on_progress)
    print(f"{part}: wrote {path}, sha256 {write_weights(path, weights_to_bytes(network, facts))}", flush=True)
    return path


def make_decoder(out: Path, steps: int, segments: int | None = None) -> Path:
    """Train the decoder of the tiny codec further: of the one in the folder, or of the shipped one if there is none.

    The further levels of that codec, which name the codec that they belong to, are written again for the new one.

    Args:
        out: Folder of the file.
        steps: Of training.
        segments: How many demo segments to train on; the usual number if None.

    Returns:
        Path of the codec's file.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, segments = out / "tiny_codec.safetensors", segments or DECODER_SEGMENTS
    in_out = path.is_file()
    base = path if in_out else shipped_weights("codec")
    levels = out / "tiny_codec8.safetensors" if in_out else shipped_weights("codec8")
    codec, finer = TinyCodec(base), None
    if levels.is_file():
        finer = TinyCodec8(base, levels).codebooks()[codec.num_codebooks :]
        with safe_open(levels, framework="pt") as file:
            made = json.loads(file.metadata()["levels"])["made"]
    facts = {
        "maker": "vab.demo.weights --part decoder",
        "steps": steps,
        "segments": segments,
        "encoder_and_codebooks_of": codec.weight_hash,
    }
    network = refine_decoder(
        codec, steps, segments, lambda step, news: print(f"decoder step {step}: {news}", flush=True)
    )
    written = write_weights(path, weights_to_bytes(network, facts))
    if finer is not None:
        write_weights(out / "tiny_codec8.safetensors", levels_to_bytes(finer, written, made))
    print(f"decoder: wrote {path}, sha256 {written}", flush=True)
    return path


def make_codec8(out: Path, segments: int | None = None) -> Path:
    """Make the further levels of the tiny codec: of the one in the folder, or of the shipped one if there is none.

    Args:
        out: Folder of the file.
        segments: How many demo segments to make them on; the usual number if None.

    Returns:
        Path of the file, named as the package expects it.
    """
    out.mkdir(parents=True, exist_ok=True)
    base, path, segments = out / "tiny_codec.safetensors", out / "tiny_codec8.safetensors", segments or FINER_SEGMENTS
    codec = TinyCodec(base if base.is_file() else None)
    levels = make_finer_levels(codec, segments, lambda news: print(f"codec8 {news}", flush=True))
    facts = {"maker": "vab.demo.weights --part codec8", "segments": segments}
    written = write_weights(path, levels_to_bytes(levels, codec.weight_hash, facts))
    print(f"codec8: wrote {path}, sha256 {written}", flush=True)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        argv: Arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="python -m vab.demo.weights", description=__doc__)
    parser.add_argument("--part", choices=[*MAKERS, "decoder", "codec8", "all", "report"], required=True)
    parser.add_argument("--out", type=Path, help="folder for the weights; for a report, the folder they are read from")
    parser.add_argument(
        "--minutes",
        type=float,
        default=62.0,
        help="training time; shared out if all are made; decoder and codec8 have no use for it",
    )
    parser.add_argument("--steps", type=int, default=DECODER_STEPS, help="training steps of decoder")
    parser.add_argument("--segments", type=int, help="demo segments to train on, or to report on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
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
