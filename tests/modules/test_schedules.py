"""Schedules over whole runs, against torch's own schedulers and by hand."""

import math

import pytest
import torch

from lightning_slm.modules import CosineSchedule, WSDSchedule


def test_wsd_goes_up_stays_and_goes_down_to_its_final_factor():
    factors = [WSDSchedule(warmup=0.1, decay=0.4, final=0.2)(step, 50) for step in range(51)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(factors[5:31]) == {1.0}
    assert factors[30:] == pytest.approx([1 - 0.8 * i / 20 for i in range(21)])


def test_cosine_without_warmup_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for step in range(41):
        assert CosineSchedule(warmup=0.0, final=0.1)(step, 40) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", [WSDSchedule(), CosineSchedule()], ids=str)
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_every_step_of_a_run_of_any_length_learns_and_the_end_stays_at_the_final_factor(schedule, total):
    factors = [schedule(step, total) for step in range(total + 5)]
    assert all(0 < f <= 1 for f in factors[:total])
    assert all(math.isclose(f, schedule.final, abs_tol=1e-12) for f in factors[total:])


@pytest.mark.parametrize("warmup", [-0.1, 1.5])
def test_a_fraction_outside_zero_to_one_is_refused(warmup):
    for schedule in (WSDSchedule, CosineSchedule):
        with pytest.raises(ValueError, match=f"warmup={warmup} must be a fraction"):
            schedule(warmup=warmup)


def test_more_warmup_and_decay_than_there_is_run_is_refused():
    with pytest.raises(ValueError, match="more than the whole run"):
        WSDSchedule(warmup=0.6, decay=0.6)
