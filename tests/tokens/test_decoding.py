"""What every decoding must keep: the oracle, the known codes, the counts, the independence of records."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vab.spec import UserError
from vab.tokens.decoding import Sampler, decode, draw, least_confident, num_hidden_after
from vab.tokens.noise import record_keys

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


samplers = st.builds(
    Sampler,
    decode_steps=st.integers(1, 64),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 1, 4, 256]),
    choice_temperature=st.sampled_from([0.0, 4.5, 15.5]),
    guidance_scale=st.sampled_from([0.0, 1.0, 5.0]),
)
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


@settings(max_examples=20, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_the_network_sees_the_scheduled_counts_and_no_known_code_hidden_again(sampler, seed):
    torch.manual_seed(seed)
    mask = torch.rand(3, K, T) < torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    mask[:, 0, 0] = True
    initial = mask.flatten(1).sum(1).tolist()
    seen = []

    def watched(codes, mask, drop_features):
        seen.append((codes[:3].clone(), mask[:3].clone()))
        return opinion(codes, mask, drop_features)

    decode(watched, torch.zeros(3, K, T, dtype=torch.int64), mask, sampler, record_keys(seed, torch.arange(3)))
    assert len(seen) == sampler.decode_steps
    for record, count in enumerate(initial):
        current = count
        for step, (_, hidden) in enumerate(seen):
            assert hidden[record].sum() == current
            wanted = math.floor(math.cos(math.pi / 2 * (step + 1) / sampler.decode_steps) * count)
            current = max(min(max(wanted, 1), current - 1), 0)
    for (codes, hidden), (later_codes, later_hidden) in itertools.pairwise(seen):
        assert not (later_hidden & ~hidden).any()
        assert torch.equal(later_codes[~hidden], codes[~hidden])


@settings(max_examples=12, deadline=None)
@given(sampler=samplers, seed=seeds)
def test_a_record_does_not_see_its_batch(sampler, seed):
    torch.manual_seed(seed)
    codes, mask = torch.randint(0, S, (7, K, T)), torch.rand(7, K, T) < 0.8
    keys, steps = record_keys(seed, torch.arange(7)), torch.randint(1, T + 1, (7,))
    whole = decode(opinion, codes, mask, sampler, keys, steps)
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
        current = num_hidden_after(step, 16, initial, current)
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
        current = num_hidden_after(step, decode_steps, initial, current)
        assert torch.equal(current, expected)
    assert not current.any()


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
    assert torch.equal(draw(logits, numbers, 0.0, None), logits.argmax(-1))
    assert torch.equal(draw(logits, numbers, 1.0, 1), logits.argmax(-1))
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
    drawn = draw(logits.expand(100_000, S), numbers, temperature, top_k)
    scaled = logits.double() / temperature
    if top_k is not None and top_k < S:
        scaled = scaled.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    expected = scaled.softmax(0)
    shares = torch.bincount(drawn, minlength=S) / 100_000
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2e-5)


def test_a_code_of_no_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -200.0, 0.0, -torch.inf])
    extremes = torch.tensor([2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    for top_k in (None, 4):
        assert set(draw(logits.expand(5, 6), extremes, 1.0, top_k).tolist()) == {1, 4}


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


def test_defaults_are_the_paper():
    assert Sampler() == Sampler(16, 1.0, 256, 15.5, 5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decode_steps": 0}, "decode_steps must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": 1e-9}, "temperature must be 0 .greedy. or at least"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"choice_temperature": -1.0}, "choice_temperature must be 0"),
        ({"guidance_scale": math.inf}, "guidance_scale must be 0"),
    ],
)
def test_refuses_nonsense(arguments, message):
    with pytest.raises(UserError, match=message):
        Sampler(**arguments)
