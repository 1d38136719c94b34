"""Metric cards: everything that a number depends on. Two numbers can be compared if their cards agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

Scalar = str | int | float | bool | None
"""Type of a card's entries: the scalars of JSON."""

_DESCRIPTIVE = frozenset({"generated_set", "vab", "libraries"})
"""Entries that may differ between numbers that are compared."""


@dataclass(frozen=True)
class MetricCard:
    """Everything that one number depends on. An entry without a meaning for the metric is None."""

    metric: str
    """Name, such as fad_vggish."""
    definition: str
    """Formula, variant, constants, unit."""
    better: str
    """``lower`` or ``higher``."""
    direction: str
    """Which side is measured against which."""
    judge: str | None
    """Name of the network."""
    weight_hash: str | None
    """SHA-256 of its weights."""
    conventions: dict[str, Scalar]
    """Of the judge: windows, padding, layer of the embedding, class link."""
    sample_rate: int
    """Of the judge's input, Hz."""
    resampler: str
    """How sounds were resampled to that rate."""
    mono: str
    """How channels were mixed, and whether the waveform's mean was subtracted."""
    length: str
    """How much of each sound was used, and how shorter ones were treated."""
    num_real: int | None
    """Files on the real side; None if the metric does not use it."""
    num_generated: int
    """Files on the generated side."""
    num_real_rows: int | None
    """Embeddings on the real side; more than files if the judge splits sounds into windows."""
    num_generated_rows: int | None
    """Embeddings on the generated side."""
    real_set: str | None
    """SHA-256 over the names and bytes of the real files."""
    generated_set: str
    """The same of the generated files."""
    seed: int | None
    """Of random draws; None if there are none."""
    vab: str
    """Version of vab."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decode, resample and compute."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The card that ``to_dict`` described.

        Raises:
            ValueError: If entries are missing or unknown.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a metric card is a mapping, got {type(values).__name__}")
        names = {entry.name for entry in fields(cls)}
        if names != set(values):
            odd = ", ".join(sorted(names ^ set(values)))
            raise ValueError(f"a metric card has the entries {', '.join(sorted(names))}; missing or unknown: {odd}")
        return cls(**values)


@dataclass(frozen=True)
class Figure:
    """A metric: its value, its standard error over sounds, and its card."""

    value: float
    error: float | None
    """Standard error, if one is defined."""
    card: MetricCard
    details: dict[str, float] = field(default_factory=dict)
    """Related numbers, such as the fit of an extrapolation."""


def differences(a: MetricCard, b: MetricCard) -> list[str]:
    """The entries that make two numbers incomparable, with both values; empty if they can be compared.

    The generated set may differ, and so may versions of libraries, which `remarks` names. Counts and the reference set
    may not.
    """
    return [
        f"{name}: {left} vs {right}"
        for name, left, right in _unlike(a, b)
        if name.partition(".")[0] not in _DESCRIPTIVE
    ]


def remarks(a: MetricCard, b: MetricCard) -> list[str]:
    """The versions that differ between two numbers that can be compared."""
    return [
        f"{name}: {left} vs {right}"
        for name, left, right in _unlike(a, b)
        if name == "vab" or name.startswith("libraries.")
    ]


def _unlike(a: MetricCard, b: MetricCard) -> Iterator[tuple[str, str, str]]:
    """Entries that differ, those of mappings as ``conventions.padding``; hashes are shortened."""
    left, right = _flat(a), _flat(b)
    for name in dict.fromkeys([*left, *right]):
        values = left.get(name), right.get(name)
        if values[0] != values[1]:
            short = name in ("weight_hash", "real_set", "generated_set")
            shown = [str(value)[:12] if short and value else str(value) for value in values]
            yield name, shown[0], shown[1]


def _flat(card: MetricCard) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(card).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
