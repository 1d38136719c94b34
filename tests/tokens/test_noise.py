"""The hash behind every random number: right against SplitMix64, uniform, uncorrelated, blind to the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vab.spec import UserError
from vab.tokens.noise import Stream, fold_in, gumbel, record_keys, uniform

WORD = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def reference_mix(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def reference_fold_in(key, data):
    return reference_mix(reference_mix((key + 0x9E3779B97F4A7C15) & WORD) ^ (data & WORD))


def reference_uniform(key, stream, count):
    state = reference_fold_in(key, stream)
    words = [reference_mix((state + i * 0x9E3779B97F4A7C15) & WORD) for i in range(1, count + 1)]
    return [((word >> 41) + 0.5) / 2**23 for word in words]


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_reference_is_splitmix64():
    # the first outputs of the published C code for seed 1234567
    outputs = [reference_mix((1234567 + i * 0x9E3779B97F4A7C15) & WORD) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=50)
@given(key=INT64, data=INT64)
def test_fold_in_is_the_reference(key, data):
    keys = torch.tensor([key])
    expected = reference_fold_in(key, data)
    assert fold_in(keys, torch.tensor([data])).item() & WORD == expected
    assert fold_in(keys, data).item() & WORD == expected


@settings(max_examples=50)
@given(key=INT64, stream=INT64)
def test_uniform_is_the_reference(key, stream):
    assert uniform(torch.tensor([key]), stream, (7,))[0].tolist() == reference_uniform(key, stream, 7)


def test_values_are_part_of_every_result():
    # If this changes, nothing that was ever generated can be had again.
    numbers = uniform(record_keys(0, torch.tensor([0, 1])), Stream.MASK, (2,))
    assert numbers.tolist() == [reference_uniform(reference_fold_in(0, i), 1, 2) for i in (0, 1)]
    assert [stream.value for stream in Stream] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_extremes_are_open():
    numbers = uniform(torch.arange(1000), 0, (2000,))
    assert 0 < numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    assert gumbel(torch.tensor([2.0**-24, 1 - 2.0**-24])).isfinite().all()


def test_uniform():
    numbers = uniform(torch.arange(500), 0, (2000,)).double()
    counts = torch.histc(numbers, bins=256, min=0, max=1)
    expected = numbers.numel() / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 255) < 4 * math.sqrt(2 * 255)  # four standard deviations of its law
    assert abs(numbers.mean().item() - 0.5) < 4 / math.sqrt(12 * numbers.numel())
    assert abs(numbers.var().item() - 1 / 12) < 4 / math.sqrt(180 * numbers.numel())


def test_neighbours_are_unrelated():
    numbers = uniform(torch.arange(501), 0, (2001,))
    bound = 4 / math.sqrt(500 * 2000)  # four standard deviations of a correlation of 10^6 pairs
    assert abs(correlation(numbers[:-1], numbers[1:])) < bound  # keys
    assert abs(correlation(numbers[:, :-1], numbers[:, 1:])) < bound  # positions
    assert abs(correlation(numbers, uniform(torch.arange(501), 1, (2001,)))) < bound  # streams
    assert abs(correlation(numbers, uniform(fold_in(torch.arange(501), 0), 0, (2001,)))) < bound  # steps
    assert abs(correlation(numbers[:-1, 1:], numbers[1:, :-1])) < bound  # diagonal
    spread = numbers.mean(1)  # a key's numbers say nothing about the key
    assert abs(correlation(spread, torch.arange(501.0))) < 4 / math.sqrt(501)


def test_seeds_and_records_do_not_trade():
    index = torch.arange(300)
    keys = torch.cat([record_keys(seed, index) for seed in range(300)])
    assert keys.unique().numel() == 300 * 300  # (seed + 1, record - 1) is another key than (seed, record)
    bound = 4 / math.sqrt(300 * 300)
    first = uniform(keys, 0).view(300, 300)
    assert abs(correlation(first[1:, :-1], first[:-1, 1:])) < bound


def test_a_flipped_bit_flips_half_of_the_bits():
    keys = torch.arange(2000) * 0x1234567
    flips = [fold_in(keys, 0) ^ fold_in(keys ^ (1 << bit), 0) for bit in range(0, 63, 7)]
    flipped = torch.stack([(word >> bit) & 1 for word in flips for bit in range(64)]).double().mean(1)
    assert (flipped - 0.5).abs().max() < 0.06  # 5 standard deviations of 2000 coin tosses


def test_gumbel():
    numbers = gumbel(uniform(torch.arange(500), 0, (2000,)).double())
    assert abs(numbers.mean().item() - 0.5772157) < 0.006
    assert abs(numbers.var().item() - math.pi**2 / 6) < 0.012


@settings(max_examples=50)
@given(data=st.data())
def test_a_record_does_not_see_its_batch(data):
    keys = torch.tensor(data.draw(st.lists(INT64, min_size=1, max_size=8)))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=8)))
    whole = uniform(keys, Stream.TOKEN, (3, 5))
    assert torch.equal(uniform(keys[rows], Stream.TOKEN, (3, 5)), whole[rows])


def test_shape_only_arranges():
    keys = torch.arange(3)
    assert torch.equal(uniform(keys, 0, (4, 5)), uniform(keys, 0, (20,)).view(3, 4, 5))
    assert torch.equal(uniform(keys, 0, (2, 5)), uniform(keys, 0, (4, 5))[:, :2])
    assert uniform(keys, 0).shape == (3,)
    assert uniform(keys, 0, (4, 5)).dtype == torch.float32


def test_streams_per_record():
    keys, streams = torch.arange(3), torch.tensor([7, 8, 9])
    expected = torch.cat([uniform(keys[i : i + 1], int(streams[i]), (4,)) for i in range(3)])
    assert torch.equal(uniform(keys, streams, (4,)), expected)


@pytest.mark.slow
def test_compiled_is_bit_equal():
    def numbers(keys):
        return uniform(fold_in(keys, 3), Stream.CHOICE, (4, 25))

    compiled = torch.compile(numbers, fullgraph=True, backend="aot_eager")
    keys = record_keys(-5, torch.arange(9))
    assert torch.equal(compiled(keys), numbers(keys))


@pytest.mark.needs_cuda
def test_gpu_is_bit_equal():
    keys = record_keys(11, torch.arange(64))
    assert torch.equal(uniform(keys.cuda(), 1, (4, 500)).cpu(), uniform(keys, 1, (4, 500)))


def test_seed_must_fit():
    with pytest.raises(UserError, match="64-bit"):
        record_keys(1 << 63, torch.arange(2))
