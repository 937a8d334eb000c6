"""Banks of binary codes: what the weight distributions promise, and the sizes that people need."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperproto import BankError, PrototypeBank
from hyperproto.constructions.code import (
    PRIMITIVE_POLYNOMIALS,
    SignCode,
    _bch_generator,
    _kerdock_generator,
    choose_code,
    code_points,
)
from hyperproto.sphere import largest_cosines, sampled_largest_cosines
from hyperproto.testing import check_bank


@pytest.mark.parametrize(("degree", "polynomial"), PRIMITIVE_POLYNOMIALS.items())
def test_polynomials_are_primitive(degree, polynomial):
    power, order = 2, 1
    while power != 1:
        power = (power << 1) ^ (polynomial if power >> (degree - 1) & 1 else 0)
        order += 1
    assert order == 2**degree - 1


def all_words(matrix: torch.Tensor, modulus: int) -> torch.Tensor:
    num_digits = len(matrix)
    numbers = torch.arange(modulus**num_digits)
    digits = (numbers[:, None] // modulus ** torch.arange(num_digits)) % modulus
    return (digits.float() @ matrix) % modulus


def test_dual_of_the_double_error_correcting_bch_code_of_length_32():
    # MacWilliams and Sloane, figure 15.3: weights 0, 12, 16, 20, 32, with 1, 496, 1054, 496, 1 words.
    words = all_words(_bch_generator(SignCode("bch", 5, 2, 32)), 2)
    weights, counts = words.sum(dim=1).long().unique(return_counts=True)
    assert dict(zip(weights.tolist(), counts.tolist(), strict=True)) == {0: 1, 12: 496, 16: 1054, 20: 496, 32: 1}


def test_nordstrom_robinson_code_is_the_kerdock_code_of_length_16():
    # Weights of the Nordstrom-Robinson code: 0, 6, 8, 10, 16, with 1, 112, 30, 112, 1 words. Lee weights of letters.
    letters = all_words(_kerdock_generator(SignCode("kerdock", 4, 1, 16)), 4)
    lee = torch.minimum(letters, 4 - letters).sum(dim=1).long()
    weights, counts = lee.unique(return_counts=True)
    assert dict(zip(weights.tolist(), counts.tolist(), strict=True)) == {0: 1, 6: 112, 8: 30, 10: 112, 16: 1}


@pytest.mark.parametrize(
    ("num", "dim", "cosine"),
    [(1024, 32, 0.25), (4096, 64, 1 / 8), (2048, 32, 0.25), (4097, 64, 0.25), (9000, 32, 0.5), (8192, 128, 1 / 8)],
)
def test_largest_cosine_is_that_of_the_weight_distribution(num, dim, cosine):
    code = choose_code(num, dim)
    reached = float(largest_cosines(code_points(num, dim, torch.Generator().manual_seed(1))).max())
    assert reached == pytest.approx(cosine, abs=1e-6)
    assert code.largest_cosine == cosine


# Shortened and padded codes are among these.
@given(num=st.integers(2, 1500), dim=st.integers(21, 140), seed=st.integers(0, 2**32 - 1))
def test_the_promise_holds_in_any_dimension(num, dim, seed):
    points = code_points(num, dim, torch.Generator().manual_seed(seed))
    assert points.shape == (num, dim)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(num))
    assert float(largest_cosines(points).max()) <= choose_code(num, dim).largest_cosine + 1e-6


def test_seeds_and_directions():
    first, again, other = (PrototypeBank(3000, 64, method="code", seed=seed) for seed in (3, 3, 4))
    check_bank(first)
    assert torch.equal(first.prototypes, again.prototypes)
    assert not torch.equal(first.prototypes, other.prototypes)
    # No axis is special: coordinates of rotated words are spread like those of random directions.
    assert float(first.prototypes.abs().max()) > 2.5 / math.sqrt(64)
    assert float(first.prototypes.mean(dim=0).norm()) < 0.05


def test_auto_takes_codes_where_optimising_would_take_long():
    bank = PrototypeBank(5000, 64)
    assert bank.method == "code"
    report = bank.report()
    assert report.source == "all pairs"
    assert report.lower_bound <= report.max_cosine <= 0.25 + 1e-6


@pytest.mark.slow
def test_imagenet_21k():
    report = PrototypeBank(21_841, 512).report()
    assert report.source == "all pairs"
    assert report.max_cosine <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize(("num", "dim", "cosine"), [(100_000, 512, 0.07), (1_000_000, 512, 0.15), (60_000, 256, 0.07)])
def test_sizes_that_people_need(num, dim, cosine):
    bank = PrototypeBank(num, dim)
    report = bank.report()
    assert (bank.method, report.source) == ("code", "weight distribution")
    assert report.max_cosine <= cosine
    assert float(sampled_largest_cosines(bank.prototypes, 64).max()) <= report.max_cosine + 1e-6


def test_other_banks_are_sampled_beyond_what_can_be_compared(monkeypatch):
    bank = PrototypeBank(300, 8, method="random")
    exact = bank.report()
    monkeypatch.setattr("hyperproto.separation.MOST_COMPARED_PROTOTYPES", 200)
    sampled = bank.report()
    assert (exact.source, sampled.source) == ("all pairs", "sample")
    assert sampled.max_cosine == pytest.approx(exact.max_cosine)  # a sample of 1024 holds all 300
    code = PrototypeBank(300, 64, method="code").report()
    assert code.source == "weight distribution"
    assert code.max_cosine == code.mean_max_cosine


@pytest.mark.parametrize(("num", "dim"), [(10, 20), (10**9, 64), (10, 1)])
def test_sizes_without_a_code_are_refused(num, dim):
    with pytest.raises(BankError, match="dim"):
        PrototypeBank(num, dim, method="code")
