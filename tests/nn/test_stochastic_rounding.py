"""Stochastic rounding: the mean of many is the value."""

import pytest
import torch

from lightning_slm.nn.stochastic_rounding import stochastic_round_


def rounded(values, seed=0):
    target = torch.empty_like(values, dtype=torch.bfloat16)
    return stochastic_round_(target, values, torch.Generator().manual_seed(seed))


def neighbours(values):
    """Of each float32 in bfloat16: towards zero, and away from it; by arithmetic on the exponent."""
    step = 2.0 ** (torch.frexp(values).exponent - 8)
    towards = torch.trunc(values / step) * step
    return towards, towards + step * values.sign()


def test_each_element_becomes_one_of_its_two_neighbours():
    values = torch.randn(10_000) * 10.0 ** torch.randint(-6, 6, (10_000,))
    towards, away = neighbours(values)
    got = rounded(values).float()
    assert ((got == towards) | (got == away)).all()
    assert 0.3 < (got == towards).float().mean() < 0.7


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_many_is_the_value_within_its_statistical_error(sign):
    values = sign * torch.rand(50) * 2
    n = 20_000
    got = rounded(values.repeat(n, 1)).float()
    towards, away = neighbours(values)
    up = (values - towards) / (away - towards)
    error = (away - towards).abs() * (up * (1 - up) / n).sqrt()  # of a mean of n throws of an uneven coin
    off = (got.double().mean(0) - values.double()).abs() / error
    assert off.max() < 4.5
    assert 0.6 < off.square().mean().sqrt() < 1.4, "and not nearer than chance"


def test_the_probability_is_the_part_that_is_cut_off():
    step = 2**-7  # of bfloat16 from 1 to 2
    for part in (0.0, 2**-16, 0.25, 0.5, 0.75):
        got = rounded(torch.full((200_000,), 1 + part * step)).float()
        assert (got == 1 + step).float().mean() == pytest.approx(part, abs=0.005)


def test_what_bfloat16_holds_stays_itself():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got = rounded(every.float())
    assert torch.equal(got.isnan(), every.isnan())
    kept = ~every.isnan()
    assert torch.equal(got[kept].view(torch.int16), every[kept].view(torch.int16)), "infinities and minus zero too"


def test_a_nan_never_becomes_a_number_and_what_is_too_large_becomes_infinite():
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    for seed in range(20):
        assert rounded(nans, seed).isnan().all()
        beyond = rounded(torch.full((100,), torch.finfo(torch.float32).max), seed).float()
        assert ((beyond == largest) | (beyond == float("inf"))).all()


def test_a_generator_makes_it_repeatable_and_the_global_one_stays_untouched():
    values = torch.randn(1000)
    before = torch.get_rng_state()
    assert torch.equal(rounded(values, 3), rounded(values, 3))
    assert not torch.equal(rounded(values, 3), rounded(values, 4))
    assert torch.equal(torch.get_rng_state(), before)
    target = torch.empty(1000, dtype=torch.bfloat16)
    assert stochastic_round_(target, values) is target
    assert not torch.equal(torch.get_rng_state(), before)


def test_slices_and_transposes_are_fine():
    values = torch.randn(6, 8)
    target = torch.zeros(8, 6, dtype=torch.bfloat16)
    stochastic_round_(target.T, values, torch.Generator().manual_seed(0))
    assert torch.equal(target.T, rounded(values))
    stochastic_round_(target, values.T, torch.Generator().manual_seed(0))
    assert (target.T.float() - values).abs().max() < 2**-6


def test_other_dtypes_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not from torch.float32 \(2,\) to torch.float16 \(2,\)"):
        stochastic_round_(torch.empty(2, dtype=torch.float16), torch.ones(2))
    with pytest.raises(ValueError, match=r"\(2,\) to torch.bfloat16 \(3,\)"):
        stochastic_round_(torch.empty(3, dtype=torch.bfloat16), torch.ones(2))
