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
"""In place of a hash, where nobody said of which weights imported codes or features are."""


@dataclass(frozen=True)
class SegmentSpec:
    """What one segment is made of. Written once by extraction, beside the shards, and carried by every checkpoint."""

    segment_seconds: float
    """Length of a segment, s."""
    sample_rate: int
    """Of the codec, Hz."""
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
    """Frames per second that were encoded."""
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
        """Refuse numbers that no segment can have."""
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
        """Every field in which the two differ, as ``name: mine != theirs``; empty if they agree."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def require(self, other: SegmentSpec, mine: str, theirs: str) -> None:
        """Refuse to bring together what was made for different segments.

        Args:
            other: The other spec.
            mine: What this spec belongs to, such as ``checkpoint``.
            theirs: What the other belongs to, such as ``shards``.

        Raises:
            UserError: With every field in which the two differ.
        """
        differences = self.differences(other)
        if differences:
            raise UserError(f"{mine} and {theirs} do not fit ({mine} != {theirs}): {'; '.join(differences)}")

    def require_stated(self, *, audio: bool = True, video: bool = True) -> None:
        """Refuse to encode media for a model of imported data, where nobody knows with which weights.

        Args:
            audio: Whether sound is to be encoded or decoded.
            video: Whether pictures are.

        Raises:
            UserError: Saying which weights are not known.
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
    """Some records of a data set, as tensors. ``ragged`` says whether any record is shorter than the segment.

    On the way from a loader to the device codes and features are in the types in which they are stored, a quarter and
    half of the size; ``widened`` gives the types that are named here.
    """

    codes: Tensor
    """(B, K, T) int64 in [0, S). Steps at and after ``steps`` are padding."""
    features: Tensor
    """(B, V, C) float32. Frames at and after ``frames`` are padding."""
    steps: Tensor
    """(B,) int64: codec steps that are sound, 1..T."""
    frames: Tensor
    """(B,) int64: frames that are picture, 1..V; 0 for a record of sound alone, whose features are zeros."""
    labels: Tensor
    """(B, L) float32 of 0 and 1; L = 0 where the data set has no labels."""
    index: Tensor
    """(B,) int64: the record's number in its data set."""
    valid: Tensor
    """(B,) bool: False for a record that only fills a rank's last evaluation batch; it must not be scored."""
    source: Tensor
    """(B,) int64: the same number for records that are cut from one recording; of a spliced record its beginning's."""
    draw: Tensor
    """(B,) int64: how often training has drawn the record before in the same epoch; 0 in evaluation."""
    ragged: bool
    """True if a record of the batch has fewer than T steps or V frames."""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def lengths(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """``steps`` and ``frames``, or None for both where no record is short: networks are faster without them."""
        return (self.steps, self.frames) if self.ragged else (None, None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def widened(self) -> Batch:
        """The batch with codes as int64 and features as float32, on the device where it is."""
        return replace(self, codes=self.codes.to(torch.int64), features=self.features.to(torch.float32))

    def _map(self, function: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})
