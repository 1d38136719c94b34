"""Metric cards: beside a number, everything that it depends on. Two numbers compare where their cards agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

Scalar = str | int | float | bool | None
"""What a card's entries are: what JSON has, but for its containers."""

_DESCRIPTIVE = frozenset({"generated_set", "vab", "libraries"})
"""Entries that may differ between numbers that compare: what is being compared, and with what it was computed."""


@dataclass(frozen=True)
class MetricCard:
    """What one number is of. An entry that has no meaning for a metric is None."""

    metric: str
    """The figure's name, such as fad_vggish."""
    definition: str
    """What the value is: formula, variant, constants, unit."""
    better: str
    """``lower`` or ``higher``."""
    direction: str
    """Which side is measured against which."""
    judge: str | None
    """Name of the network that listened."""
    weight_hash: str | None
    """SHA-256 of its weights."""
    conventions: dict[str, Scalar]
    """The judge's own: windows, padding, layer of the embedding, class link."""
    sample_rate: int
    """Of what was listened to, Hz."""
    resampler: str
    """By what sounds were brought to that rate."""
    mono: str
    """How channels became one, and whether the waveform's mean was taken off."""
    length: str
    """How much of each sound was heard, and what became of shorter ones."""
    num_real: int | None
    """Files on the real side; None where it does not enter."""
    num_generated: int
    """Files on the generated side."""
    num_real_rows: int | None
    """Embeddings on the real side; more than files where a judge hears windows."""
    num_generated_rows: int | None
    """Likewise on the generated side."""
    real_set: str | None
    """SHA-256 over the names and bytes of the real files."""
    generated_set: str
    """The same of the generated files."""
    seed: int | None
    """Of what is drawn; None where nothing is."""
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
    """A number, how far it would move with other sounds, and what it is."""

    value: float
    error: float | None
    """Standard error, where one is defined."""
    card: MetricCard
    details: dict[str, float] = field(default_factory=dict)
    """What belongs to it, such as the fit of an extrapolation."""


def differences(a: MetricCard, b: MetricCard) -> list[str]:
    """What makes two numbers incomparable: each entry that differs, with both values; empty if they compare.

    The generated set may differ, for that is what is being compared, and so may versions of libraries, which
    `remarks` names. Counts and the reference set may not.
    """
    return [
        f"{name}: {left} vs {right}"
        for name, left, right in _unlike(a, b)
        if name.partition(".")[0] not in _DESCRIPTIVE
    ]


def remarks(a: MetricCard, b: MetricCard) -> list[str]:
    """What differs between two numbers that compare all the same: versions, for the reader to know."""
    return [
        f"{name}: {left} vs {right}"
        for name, left, right in _unlike(a, b)
        if name == "vab" or name.startswith("libraries.")
    ]


def _unlike(a: MetricCard, b: MetricCard) -> Iterator[tuple[str, str, str]]:
    """Entries that differ, with those of mappings one by one as ``conventions.padding``; hashes are shortened."""
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
