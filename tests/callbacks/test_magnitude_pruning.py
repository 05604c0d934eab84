"""MagnitudePruning: the function's zeros, without data, held while training."""

import pytest
import torch
from support import ForeignLlama, batches, differences, kill_and_resume, learned, trainer

from lightning_slm.callbacks import MagnitudePruning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_


def zeros(module):
    return {t.name: t.weight.detach() == 0 for t in weight_targets(module)}


def fit(folder, *callbacks, steps=4):
    torch.manual_seed(0)
    module = ForeignLlama()
    trainer(folder, callbacks, steps=steps).fit(module, batches())
    return module


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"group": 4},
        {"budget": "row", "sparsity": 0.3},
        {"budget": "global", "sparsity": 0.6},
        {"sparsity": {"*mlp*": 0.75, "*": 0.25}},
        {"targets": "*mlp*", "skip": "*down_proj"},
    ],
    ids=str,
)
def test_the_zeros_are_those_of_the_function_and_stay(tmp_path, asked):
    module = fit(tmp_path, MagnitudePruning(**asked))
    torch.manual_seed(0)
    reference = ForeignLlama()
    magnitude_(reference, **{"sparsity": 0.5, **asked})
    assert differences(zeros(module), zeros(reference)) == []


@pytest.mark.parametrize("budget", ["row", "layer", "global"])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, budget):
    straight, resumed = kill_and_resume(ForeignLlama, lambda: [MagnitudePruning(0.5, budget=budget)], tmp_path)
    assert differences(learned(straight), learned(resumed)) == []


def test_at_the_end_and_for_validation_no_training_data_is_needed(tmp_path):
    end = fit(tmp_path, MagnitudePruning(0.5, budget="row", when="end"))
    assert all((z.sum(1) == z.shape[1] // 2).all() for z in zeros(end).values())
    module = ForeignLlama()
    trainer(tmp_path, [MagnitudePruning(0.5)]).validate(module, batches(n=4), verbose=False)
    assert all(z.float().mean() == 0.5 for z in zeros(module).values())


def test_a_budget_of_rows_takes_the_same_share_of_each():
    model = ForeignLlama()
    assert set(magnitude_(model, sparsity=0.25, budget="row").values()) == {0.25}
    assert all((z.sum(1) == z.shape[1] // 4).all() for z in zeros(model).values())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"budget": "model"}, "budget='model' must be 'row', 'layer' or 'global'"),
        ({"budget": "global", "sparsity": {"*": 0.5}}, "settles how much of each layer goes"),
        ({"group": 3}, "sparsity=0.5 of group=3 must be whole"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, MagnitudePruning(**asked))
