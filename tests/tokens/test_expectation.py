"""Codes nearest to the expectation: closed forms."""

import torch
import torch.nn.functional as F

from vab.tokens.expectation import expected_codes


def total(books, codes):
    """(B, T, C): the sum over levels."""
    return sum(book[codes[:, level]] for level, book in enumerate(books))


def test_known_codes_stay_and_what_is_certain_is_reached():
    # Each level a balanced decimal digit: the nearest coarse digit is then the right one.
    books = torch.arange(-4.0, 5.0).view(1, 9, 1) * torch.tensor([100.0, 10.0, 1.0]).view(3, 1, 1)
    codes = torch.randint(9, (4, 3, 20))
    certain = F.one_hot(codes, 9).float()
    for mask in (torch.rand(4, 3, 20) < 0.5, torch.ones(4, 3, 20, dtype=torch.bool)):
        assert torch.equal(expected_codes(certain, books, codes.masked_fill(mask, 0), mask), codes)
    wrong = certain.roll(1, dims=-1)
    assert torch.equal(expected_codes(wrong, books, codes, torch.zeros_like(mask)), codes)


def test_between_two_equally_likely_codes_the_nearest_to_their_middle_is_taken():
    books = torch.tensor([[[-4.0], [6.0], [0.5], [9.0]], [[0.4], [-3.0], [5.0], [8.0]]])
    probabilities = torch.zeros(1, 2, 1, 4)
    probabilities[..., 0, 0, :2] = 0.5  # -4 or 6: their middle is 1
    probabilities[:, 1, 0, 0] = 1.0  # and 0.4 on top: 1.4 = 0.5 + 0.4 and a rest
    codes, hidden = torch.full((1, 2, 1), 3), torch.ones(1, 2, 1, dtype=torch.bool)
    assert expected_codes(probabilities, books, codes, hidden).flatten().tolist() == [2, 0]
    hidden[:, 1] = False  # what is known is no part of what is expected: 1 = 0.5 and a rest
    assert expected_codes(probabilities, books, codes, hidden).flatten().tolist() == [2, 3]


def test_a_coarse_code_that_is_known_is_not_taken_off_what_the_finer_ones_are_expected_to_be():
    books = torch.tensor([[[-4.0], [6.0], [0.5], [9.0]], [[0.4], [-3.0], [5.0], [8.0]]])
    codes, hidden = torch.full((1, 2, 1), 3), torch.tensor([False, True]).view(1, 2, 1)
    for code in range(4):
        certain = F.one_hot(torch.tensor([0, code]), 4).view(1, 2, 1, 4)
        assert expected_codes(certain, books, codes, hidden).flatten().tolist() == [3, code]


def test_the_error_is_below_that_of_draws_and_of_the_likeliest_code():
    books = torch.randn(2, 32, 4) * torch.tensor([1.0, 0.5]).view(2, 1, 1)
    books[:, 0] = 0.0
    weights = torch.randn(1, 2, 500, 32).softmax(-1)
    truth, drawn = (torch.multinomial(weights.view(-1, 32), 1).view(1, 2, 500) for _ in range(2))
    hidden = torch.ones(1, 2, 500, dtype=torch.bool)
    expected = expected_codes(weights, books, torch.zeros_like(truth), hidden)
    errors = [
        float((total(books, c) - total(books, truth)).square().mean()) for c in (expected, drawn, weights.argmax(-1))
    ]
    assert errors[0] < 0.8 * min(errors[1:])
