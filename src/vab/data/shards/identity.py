"""Whose codes and whose features imported arrays are: what a manifest says of the networks that made them.

Nobody can tell from an array which weights made it. What is said of them is what the user says; where a hash is not
said, ``NOT_STATED`` stands in its place, which no network's hash equals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vab.data.shards.format import CODEBOOKS, is_complete, read_manifest
from vab.frozen.codec import CODECS, NUMBERS, load_codec
from vab.frozen.vision import load_vision
from vab.spec import NOT_STATED, SegmentSpec, UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CodecFacts:
    """What shards need of the codec that made their codes."""

    name: str
    """As ``load_codec`` takes it."""
    weight_hash: str
    """SHA-256 of its weights, or ``NOT_STATED``."""
    sample_rate: int
    """Hz."""
    code_rate: float
    """Steps per second."""
    codebooks: Tensor
    """(K, S, code_dim) float32."""

    def steps_for(self, seconds: float) -> int:
        """T of so many seconds: like all codecs here, a step for every hop, the last one begun included."""
        samples = round(seconds * self.sample_rate)
        return -(-samples // round(self.sample_rate / self.code_rate))


@dataclass(frozen=True)
class VisionFacts:
    """What shards need of the vision encoder that made their features."""

    name: str
    """As the user calls it; where media shall be encoded later, as ``load_vision`` takes it."""
    weight_hash: str
    """SHA-256 of its weights, or ``NOT_STATED``."""
    feature_dim: int | None
    """C, where it is known before an array is seen."""
    preprocessing: str
    """In words; ``NOT_STATED`` where the encoder was not loaded."""


def codec_facts(
    name: str, weights: str | None = None, codebooks: str | None = None, weight_hash: str | None = None
) -> CodecFacts:
    """The facts of a codec, from its weights or, without them, from its codebooks.

    Args:
        name: As ``load_codec`` takes it.
        weights: Its file or folder, as ``load_codec`` takes it.
        codebooks: Instead of the weights: ``codebooks.safetensors`` of another data set, whose manifest beside it then
            states the rest, or any .npy or .safetensors with (K, S, code_dim).
        weight_hash: SHA-256 of the weights, where they are not here.

    Raises:
        UserError: If the codec is unknown, or what is given is absent, damaged or contradictory.
    """
    _check_hash("codec", weight_hash)
    if name not in CODECS:
        raise UserError(f"unknown codec {name!r}: codes can be imported of {', '.join(CODECS)}")
    if codebooks is None:
        try:
            codec = load_codec(name, "cpu", weights)
        except UserError as error:
            hint = "; its codebooks alone do, too: --codebooks FILE" if name in NUMBERS and weights is None else ""
            raise UserError(f"{error}{hint}") from error
        _require_same("codec", codec.weight_hash, weight_hash)
        return CodecFacts(name, codec.weight_hash, codec.sample_rate, codec.code_rate, codec.codebooks().cpu())
    if weights is not None:
        raise UserError("--codec_weights and --codebooks say the same: leave one out")
    if name not in NUMBERS:
        raise UserError(f"codec {name} ships with its weights: leave out --codebooks {codebooks}")
    path = Path(codebooks)
    if path.is_dir():
        path /= CODEBOOKS
    table = _read_codebooks(path)
    numbers = NUMBERS[name]
    if path.name == CODEBOOKS and is_complete(path.parent):
        spec = SegmentSpec.from_dict(read_manifest(path.parent)[0]["spec"])
        if spec.codec != name:
            raise UserError(f"--codebooks {path} are those of codec {spec.codec}, not of --codec {name}")
        if spec.codec_hash != NOT_STATED:
            _require_same("codec", spec.codec_hash, weight_hash)
            weight_hash = spec.codec_hash
        numbers = (spec.sample_rate, spec.code_rate, spec.num_codebooks, spec.codebook_size)
    if tuple(table.shape[:2]) != numbers[2:]:
        raise UserError(
            f"--codebooks {path} must be (K, S, code_dim) with K, S = {numbers[2:]} for codec {name}, "
            f"got {tuple(table.shape)}"
        )
    return CodecFacts(name, weight_hash or NOT_STATED, numbers[0], numbers[1], table)


def vision_facts(
    name: str, weights: str | None = None, weight_hash: str | None = None, feature_dim: int | None = None
) -> VisionFacts:
    """The facts of a vision encoder, which is loaded if it ships with the package or its weights are given.

    Args:
        name: What made the features, in the user's words or as ``load_vision`` takes it.
        weights: Its file or folder, as ``load_vision`` takes it.
        weight_hash: SHA-256 of the weights, where they are not here.
        feature_dim: C.

    Raises:
        UserError: If what is given is absent, damaged or contradictory.
    """
    _check_hash("vision", weight_hash)
    if not name.strip():
        raise UserError("--vision must name what made the features")
    if feature_dim is not None and feature_dim < 1:
        raise UserError(f"--feature_dim must be 1 or more, got {feature_dim}")
    if weights is None and name != "tiny" and not name.startswith("local-dir:"):
        return VisionFacts(name, weight_hash or NOT_STATED, feature_dim, NOT_STATED)
    vision = load_vision(name, "cpu", weights)
    _require_same("vision", vision.weight_hash, weight_hash)
    if feature_dim not in (None, vision.feature_dim):
        raise UserError(f"vision encoder {name} has features of {vision.feature_dim} channels, got {feature_dim}")
    return VisionFacts(name, vision.weight_hash, vision.feature_dim, vision.preprocessing)


def _check_hash(kind: str, weight_hash: str | None) -> None:
    if weight_hash is not None and not _SHA256.fullmatch(weight_hash):
        raise UserError(
            f"--{kind}_hash must be a SHA-256, 64 of 0-9 a-f as sha256sum prints it, got {weight_hash!r}; leave it out "
            "where it is not known"
        )


def _require_same(kind: str, found: str, weight_hash: str | None) -> None:
    if weight_hash not in (None, found):
        raise UserError(f"--{kind}_hash is {weight_hash}, but the weights have {found}")


def _read_codebooks(path: Path) -> Tensor:
    """(K, S, code_dim) float32."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                table = torch.from_numpy(np.load(file, allow_pickle=False))
        elif path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            table = next(iter(tensors.values())) if len(tensors) == 1 else tensors["codebooks"]
        else:
            raise UserError(f"--codebooks {path} must be a .npy or .safetensors file, or the folder of a data set")
    except (OSError, ValueError, TypeError, KeyError, EOFError, safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0][:150]
        raise UserError(f"--codebooks {path} cannot be read: {reason}") from error
    if table.ndim != 3 or not table.is_floating_point() or not bool(torch.isfinite(table).all()):
        raise UserError(
            f"--codebooks {path} must be finite floats (K, S, code_dim), got {table.dtype} {tuple(table.shape)}"
        )
    return table.float()
