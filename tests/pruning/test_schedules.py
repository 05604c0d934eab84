"""The cubic schedule against Zhu & Gupta's formula."""

import pytest

from lightning_slm.pruning import cubic_sparsity


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.5), (0.25, 0.9), (0.6, 0.6)])
def test_the_schedule_is_equation_1_of_the_paper(initial, final):
    begin, pruning_steps, every = 7, 12, 5  # t_0, n and delta t there
    for t in range(begin, begin + pruning_steps * every + 1):
        paper = final + (initial - final) * (1 - (t - begin) / (pruning_steps * every)) ** 3
        assert cubic_sparsity((t - begin) / (pruning_steps * every), initial, final) == pytest.approx(paper, abs=1e-12)


def test_before_and_after_the_ramp_nothing_moves():
    assert cubic_sparsity(-3.0, 0.1, 0.8) == pytest.approx(0.1)
    assert cubic_sparsity(3.0, 0.1, 0.8) == 0.8
