"""What is kept of a known sound: spans of seconds, the codec steps within them, and the joint with generated sound."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vab.generation.request import parse_spans, steps_within
from vab.generation.sound import splice
from vab.spec import UserError

COUNT = 400


@st.composite
def sample_spans(draw, count=COUNT):
    """Sorted spans of samples that do not touch."""
    edges = sorted(draw(st.lists(st.integers(0, count), max_size=10, unique=True)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("0-2,5-", [(0, 2), (5, 8)]),
        ("-2", [(0, 2)]),
        ("5-", [(5, 8)]),
        (" 1.5 - 2.25 ", [(1.5, 2.25)]),
        (".5-1.,3-4", [(0.5, 1), (3, 4)]),
        ("5-6,0-1", [(0, 1), (5, 6)]),
        ("0-3,2-4,4-5", [(0, 5)]),
        ("1-7,2-3", [(1, 7)]),
        ("0-8.05", [(0, 8)]),
    ],
)
def test_spans_are_read_sorted_and_merged(text, spans):
    assert parse_spans(text, 8.0) == spans


@given(pairs=st.lists(st.tuples(st.integers(0, 79), st.integers(1, 80)).filter(lambda p: p[0] < p[1]), min_size=1))
def test_merged_spans_cover_what_the_single_ones_do(pairs):
    spans = parse_spans(",".join(f"{a / 10}-{b / 10}" for a, b in pairs), 8.0)
    for tenth in range(80):
        moment = tenth / 10 + 0.05
        assert any(a <= moment < b for a, b in spans) == any(a / 10 <= moment < b / 10 for a, b in pairs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is none"),
        ("-", "'-' is none"),
        ("5", "'5' is none"),
        ("0-2;5-", "'0-2;5-' is none"),
        ("0-2,,5-", "'' is none"),
        ("a-b", "'a-b' is none"),
        ("1--2", "'1--2' is none"),
        ("1-nan", "'1-nan' is none"),
        ("2-2", "span 2-2 is empty"),
        ("3-2", "span 3-2 is empty"),
        ("8-", "span 8- lies beyond the sound, which ends at 8.00 s"),
        ("0-1,7-9", "span 7-9 lies beyond the sound, which ends at 8.00 s"),
    ],
)
def test_what_is_no_span_is_named(text, words):
    with pytest.raises(UserError) as problem:
        parse_spans(text, 8.0)
    assert words in str(problem.value)
    assert "\n" not in str(problem.value)


@given(spans=sample_spans(), per_step=st.integers(3, 40), count=st.integers(1, COUNT))
def test_a_step_is_known_if_all_its_samples_are_kept(spans, per_step, count):
    spans = [(first, min(last, count)) for first, last in spans if first < count]
    kept = torch.zeros(count, dtype=torch.bool)
    for first, last in spans:
        kept[first:last] = True
    steps = math.ceil(count / per_step)
    expected = [bool(kept[step * per_step : (step + 1) * per_step].all()) for step in range(steps)]
    assert steps_within(spans, steps, count, per_step).tolist() == expected


@given(spans=sample_spans(), fade=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_splice_keeps_what_is_kept_and_fades_beside_it(spans, fade, seed):
    made, known = torch.randn(2, COUNT, generator=torch.Generator().manual_seed(seed))
    joined = splice(made, known, spans, fade)
    near = torch.zeros(COUNT, dtype=torch.bool)
    for first, last in spans:
        assert torch.equal(joined[first:last], known[first:last])
        near[max(0, first - fade) : last + fade] = True
    assert torch.equal(joined[~near], made[~near])
    assert (joined <= torch.maximum(made, known) + 1e-5).all()  # equal gain: never above both
    assert (joined >= torch.minimum(made, known) - 1e-5).all()
    assert torch.allclose(splice(made, made, spans, fade), made, atol=1e-6)  # nor any change of level


def test_a_fade_has_no_step():
    """From 0 to 1 over ``fade`` samples a raised cosine moves by at most pi / (2 fade) a sample."""
    fade = 100
    joined = splice(torch.zeros(COUNT), torch.ones(COUNT), [(0, 50), (300, 400)], fade)
    assert joined.diff().abs().max() <= math.pi / (2 * fade) + 1e-6
    assert joined[175] == 0


def test_two_fades_share_a_gap_that_is_too_short_for_both():
    joined = splice(torch.zeros(COUNT), torch.ones(COUNT), [(0, 50), (60, 400)], 20)
    assert torch.allclose(joined[50:60], joined[50:60].flip(0))
    assert joined.diff().abs().max() <= math.pi / (2 * 5) + 1e-6


def test_where_the_known_sound_ends_there_is_no_step():
    time = torch.arange(COUNT) / 100
    made, known = torch.sin(time) + 0.5, torch.sin(time)[:250]
    joined = splice(made, known, [(100, 250)], 40)
    assert torch.equal(joined[100:250], known[100:])
    assert joined.diff().abs().max() < 0.04
    assert torch.equal(joined[290:], made[290:])
