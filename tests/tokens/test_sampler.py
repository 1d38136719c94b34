"""Settings of decoding: what is refused, and how plain values become settings."""

import math
from dataclasses import asdict

import pytest

from vab.spec import UserError
from vab.tokens.sampler import Sampler, sampler_from


def test_defaults_are_the_paper():
    assert Sampler() == Sampler(16, 1.0, 256, 15.5, 5.0)
    assert (Sampler().order, Sampler().guidance, Sampler().remask, Sampler().top_p) == (
        "confidence",
        "constant",
        "none",
        1.0,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decode_steps": 0}, "decode_steps must be at least 1"),
        ({"decode_steps": []}, "decode_steps must be at least 1"),
        ({"decode_steps": [3, 0]}, "decode_steps must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": 1e-9}, "temperature must be 0 .greedy. or at least"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"choice_temperature": -1.0}, "choice_temperature must be 0"),
        ({"guidance_scale": math.inf}, "guidance_scale must be 0"),
        ({"remask_strength": math.nan}, "remask_strength must be above 0"),
        ({"order": "alphabetical"}, "order must be one of confidence, random, van_der_corput, halton"),
        ({"guidance": "more"}, "guidance must be one of constant, ramp, anneal"),
        ({"remask": "all"}, "remask must be one of none, cap, rescale, loop"),
    ],
)
def test_refuses_nonsense(arguments, message):
    with pytest.raises(UserError, match=message):
        Sampler(**arguments)
    with pytest.raises(UserError, match=message):
        sampler_from(arguments, where="best.yaml")


def test_plain_values_change_a_sampler():
    base = Sampler(12, choice_temperature=4.5)
    made = sampler_from({"decode_steps": [4, 1], "top_k": None, "guidance_scale": 3, "order": "halton"}, base)
    assert made == Sampler([4, 1], 1.0, None, 4.5, 3.0, order="halton")
    assert isinstance(made.guidance_scale, float)
    assert sampler_from({}, base) == base
    assert sampler_from(asdict(made)) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": 1.0}, "best.yaml: unknown key 'temperatures'; did you mean 'temperature'"),
        ({"colour": 1.0}, "best.yaml: unknown key 'colour'; there are decode_steps, "),
        ({"decode_steps": "many"}, "best.yaml: decode_steps must be a whole number, or a list of them, got 'many'"),
        ({"decode_steps": [4, 1.5]}, "decode_steps must be a whole number"),
        ({"decode_steps": True}, "decode_steps must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number or null"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"order": 3}, "order must be a word"),
        ({"expected": 1}, "expected must be true or false"),
        ({"guidance_scale": -1}, "best.yaml: guidance_scale must be 0 or above"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(UserError, match=message):
        sampler_from(values, where="best.yaml")
