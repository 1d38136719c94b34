"""What every decoding must keep: the oracle, the known codes, the counts, the independence of records."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vab.spec import UserError
from vab.tokens.decoding import (
    decode,
    floor_share,
    least_confident,
    low_discrepancy_ranks,
    num_hidden_after,
    sample_codes,
)
from vab.tokens.noise import Stream, fold_in, gumbel, record_keys, uniform
from vab.tokens.sampler import Sampler

K, T, S = 2, 9, 13
PLAIN = Sampler(guidance_scale=1.0)


def oracle(codes):
    """A network that knows the answer, in as many copies as it is asked for."""

    def codes_to_logits(_, mask, drop_features):
        return 30 * F.one_hot(codes.repeat(len(mask) // len(codes), 1, 1), S).float()

    return codes_to_logits


def opinion(codes, mask, drop_features):
    """A network whose logits depend on everything it may see of its own row, and on nothing else."""
    level, step, entry = torch.arange(K)[:, None, None], torch.arange(T)[:, None], torch.arange(S)
    seen = torch.where(mask, -1, codes)  # (R, K, T)
    context = (seen * (level + 1)[..., 0]).sum(1, keepdim=True) + 3 * seen.roll(1, dims=-1)  # (R, K, T), whole numbers
    phase = context[..., None] + level * 2 + step + entry * entry + 5 * drop_features[:, None, None, None]
    return 2 * torch.sin(phase.double()).float()


def all_hidden(batch):
    return torch.zeros(batch, K, T, dtype=torch.int64), torch.ones(batch, K, T, dtype=torch.bool)


any_sampler = {
    "decode_steps": st.one_of(st.integers(1, 64), st.lists(st.integers(1, 20), min_size=1, max_size=K)),
    "temperature": st.sampled_from([0.0, 0.7, 1.0]),
    "top_k": st.sampled_from([None, 1, 4, 256]),
    "choice_temperature": st.sampled_from([0.0, 4.5, 15.5]),
    "guidance_scale": st.sampled_from([0.0, 1.0, 5.0]),
    "top_p": st.sampled_from([0.3, 0.9, 1.0]),
    "order": st.sampled_from(["confidence", "random", "van_der_corput", "halton"]),
    "guidance": st.sampled_from(["constant", "ramp", "anneal"]),
    "remask": st.sampled_from(["none", "cap", "rescale", "loop"]),
    "remask_strength": st.sampled_from([0.02, 0.3, 1.0]),
}
samplers = st.builds(Sampler, **any_sampler)
samplers_that_keep = st.builds(Sampler, **any_sampler | {"remask": st.just("none")})
seeds = st.integers(0, 10_000)


@settings(max_examples=30, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_an_oracle_is_decoded_exactly(sampler, seed):
    torch.manual_seed(seed)
    answer = torch.randint(0, S, (2, K, T))
    mask = torch.rand(2, K, T) < torch.rand(2, 1, 1)
    codes = answer.masked_fill(mask, -7)
    assert torch.equal(decode(oracle(answer), codes, mask, sampler, record_keys(seed, torch.arange(2))), answer)


@settings(max_examples=30, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_known_codes_stay_and_nothing_stays_hidden(sampler, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, S, (3, K, T))
    mask = torch.rand(3, K, T) < torch.tensor([0.0, 0.3, 1.0])[:, None, None]
    result = decode(opinion, codes.masked_fill(mask, -7), mask, sampler, record_keys(seed, torch.arange(3)))
    assert torch.equal(result[~mask], codes[~mask])
    assert ((result >= 0) & (result < S)).all()


def watched_decoding(sampler, mask, seed):
    """What the network was shown in each pass: codes and mask, without the guidance's second rows."""
    seen = []

    def watched(codes, mask, drop_features):
        seen.append((codes[: len(codes) // sampler.passes].clone(), mask[: len(mask) // sampler.passes].clone()))
        return opinion(codes, mask, drop_features)

    codes = torch.randint(0, S, mask.shape)
    result = decode(watched, codes, mask, sampler, record_keys(seed, torch.arange(len(mask))))
    return codes, [*seen, (result, torch.zeros_like(mask))]


@settings(max_examples=40, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_the_network_sees_the_scheduled_counts(sampler, seed):
    torch.manual_seed(seed)
    mask = torch.rand(3, K, T) < torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    mask[:, 0, 0] = True
    _, seen = watched_decoding(sampler, mask, seed)
    assert len(seen) == sampler.total_steps + 1
    number = 0
    for stage in sampler.stages(K):
        initial = mask[:, stage.first_level : stage.end_level].flatten(1).sum(1).tolist()
        for record, count in enumerate(initial):
            current = count
            for step in range(stage.steps):
                hidden = seen[number + step][1][record]
                assert hidden[stage.first_level : stage.end_level].sum() == current
                assert torch.equal(hidden[stage.end_level :], mask[record, stage.end_level :])  # finer: yet to come
                assert not hidden[: stage.first_level].any()  # coarser: done
                wanted = math.floor(sampler.hidden_ratio(step, stage.steps) * count)
                stays = sampler.remask == "loop" and sampler.remask_share(step, stage.steps) > 0
                current = min(max(wanted, 1), current if stays else max(current - 1, 0))
                if step + 1 == stage.steps:
                    current = 0
        number += stage.steps


@settings(max_examples=40, deadline=None)
@given(sampler=samplers_that_keep, seed=seeds)
def test_what_is_filled_stays_without_remasking(sampler, seed):
    torch.manual_seed(seed)
    mask = torch.rand(3, K, T) < torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    _, seen = watched_decoding(sampler, mask, seed)
    for (codes, hidden), (later_codes, later_hidden) in itertools.pairwise(seen):
        assert not (later_hidden & ~hidden).any()
        assert torch.equal(later_codes[~hidden], codes[~hidden])


@settings(max_examples=40, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_what_was_known_is_never_hidden_nor_changed(sampler, seed):
    torch.manual_seed(seed)
    mask = torch.rand(3, K, T) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    known, seen = watched_decoding(sampler, mask, seed)
    for codes, hidden in seen:
        assert not (hidden & ~mask).any()
        assert torch.equal(codes[~mask], known[~mask])


@pytest.mark.parametrize(
    ("remask", "strength", "expected"),
    [
        # floor(cos(pi/2 (i + 1) / 4) 100) stay hidden: 92, 70, 38, 0; filled before each pass: 0, 8, 30, 62.
        ("none", 0.5, [0, 0, 0, 0]),
        ("cap", 0.5, [0, 4, 15, 0]),
        ("cap", 1.0, [0, 8, 30, 0]),
        ("rescale", 0.5, [0, 4, 15, 0]),
        ("rescale", 0.1, [0, 0, 3, 0]),
    ],
)
def test_remasking_hides_as_many_again_as_said(remask, strength, expected):
    mask = torch.ones(1, 4, 25, dtype=torch.bool)
    sampler = Sampler(4, remask=remask, remask_strength=strength, guidance_scale=1.0)
    hidden = []

    def flat(codes, mask, drop_features):
        hidden.append(mask)
        return torch.zeros(*codes.shape, S)

    decode(flat, torch.zeros(1, 4, 25, dtype=torch.int64), mask, sampler, torch.tensor([5]))
    hidden.append(torch.zeros_like(mask))
    assert [int((later & ~now).sum()) for now, later in itertools.pairwise(hidden)] == expected
    assert [int(now.sum()) for now in hidden] == [100, 92, 70, 38, 0]


def test_remasking_caps_where_little_is_left_and_rescales_there():
    # 16 passes, 2000 codes: before the last but one 1804 are filled and 390 hidden; 196 stay.
    counts = {}
    for remask in ("cap", "rescale"):
        hidden = []

        def flat(codes, mask, drop_features, hidden=hidden):
            hidden.append(mask)
            return torch.zeros(*codes.shape, 3)

        codes, mask = torch.zeros(1, 4, 500, dtype=torch.int64), torch.ones(1, 4, 500, dtype=torch.bool)
        sampler = Sampler(16, remask=remask, remask_strength=0.2, guidance_scale=1.0)
        decode(flat, codes, mask, sampler, torch.tensor([5]))
        counts[remask] = int((hidden[15] & ~hidden[14]).sum())
    assert counts == {"cap": 196, "rescale": 39}  # min(floor(0.2 * 1610), 196); floor(0.2 * min(1610, 196))


def test_the_loop_pauses_with_a_tenth_hidden():
    sampler = Sampler(20, remask="loop")
    ratios = [sampler.hidden_ratio(step, 20) for step in range(20)]
    assert ratios == sorted(ratios, reverse=True)
    assert [ratio == pytest.approx(0.1) for ratio in ratios] == [False] * 8 + [True] * 11 + [False]
    shares = [sampler.remask_share(step, 20) for step in range(20)]
    assert shares == [0.0] * 9 + [0.05] * 10 + [0.0]


@settings(max_examples=12, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_a_record_does_not_see_its_batch(sampler, seed):
    torch.manual_seed(seed)
    codes, mask = torch.randint(0, S, (7, K, T)), torch.rand(7, K, T) < 0.8
    keys, steps = record_keys(seed, torch.arange(7)), torch.randint(1, T + 1, (7,))
    whole = decode(opinion, codes, mask, sampler, keys, steps)  # a batch of seven
    for rows in ([0], [6, 3]):
        assert torch.equal(decode(opinion, codes[rows], mask[rows], sampler, keys[rows], steps[rows]), whole[rows])


def test_padding_is_returned_as_it_came():
    codes, mask = torch.full((3, K, T), 99), torch.ones(3, K, T, dtype=torch.bool)
    steps = torch.tensor([1, 6, T])
    seen = []

    def watched(codes, mask, drop_features):
        seen.append(mask)
        return opinion(codes, mask, drop_features)

    result = decode(watched, codes, mask, PLAIN, record_keys(0, torch.arange(3)), steps)
    is_padding = (torch.arange(T) >= steps[:, None])[:, None].expand_as(mask)
    assert (result[is_padding] == 99).all()
    assert (result[~is_padding] < S).all()
    assert not seen[0][is_padding].any()


def test_masked_counts_of_the_paper():
    initial = current = torch.tensor([2000])
    counts = []
    for step in range(16):
        current = num_hidden_after(Sampler().hidden_ratio(step, 16), initial, current)
        counts.append(current.item())
    assert counts == [1990, 1961, 1913, 1847, 1763, 1662, 1546, 1414, 1268, 1111, 942, 765, 580, 390, 196, 0]


@pytest.mark.parametrize("decode_steps", [1, 2, 3, 12, 16, 36, 64])
def test_counts_for_every_number_of_codes(decode_steps):
    initial = current = torch.arange(6001)
    for step in range(decode_steps):
        ratio = math.cos(math.pi / 2 * (step + 1) / decode_steps)
        wanted = torch.tensor([math.floor(ratio * count) for count in range(6001)])
        expected = torch.minimum(wanted.clamp(min=1), current - 1).clamp(min=0)  # at least one is revealed, one is left
        if step + 1 == decode_steps:
            expected = torch.zeros_like(initial)
        current = num_hidden_after(Sampler().hidden_ratio(step, decode_steps), initial, current)
        assert torch.equal(current, expected)
    assert not current.any()


def test_shares_are_floors():
    assert floor_share(torch.arange(7), 0.5).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert floor_share(torch.arange(4), 1.0).tolist() == [0, 1, 2, 3]


def test_levels_are_filled_one_after_the_other():
    stages = Sampler([5, 2, 1, 1]).stages(4)
    assert [(stage.first_level, stage.end_level, stage.steps) for stage in stages] == [
        (0, 1, 5),
        (1, 2, 2),
        (2, 3, 1),
        (3, 4, 1),
    ]
    # A fine stage's list, shorter by its conditioning levels: those belong to the first entry, with nothing to fill.
    assert [(stage.first_level, stage.end_level) for stage in Sampler([5, 2]).stages(4)] == [(0, 3), (3, 4)]
    assert Sampler(7).stages(4)[0].end_level == 4
    with pytest.raises(UserError, match="lists 3 levels, but the codes have 2"):
        Sampler([1, 1, 1]).stages(2)


@pytest.mark.parametrize("order", ["van_der_corput", "halton"])
@pytest.mark.parametrize(("levels", "steps"), [(1, 1), (1, 8), (4, 500), (2, 9), (12, 37)])
def test_low_discrepancy_orders_visit_everything_once(order, levels, steps):
    ranks = low_discrepancy_ranks(order, levels, steps)
    assert ranks.shape == (levels, steps)
    assert ranks.flatten().sort().values.tolist() == list(range(levels * steps))


def test_van_der_corput_reads_bits_backwards_level_by_level():
    assert low_discrepancy_ranks("van_der_corput", 2, 8).tolist() == [
        [0, 4, 2, 6, 1, 5, 3, 7],
        [8, 12, 10, 14, 9, 13, 11, 15],
    ]
    assert low_discrepancy_ranks("halton", 1, 8).tolist() == [[0, 4, 2, 6, 1, 5, 3, 7]]
    # Bases 2 and 3: (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), ...
    halton = low_discrepancy_ranks("halton", 3, 4)
    assert halton[0, 0] == 0
    assert halton[1, 2] == 1
    assert halton[2, 1] == 2
    assert halton[0, 3] == 3


@pytest.mark.parametrize("order", ["van_der_corput", "halton"])
def test_a_low_discrepancy_order_leaves_no_long_gap(order):
    # After n of T moments of a level, no gap is longer than a few times T / n; at random it is about log(n) times.
    first = 60
    visited = (low_discrepancy_ranks(order, 1, 500)[0] < first).nonzero().flatten()
    gaps = torch.diff(torch.cat([visited, visited[:1] + 500]))
    assert gaps.max() <= 2.1 * 500 / first


@pytest.mark.parametrize("order", ["van_der_corput", "halton"])
def test_records_take_their_own_turn_of_the_sequence(order):
    mask = torch.ones(6, 1, 64, dtype=torch.bool)
    hidden = []

    def flat(codes, mask, drop_features):
        hidden.append(mask)
        return torch.zeros(*codes.shape, S)

    sampler = Sampler(8, order=order, guidance_scale=1.0)
    decode(flat, torch.zeros(6, 1, 64, dtype=torch.int64), mask, sampler, record_keys(0, torch.arange(6)))
    revealed = ~hidden[4]
    assert revealed.flatten(1).unique(dim=0).shape[0] > 1
    for row in revealed[:, 0]:  # the same pattern, turned in time
        assert any(torch.equal(row.roll(shift), revealed[0, 0]) for shift in range(64))


def test_the_random_order_has_no_preference():
    sure = torch.arange(K * T, dtype=torch.float32).view(1, K, T, 1) * F.one_hot(torch.tensor(5), S)
    hidden = []

    def codes_to_logits(codes, mask, drop_features):
        hidden.append(mask)
        return sure.expand(len(codes), K, T, S)

    codes, mask = all_hidden(4000)
    decode(codes_to_logits, codes, mask, Sampler(2, order="random", guidance_scale=1.0), torch.arange(4000))
    share = hidden[1].float().mean(0).flatten()
    assert (share - math.floor(math.cos(math.pi / 4) * K * T) / (K * T)).abs().max() < 0.04  # five standard errors


@pytest.mark.parametrize("decode_steps", [4, [3, 1]])
def test_guidance_schedules(decode_steps):
    def scales(guidance):
        sampler = Sampler(decode_steps, guidance_scale=5.0, guidance=guidance)
        passes = [(step, stage.steps) for stage in sampler.stages(K) for step in range(stage.steps)]
        return [sampler.guidance_at(number, *place) for number, place in enumerate(passes)]

    assert scales("constant") == [5.0] * 4
    assert scales("ramp") == pytest.approx([1, 1 + 4 / 3, 1 + 8 / 3, 5])
    if decode_steps == 4:
        assert scales("anneal") == pytest.approx([1 + 4 * math.cos(math.pi / 2 * i / 4) for i in range(4)])
    else:
        assert scales("anneal") == pytest.approx([1 + 4 * math.cos(math.pi / 2 * i / 3) for i in range(3)] + [5])
    assert Sampler(1, guidance="ramp").guidance_at(0, 0, 1) == 5.0


@pytest.mark.parametrize("guidance", ["constant", "ramp", "anneal"])
def test_guidance_schedules_act_in_the_passes(guidance):
    # Guided logits of two codes are 0 and scale - 2: the greedy code tells on which side of 2 the scale is.
    def codes_to_logits(codes, mask, drop_features):
        with_video = (~drop_features).float()[:, None, None, None].expand(*codes.shape, 1)
        return torch.cat([torch.zeros_like(with_video), with_video - 2], dim=-1)

    sampler = Sampler(4, temperature=0.0, guidance_scale=2.5, guidance=guidance)
    result = decode(codes_to_logits, *all_hidden(1), sampler, torch.tensor([1]))
    expected = {"constant": {1}, "ramp": {0, 1}, "anneal": {0, 1}}[guidance]
    assert set(result.flatten().tolist()) == expected


def test_least_confident_counts_exactly_also_where_all_are_equal():
    chosen = least_confident(torch.zeros(3, 2, 5), torch.tensor([0, 4, 10]))
    assert chosen.flatten(1).sum(1).tolist() == [0, 4, 10]
    assert chosen[1].flatten().tolist() == [True] * 4 + [False] * 6
    confidence = torch.tensor([[[3.0, -1.0, torch.inf], [0.0, torch.inf, -2.0]]])
    assert least_confident(confidence, torch.tensor([3])).tolist() == [[[False, True, False], [True, False, True]]]


def test_the_most_confident_codes_are_kept_first_without_noise():
    certainty = torch.arange(K * T, dtype=torch.float32).view(1, K, T, 1)  # later positions are surer
    seen = []

    def codes_to_logits(codes, mask, drop_features):
        seen.append(mask)
        return certainty * F.one_hot(torch.tensor(5), S)

    codes, mask = all_hidden(1)
    decode(codes_to_logits, codes, mask, Sampler(4, 0.0, None, 0.0, 1.0), torch.tensor([1]))
    for hidden in seen[1:]:
        count = int(hidden.sum())
        assert torch.equal(hidden.flatten(), torch.arange(K * T) < count)


def test_choice_noise_spreads_the_order():
    def orders(choice_temperature):
        seen = []

        def codes_to_logits(codes, mask, drop_features):
            seen.append(mask)
            return torch.zeros(50, K, T, 1) + 0.1 * torch.arange(K * T).view(K, T, 1) * F.one_hot(torch.tensor(5), S)

        codes, mask = all_hidden(50)
        sampler = Sampler(8, 0.0, None, choice_temperature, 1.0)
        decode(codes_to_logits, codes, mask, sampler, record_keys(0, torch.arange(50)))
        return seen

    assert orders(0.0)[4].flatten(1).unique(dim=0).shape[0] == 1
    assert orders(15.5)[4].flatten(1).unique(dim=0).shape[0] > 40


def test_temperature_zero_takes_the_likeliest():
    logits, numbers = torch.randn(4, 5, S), torch.rand(4, 5)
    assert torch.equal(sample_codes(logits, numbers, 0.0, None), logits.argmax(-1))
    assert torch.equal(sample_codes(logits, numbers, 1.0, 1), logits.argmax(-1))
    codes, mask = all_hidden(2)
    one, other = (
        decode(opinion, codes, mask, Sampler(8, 0.0, 256, 0.0, 5.0), record_keys(seed, torch.arange(2)))
        for seed in (0, 1)
    )
    assert torch.equal(one, other)  # without choice noise nothing is left to chance


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.0, 5), (2.0, 3), (1.0, S), (1.0, 99)])
def test_codes_are_drawn_by_their_probability(temperature, top_k):
    logits = 1.5 * torch.randn(S)
    numbers = (torch.arange(100_000) + 0.5) / 100_000  # every part of (0, 1) equally often
    drawn = sample_codes(logits.expand(100_000, S), numbers, temperature, top_k)
    scaled = logits.double() / temperature
    if top_k is not None and top_k < S:
        scaled = scaled.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    expected = scaled.softmax(0)
    shares = torch.bincount(drawn, minlength=S) / 100_000
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_draws_among_the_fewest_that_reach_it(top_k, top_p):
    logits = 1.5 * torch.randn(S)
    numbers = (torch.arange(100_000) + 0.5) / 100_000
    drawn = sample_codes(logits.expand(100_000, S), numbers, 1.0, top_k, top_p)
    probability = logits.double().softmax(0)
    order = probability.argsort(descending=True)[:top_k]
    probability[[i for i in range(S) if i not in order]] = 0
    probability /= probability.sum()
    kept = order[: int((probability[order].cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros(S, dtype=torch.float64)
    expected[kept] = probability[kept] / probability[kept].sum()
    shares = torch.bincount(drawn, minlength=S) / 100_000
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2e-5)


def test_a_code_of_no_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -200.0, 0.0, -torch.inf])
    extremes = torch.tensor([2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    for top_k in (None, 4):
        assert set(sample_codes(logits.expand(5, 6), extremes, 1.0, top_k).tolist()) == {1, 4}


def test_seeds_and_records_differ():
    codes, mask = all_hidden(4)
    one, other = (decode(opinion, codes, mask, PLAIN, record_keys(seed, torch.arange(4))) for seed in (0, 1))
    assert len({tuple(result.flatten().tolist()) for result in (*one, *other)}) == 8
    again = decode(opinion, codes, mask, PLAIN, record_keys(0, torch.arange(4)))
    assert torch.equal(again, one)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 5.0])
def test_guidance_is_u_plus_w_times_c_minus_u(scale):
    conditional, unconditional = torch.randn(2, 1, K, T, S)

    def codes_to_logits(codes, mask, drop_features):
        return torch.where(drop_features[:, None, None, None], unconditional, conditional)

    codes, mask = all_hidden(2)
    sampler = Sampler(1, temperature=0.0, guidance_scale=scale)
    expected = (unconditional + scale * (conditional - unconditional)).argmax(-1)
    assert torch.equal(decode(codes_to_logits, codes, mask, sampler, torch.arange(2)), expected.expand(2, K, T))


def test_guidance_doubles_the_rows_only_where_it_acts():
    rows = []

    def watched(codes, mask, drop_features):
        rows.append(drop_features.tolist())
        return opinion(codes, mask, drop_features)

    codes, mask = all_hidden(2)
    for scale in (1.0, 3.0):
        decode(watched, codes, mask, Sampler(1, guidance_scale=scale), torch.arange(2))
    assert rows == [[False, False], [False, False, True, True]]
    assert (Sampler(guidance_scale=1.0).passes, Sampler(guidance_scale=3.0).passes) == (1, 2)


def test_bf16_logits_are_mixed_in_float32():
    codes, mask = all_hidden(2)

    def rounded(codes, mask, drop_features):
        return opinion(codes, mask, drop_features).bfloat16()

    def widened(codes, mask, drop_features):
        return rounded(codes, mask, drop_features).float()

    keys = torch.arange(2)
    assert torch.equal(decode(rounded, codes, mask, Sampler(), keys), decode(widened, codes, mask, Sampler(), keys))


def test_inputs_are_left_alone():
    codes, mask = all_hidden(2)
    decode(opinion, codes, mask, PLAIN, torch.arange(2))
    assert not codes.any()
    assert mask.all()


@pytest.mark.slow
def test_compiles_without_a_break():
    codes, mask = all_hidden(2)
    sampler = Sampler(3)

    def generate(codes, mask, keys):
        return decode(opinion, codes, mask, sampler, keys)

    compiled = torch.compile(generate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, mask, torch.arange(2)), generate(codes, mask, torch.arange(2)))


@pytest.mark.parametrize("order", ["confidence", "random", "van_der_corput", "halton"])
@pytest.mark.parametrize("remask", ["none", "cap", "loop"])
def test_the_loop_never_reads_a_value_from_the_device(order, remask):
    """Fake tensors hold no values: whatever would make a GPU wait for one raises here."""
    sampler = Sampler(6, order=order, remask=remask)
    decode(opinion, *all_hidden(2), sampler, torch.arange(2))  # tables of an order are made once, outside
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes, mask = (tensor.clone() for tensor in all_hidden(2))
        made = decode(opinion, codes, mask, sampler, torch.arange(2))
        assert made.shape == (2, K, T)
        with pytest.raises(DataDependentOutputException):
            made.max().item()  # what such a wait would look like


def sure_of_the_late(codes, mask, drop_features):
    """A network that is the surer of a code the later it is, whatever it sees."""
    chance = torch.linspace(-2.4, -0.1, codes.shape[-1]).exp()  # of the likeliest code
    peak = (chance * (S - 1) / (1 - chance)).log()
    return peak[:, None] * F.one_hot(torch.zeros(*codes.shape, dtype=torch.int64), S)


def revealed_by_pass(decode_steps, choice_temperature, batch=4, num_steps=240):
    """(B, T) bool of each pass: what it revealed of codes that only the choice noise puts out of order."""
    sampler = Sampler(
        decode_steps=decode_steps, temperature=0.0, choice_temperature=choice_temperature, guidance_scale=1.0
    )
    masks = []

    def watched(codes, mask, drop_features):
        masks.append(mask[:, 0].clone())
        return sure_of_the_late(codes, mask, drop_features)

    hidden = torch.ones(batch, 1, num_steps, dtype=torch.bool)
    decode(watched, hidden.long(), hidden, sampler, record_keys(0, torch.arange(batch)))
    masks.append(torch.zeros_like(masks[0]))
    return [before & ~after for before, after in itertools.pairwise(masks)]


def test_the_choice_noise_of_a_pass_is_its_share_of_the_temperature():
    """a (1 - (i + 1) / S) times Gumbel noise: what a pass reveals lies above all that it leaves hidden."""
    temperature, steps, sureness = 3.0, 6, torch.linspace(-2.4, -0.1, 240)
    passes, keys = revealed_by_pass(steps, temperature), record_keys(0, torch.arange(4))
    for step, now in enumerate(passes[:-1]):
        noise = gumbel(uniform(fold_in(keys, step), Stream.CHOICE, (1, 240)))[:, 0]
        score = sureness + temperature * (1 - (step + 1) / steps) * noise
        left = torch.stack(passes[step + 1 :]).any(0)
        for row in range(4):
            assert score[row, now[row]].min() > score[row, left[row]].max() - 1e-4


def test_the_choice_noise_falls_from_pass_to_pass():
    """The share of pairs, one revealed and one left hidden, of which the less sure one was revealed."""
    passes, place = revealed_by_pass(8, 3.0), torch.arange(240)
    shares = []
    for step, now in enumerate(passes[:-1]):
        left = torch.stack(passes[step + 1 :]).any(0)
        wrong = [place[some][:, None] < place[rest] for some, rest in zip(now, left, strict=True)]
        shares.append(float(torch.cat([pairs.flatten() for pairs in wrong]).float().mean()))
    assert shares[0] > 0.25
    assert shares[-1] < 0.5 * shares[0]
