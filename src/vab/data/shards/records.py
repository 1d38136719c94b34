"""One record: its check against the spec and the vocabulary, and its bytes in a tar."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vab.data.shards.format import (
    KEY_PATTERN,
    MAX_KEY_LENGTH,
    save_array,
)
from vab.spec import SegmentSpec, UserError

Record = tuple[str, np.ndarray, np.ndarray, Mapping[str, Any]]
"""Key, codes, features and description: the arguments of ``RecordPacker.pack``."""


class Packed(NamedTuple):
    """A record as it goes into a tar."""

    key: str
    """From ``make_key``."""
    members: dict[str, bytes]
    """Contents of its files, by field."""
    skips: dict[str, int]
    """Bytes of each that come before the data: the headers of arrays."""
    steps: int
    """Valid steps of the codes."""
    frames: int
    """Valid frames of the features."""
    labels: list[int]
    """Numbers in the vocabulary, sorted."""


class RecordPacker:
    """Checks records against a spec and a vocabulary, and packs them.

    Args:
        spec: The numbers that each record is checked against.
        labels: Vocabulary; a record's labels are names from it.

    Raises:
        UserError: If the format cannot hold such records.
    """

    def __init__(self, spec: SegmentSpec, labels: Sequence[str] = ()) -> None:
        if len(set(labels)) != len(labels):
            raise UserError("label vocabulary: a name occurs twice")
        if spec.codebook_size > 2**16:
            raise UserError(f"codes are stored as uint16: a codebook of {spec.codebook_size} entries does not fit")
        self.spec = spec
        self._numbers = {name: number for number, name in enumerate(labels)}

    def pack(self, key: str, codes: np.ndarray, features: np.ndarray, meta: Mapping[str, Any]) -> Packed:
        """Pack one record.

        Args:
            key: From ``make_key``.
            codes: (K, T) of any integer type, in [0, S), stored as uint16. Steps from ``meta["steps"]`` on are padding.
            features: (V, C) float, finite as float16. Frames from ``meta["frames"]`` on are padding.
            meta: JSON values, stored with the record. Needed: ``id`` (str), ``source`` (str), ``start_seconds`` (s),
                ``steps`` (1..T), ``frames`` (1..V, or 0 without video), ``labels`` (names of the vocabulary).

        Raises:
            UserError: If a value contradicts the spec or the vocabulary, or the key is not allowed.
        """
        spec, where, codes, features = self.spec, f"record {key}", np.asarray(codes), np.asarray(features)
        if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
            raise UserError(f"key {key!r} must be 1 to {MAX_KEY_LENGTH} of A-Z a-z 0-9 _ -: make it with make_key")
        if missing := [
            name for name in ("id", "source", "start_seconds", "steps", "frames", "labels") if name not in meta
        ]:
            raise UserError(f"{where}: its description lacks {missing}")
        for name, values, shape, kind in (
            ("codes", codes, (spec.num_codebooks, spec.num_steps), "integer"),
            ("features", features, (spec.num_frames, spec.feature_dim), "floating"),
        ):
            if values.shape != shape or not np.issubdtype(values.dtype, getattr(np, kind)):
                raise UserError(f"{where}: {name} must be {kind} of shape {shape}, got {values.dtype} {values.shape}")
        with np.errstate(over="ignore"):  # check_values reports infinities
            half = features.astype("<f2", order="C")
        check_values(where, codes, half, meta, spec, self._numbers)
        # C order, in whatever order the arrays lie in memory: records are read back in C order.
        arrays = {"codes.npy": codes.astype("<u2", order="C"), "features.npy": half}
        members = {name: save_array(values) for name, values in arrays.items()}
        skips = {name: len(members[name]) - values.nbytes for name, values in arrays.items()} | {"json": 0}
        members["json"] = json.dumps(dict(meta), sort_keys=True, allow_nan=False).encode()
        labels = sorted({self._numbers[name] for name in meta["labels"]})
        return Packed(key, members, skips, int(meta["steps"]), int(meta["frames"]), labels)


def check_values(
    where: str,
    codes: np.ndarray,
    features: np.ndarray,
    meta: Mapping[str, Any],
    spec: SegmentSpec,
    labels: Container[str] | None,
) -> None:
    """Refuse a record whose values contradict the spec.

    Args:
        where: The record's name in messages.
        codes: (K, T) integers.
        features: (V, C) floats.
        meta: Its description, with ``steps``, ``frames`` and ``labels``.
        spec: Of the data set.
        labels: The vocabulary; None allows any label.

    Raises:
        UserError: At the first value that does not fit.
    """
    if codes.min() < 0 or codes.max() >= spec.codebook_size:
        got = f"{codes.min()}..{codes.max()}"
        raise UserError(f"{where}: codes must be in 0..{spec.codebook_size - 1}, got {got}")
    if not np.isfinite(features).all():
        largest = f"{np.finfo(features.dtype).max:g}"
        raise UserError(f"{where}: features must be finite as {features.dtype}, got NaN or a value above {largest}")
    for name, least, limit in (("steps", 1, spec.num_steps), ("frames", 0, spec.num_frames)):
        if not isinstance(meta[name], int) or not least <= meta[name] <= limit:
            raise UserError(f"{where}: {name} must be in {least}..{limit}, got {meta[name]}")
    if labels is not None and (unknown := [name for name in meta["labels"] if name not in labels]):
        raise UserError(f"{where}: labels {unknown} are not in the data set's vocabulary")
