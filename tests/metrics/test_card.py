import json
from dataclasses import fields, replace

import pytest

from vab.metrics.card import MetricCard, differences, remarks

CARD = MetricCard(
    metric="fad_tiny",
    definition="squared Frechet distance",
    better="lower",
    direction="generated against real",
    judge="tiny",
    weight_hash="a" * 64,
    conventions={"window_seconds": 0.96, "padding": "none"},
    sample_rate=16_000,
    resampler="soxr HQ",
    mono="mean of channels",
    length="first 10 s",
    num_real=400,
    num_generated=398,
    num_real_rows=400,
    num_generated_rows=398,
    real_set="b" * 64,
    generated_set="c" * 64,
    seed=None,
    vab="0.1.0",
    libraries={"torch": "2.8.0", "soxr": "0.5.0"},
)


def test_json_both_ways():
    assert MetricCard.from_dict(json.loads(json.dumps(CARD.to_dict()))) == CARD


@pytest.mark.parametrize("values", [{"metric": "fad"}, {**CARD.to_dict(), "more": 1}, [1]])
def test_what_is_no_card_is_refused(values):
    with pytest.raises(ValueError, match="a metric card"):
        MetricCard.from_dict(values)


def test_equal_cards_do_not_differ():
    assert differences(CARD, replace(CARD)) == remarks(CARD, replace(CARD)) == []


@pytest.mark.parametrize("name", [entry.name for entry in fields(MetricCard)])
def test_every_entry_counts_but_the_generated_set_and_versions(name):
    other = replace(CARD, **{name: {"x": "1"} if isinstance(getattr(CARD, name), dict) else "x"})
    assert bool(differences(CARD, other)) == (name not in ("generated_set", "vab", "libraries"))
    assert bool(remarks(CARD, other)) == (name in ("vab", "libraries"))


def test_differences_name_both_values():
    other = replace(CARD, num_generated=400, conventions={"window_seconds": 1.0, "padding": "none"}, real_set="d" * 64)
    assert differences(CARD, other) == [
        "conventions.window_seconds: 0.96 vs 1.0",
        "num_generated: 398 vs 400",
        f"real_set: {'b' * 12} vs {'d' * 12}",
    ]
