"""The numbers every stage agrees on, and the letters that name a tensor's axes.

====== ==========================================================
letter axis
====== ==========================================================
B      batch
K      codebooks (levels of the residual quantiser)
T      codec steps
S      codebook size (entries per codebook)
V      video frames
P      positions of the transformer: V frames, then T codec steps
C      feature channels
D      model width
H      attention heads
E      embedding width
N      audio samples
L      labels
====== ==========================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vab import UserError

NOT_STATED = "not stated"
"""Stands for a hash if nobody stated which weights made imported codes or features."""


@dataclass(frozen=True)
class SegmentSpec:
    """The sizes and rates of a segment. Extraction writes them beside the shards; every checkpoint stores them."""

    segment_seconds: float
    """Length of a segment, s."""
    sample_rate: int
    """Sampling rate of the codec, Hz."""
    code_rate: float
    """Codec steps per second."""
    num_codebooks: int
    """K."""
    codebook_size: int
    """S."""
    code_dim: int
    """Width of one codebook vector."""
    num_steps: int
    """T: codec steps of a whole segment."""
    video_fps: float
    """Encoded video frames per second."""
    num_frames: int
    """V: frames of a whole segment."""
    feature_dim: int
    """C: width of one frame's feature vector."""
    codec: str
    """Name that ``load_codec`` takes."""
    codec_hash: str
    """SHA-256 of the codec's weights, or ``NOT_STATED``."""
    vision: str
    """Name that ``load_vision`` takes."""
    vision_hash: str
    """SHA-256 of the vision encoder's weights, or ``NOT_STATED``."""

    def __post_init__(self) -> None:
        """Refuse numbers that are not positive."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not value > 0:
                raise UserError(f"segment spec: {field.name} must be above 0, got {value}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SegmentSpec:
        """Read a spec back from JSON.

        Raises:
            UserError: If a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
        if missing or unknown:
            raise UserError(f"segment spec: missing fields {missing}, unknown fields {unknown}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return asdict(self)

    def differences(self, other: SegmentSpec) -> list[str]:
        """Every field in which the two differ, as ``name: mine != theirs``."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def require(self, other: SegmentSpec, mine: str, theirs: str) -> None:
        """Require that both specs are equal.

        Args:
            other: The other spec.
            mine: The owner of this spec, such as ``checkpoint``.
            theirs: The owner of the other spec, such as ``shards``.

        Raises:
            UserError: If they differ, with every field in which they do.
        """
        differences = self.differences(other)
        if differences:
            raise UserError(f"{mine} and {theirs} do not fit ({mine} != {theirs}): {'; '.join(differences)}")

    def require_stated(self, *, audio: bool = True, video: bool = True) -> None:
        """Require the hashes of the weights with which media would be encoded. Imported data may lack them.

        Args:
            audio: Whether sound will be encoded or decoded.
            video: Whether frames will be encoded.

        Raises:
            UserError: If a hash is `NOT_STATED`.
        """
        for kind, what, name, weights, wanted in (
            ("codec", "codes", self.codec, self.codec_hash, audio),
            ("vision", "features", self.vision, self.vision_hash, video),
        ):
            if wanted and weights == NOT_STATED:
                raise UserError(
                    f"the checkpoint was trained on imported {what} of {name}, weights {weights}: what is installed "
                    f"may make others of the same media. Import them again with --{kind}_weights FILE or "
                    f"--{kind}_hash SHA256, and train on that"
                )


@dataclass
class Batch:
    """Some records of a data set, as tensors.

    Between the loader and the device, codes and features have the dtypes in which they are stored, a quarter and half
    of the size. ``widened`` converts them to the dtypes below.
    """

    codes: Tensor
    """(B, K, T) int64 in [0, S). Steps from ``steps`` on are padding."""
    features: Tensor
    """(B, V, C) float32. Frames from ``frames`` on are padding."""
    steps: Tensor
    """(B,) int64 in [1, T]: codec steps before the padding."""
    frames: Tensor
    """(B,) int64 in [1, V]: frames before the padding; 0 for a record without video, whose features are zeros."""
    labels: Tensor
    """(B, L) float32 of 0 and 1; L = 0 if the data set has no labels."""
    index: Tensor
    """(B,) int64: the record's number in its data set."""
    valid: Tensor
    """(B,) bool: False for a record that only fills a rank's last evaluation batch and must not be scored."""
    source: Tensor
    """(B,) int64: equal for records that are cut from one recording; for a spliced record, that of its beginning."""
    draw: Tensor
    """(B,) int64: how often training has already drawn the record in this epoch; 0 in evaluation."""
    ragged: bool
    """Whether a record of the batch has fewer than T steps or V frames."""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def lengths(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """``steps`` and ``frames``, or None for both if no record is short: networks are faster without them."""
        return (self.steps, self.frames) if self.ragged else (None, None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})

    def filled_up(self, num_records: int) -> Batch:
        """The batch, filled up to ``num_records`` with copies of its last record that are not ``valid``."""
        if len(self) >= num_records:
            return self
        number = torch.arange(num_records, device=self.index.device)
        taken = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ragged"}
        taken = {name: x[number.clamp(max=len(self) - 1)] for name, x in taken.items()}
        return replace(self, **taken | {"valid": taken["valid"] & (number < len(self))})

    def widened(self) -> Batch:
        """The batch on the same device, with codes as int64 and features as float32."""
        return replace(self, codes=self.codes.to(torch.int64), features=self.features.to(torch.float32))
