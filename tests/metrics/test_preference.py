"""Preference shares: closed forms, other implementations, and how often the interval holds the true share."""

import itertools
import math

import pytest
import torch
from scipy import stats

from vab.metrics.preference import effective_answers, preference, share_interval, sign_test, wilson_interval


def crossed(num_raters, num_trials):
    """(N,), (N,): every listener answers every trial."""
    return torch.arange(num_raters).repeat_interleave(num_trials), torch.arange(num_trials).repeat(num_raters)


def test_counts_shares_and_tests_of_a_table_done_by_hand():
    # Listener 5: 0, 1, 2; listener 9: 0, 3, 2. Signs: 1 1 0 and 1 -1 0.
    answers = torch.tensor([0, 1, 2, 0, 3, 2])
    said = preference(answers, torch.tensor([5, 5, 5, 9, 9, 9]), torch.tensor([7, 8, 2, 7, 8, 2]))
    assert said.counts == (2, 1, 2, 1, 0)
    assert said.shares == (2 / 6, 1 / 6, 2 / 6, 1 / 6, 0)
    assert (said.first.share, said.second.share) == pytest.approx((0.5, 1 / 6))
    assert (said.num_answers, said.num_raters, said.num_trials) == (6, 2, 3)
    assert said.p_raters == 1.0  # one listener for the first system, one undecided
    assert said.p_trials == 1.0  # one trial for the first, two undecided


def test_turning_the_systems_round_turns_the_figures_round():
    generator = torch.Generator().manual_seed(1)
    raters, trials = crossed(4, 9)
    answers = torch.randint(5, (36,), generator=generator)
    one, other = preference(answers, raters, trials), preference(4 - answers, raters, trials)
    assert one.counts == other.counts[::-1]
    assert (one.first, one.second) == (other.second, other.first)
    assert (one.p_raters, one.p_trials) == (other.p_raters, other.p_trials)


def test_the_level_is_that_of_both_intervals():
    raters, trials = crossed(4, 9)
    answers = torch.randint(5, (36,), generator=torch.Generator().manual_seed(1))
    wide, narrow = preference(answers, raters, trials), preference(answers, raters, trials, level=0.5)
    for one, other in ((wide.first, narrow.first), (wide.second, narrow.second)):
        assert one.low < other.low < other.high < one.high


def test_names_and_order_of_listeners_do_not_matter():
    generator = torch.Generator().manual_seed(2)
    raters, trials = crossed(5, 7)
    answers, shuffle = torch.randint(5, (35,), generator=generator), torch.randperm(35, generator=generator)
    again = preference(answers[shuffle], 100 - 3 * raters[shuffle], 17 * trials[shuffle])
    said = preference(answers, raters, trials)
    assert (again.counts, again.p_raters, again.p_trials) == (said.counts, said.p_raters, said.p_trials)
    for field in ("share", "low", "high"):  # sums in another order round otherwise
        assert getattr(again.first, field) == pytest.approx(getattr(said.first, field), abs=1e-12)


def test_wilson_against_scipy_and_by_hand():
    for n, level in itertools.product((1, 7, 30, 400), (0.8, 0.95)):
        for k in {0, 1, n // 3, n}:
            theirs = stats.binomtest(k, n).proportion_ci(level, method="wilson")
            assert wilson_interval(k / n, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    low, high = wilson_interval(0.0, 10)
    assert (low, high) == (0.0, pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6))


def test_sign_test_against_scipy_and_by_hand():
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    for wins, losses in ((9, 2), (1, 12), (40, 61), (700, 800)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_one_answer_each_to_a_trial_each_is_as_many_independent_answers():
    names = torch.arange(40)
    chosen = names < 13
    assert effective_answers(chosen, names, names) == pytest.approx(40)
    interval = share_interval(chosen, names, names)
    assert (interval.low, interval.high) == pytest.approx(wilson_interval(13 / 40, 40))


def test_listeners_who_always_say_the_same_are_worth_one_answer_each():
    num_raters, num_trials = 6, 20
    raters, trials = crossed(num_raters, num_trials)
    n = num_raters * num_trials
    # The variance of listeners is share (1 - share) / R, with R / (R - 1) beside N / (N - 1).
    expected = num_raters * (num_raters - 1) / num_raters * n / (n - 1)
    assert effective_answers(raters < 2, raters, trials) == pytest.approx(expected)
    expected = num_trials * (num_trials - 1) / num_trials * n / (n - 1)
    assert effective_answers(trials < 5, raters, trials) == pytest.approx(expected)


def test_answers_that_all_agree_are_worth_the_fewer_of_listeners_and_trials():
    raters, trials = crossed(4, 30)
    assert effective_answers(raters >= 0, raters, trials) == 4
    assert effective_answers(raters < 0, raters, trials) == 4
    assert effective_answers(raters[:30] >= 0, raters[:30], trials[:30]) == 30  # of one listener
    interval = share_interval(raters >= 0, raters, trials)
    assert (interval.share, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(wilson_interval(1.0, 4)[0])


def test_where_nobody_prefers_the_second_the_spread_of_the_first_counts():
    raters, trials = crossed(8, 10)
    answers = torch.where(raters + trials == 3, 2, 1)  # four answers of 80 undecided, the rest for the first
    said = preference(answers, raters, trials)
    worth = effective_answers(answers == 1, raters, trials)
    assert worth > 20
    assert (said.second.low, said.second.high) == (0, pytest.approx(wilson_interval(0.0, worth)[1]))
    all_agree = preference(torch.zeros(80, dtype=torch.int64), raters, trials)
    assert all_agree.second.high == pytest.approx(wilson_interval(0.0, 8)[1])


def test_the_interval_is_as_wide_as_a_bootstrap_over_listeners_and_trials_says():
    generator = torch.Generator().manual_seed(3)
    num_raters, num_trials = 24, 30
    leaning = 0.5 + torch.randn(num_raters, 1, generator=generator) + torch.randn(1, num_trials, generator=generator)
    chosen = torch.rand(num_raters, num_trials, generator=generator) < leaning.sigmoid()
    interval = share_interval(chosen.flatten(), *crossed(num_raters, num_trials))
    means = torch.stack(
        [
            chosen[torch.randint(num_raters, (num_raters,), generator=generator)][
                :, torch.randint(num_trials, (num_trials,), generator=generator)
            ]
            .double()
            .mean()
            for _ in range(2000)
        ]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert interval.low == pytest.approx(low, abs=0.03)
    assert interval.high == pytest.approx(high, abs=0.03)


def test_the_interval_holds_the_true_share_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(4)
    num_raters, num_trials, runs = 12, 20, 300
    raters, trials = crossed(num_raters, num_trials)
    many = 0.8 + math.sqrt(2) * torch.randn(200_000, generator=generator)
    truth, held, held_plain = float(many.sigmoid().mean()), 0, 0
    for _ in range(runs):
        leaning = (
            0.8 + torch.randn(num_raters, 1, generator=generator) + torch.randn(1, num_trials, generator=generator)
        )  # fmt: skip
        chosen = (torch.rand(num_raters, num_trials, generator=generator) < leaning.sigmoid()).flatten()
        interval = share_interval(chosen, raters, trials)
        held += interval.low <= truth <= interval.high
        low, high = wilson_interval(interval.share, len(chosen))
        held_plain += low <= truth <= high
    assert held / runs > 0.9
    assert held_plain / runs < 0.75  # what one gets who takes the answers for independent


@pytest.mark.parametrize(
    ("answers", "raters", "trials", "words"),
    [
        ([], [], [], "N >= 1"),
        ([1, 2], [0], [0, 1], "three times"),
        ([5], [0], [0], "0..4"),
        ([-1], [0], [0], "0..4"),
        ([1, 2], [3, 3], [4, 4], "two answers of one listener"),
    ],
)
def test_what_is_no_table_of_answers_is_refused(answers, raters, trials, words):
    with pytest.raises(ValueError, match=words):
        preference(*(torch.tensor(values, dtype=torch.int64) for values in (answers, raters, trials)))
