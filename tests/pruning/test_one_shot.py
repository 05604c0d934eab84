"""What all one-shot solvers have in common: shares, dead and broken inputs, what is reported."""

import math

import pytest
import torch
from calibrated import calibrated, data, make
from torch import nn

from lightning_slm.calibration import InputGram, InputNorms
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_, prune_mask, wanda_
from lightning_slm.pruning.one_shot import prune_block_after_block_, shares_of


def by_size(task):
    return task.weight_OI.masked_fill(prune_mask(task.weight_OI.abs(), task.sparsity, task.group), 0)


def pruned(model, batches, solver=by_size, statistic=InputGram, sparsity=0.5, group=None, targets="*", **kwargs):
    way = {"sparsity": sparsity, "group": group, "targets": targets, "skip": (), "progress": False, **kwargs}
    return prune_block_after_block_(model, batches, solver, statistic, **way)


def two(inputs=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, inputs))


def test_shares_by_pattern_the_first_that_matches_counts_and_zero_leaves_a_layer_alone():
    for prune in (wanda_, lambda model, batches, progress, **kwargs: magnitude_(model, **kwargs)):
        model, dense = make("llama"), make("llama")
        sparsity = {"*layers.0*mlp*": 0.75, "*mlp*": 0.0, "*self_attn*": 0.25}
        prune(model, data("llama"), sparsity=sparsity, progress=False)
        for t in weight_targets(model):
            asked = 0.25 if "self_attn" in t.name else 0.75 if "layers.0" in t.name else 0.0
            assert (t.weight == 0).float().mean().item() == pytest.approx(asked, abs=1 / 64)
            assert asked or torch.equal(t.weight, dense.get_parameter(t.name))


@pytest.mark.parametrize(
    ("sparsity", "group", "complaint"),
    [
        ({"*0": 0.5}, None, "sparsity names no share for '2.weight'; add a pattern for it"),
        ({"*": 0.5, "2": 0.4}, None, "sparsity: '2' is the first match of no weight"),
        ({"*": 1.2}, None, "sparsity=1.2 must lie between 0 and 1"),
        ({"0": 0.5, "2": 0.4}, 4, r"'2.weight': sparsity=0.4 of group=4 must be whole weights"),
        (1.0, None, "sparsity=1.0 must lie between 0 and 1"),
        (0.5, 3, r"'0.weight': sparsity=0.5 of group=3"),
    ],
)
def test_shares_that_cannot_be_are_refused_before_anything_is_run(sparsity, group, complaint):
    with pytest.raises(ValueError, match=complaint):
        pruned(two(), [None], sparsity=sparsity, group=group)
    with pytest.raises(ValueError, match=complaint):
        magnitude_(two(), sparsity=sparsity, group=group)


def test_all_or_nothing_needs_no_solver_and_no_group():
    model = two(6)
    dense = model[0].weight.clone()

    def never(task):
        raise AssertionError

    results = pruned(model, [torch.randn(3, 6)], never, sparsity={"0": 0.0, "2": 1.0}, group=4)
    assert torch.equal(model[0].weight, dense)
    assert (model[2].weight == 0).all()
    assert [r.sparsity for r in results.values()] == [0.0, 1.0]


def test_the_error_reported_is_that_of_the_outputs():
    model = nn.Linear(16, 8, bias=False)
    x, dense = torch.randn(40, 16), model.weight.detach().clone()
    results = pruned(model, [x[:20], x[20:]])
    lost = x @ (dense - model.weight.detach()).T
    expected = lost.square().sum() / (x @ dense.T).square().sum()
    assert results["weight"].error == pytest.approx(expected.item(), rel=1e-4)
    assert math.isnan(pruned(nn.Linear(16, 8), [x], statistic=InputNorms)["weight"].error)


def test_dead_inputs_are_counted_and_their_weights_go_first():
    model, x = nn.Linear(8, 4), torch.randn(20, 8)
    x[:, [1, 5, 6]] = 0
    results = wanda_(model, [x], sparsity=0.5, progress=False)
    assert results["weight"].dead == 3
    assert (model.weight[:, [1, 5, 6]] == 0).all()
    assert ((model.weight == 0).sum(1) == 4).all()


def test_constant_and_single_inputs_are_pruned_like_any_other():
    model = two(8)
    results = wanda_(model, [torch.ones(1, 8)], progress=False)
    assert all(r.sparsity == 0.5 for r in results.values())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused_by_name_and_nothing_is_pruned_from_there(bad):
    model, x = two(), torch.randn(4, 16)
    with torch.no_grad():
        model[0].bias[3] = bad
    dense = model[2].weight.clone()
    with pytest.raises(ValueError, match=r"'2.weight': its inputs are not finite.*look for a layer before it"):
        pruned(model, [x])
    assert torch.equal(model[2].weight, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype_and_their_identity(dtype):
    model = two().to(dtype)
    weights = [model[0].weight, model[2].weight]
    pruned(model, [torch.randn(4, 16, dtype=dtype)])
    assert [model[0].weight is weights[0], model[2].weight is weights[1]] == [True, True]
    assert all(w.dtype == dtype and (w == 0).float().mean() == 0.5 for w in weights)


def test_frozen_weights_and_rows_of_one_are_pruned_too():
    model = nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 16), nn.Linear(16, 16)).requires_grad_(False)
    results = pruned(model, [torch.randn(4, 16)])
    assert [r.sparsity for r in results.values()] == [0.5, 0.5, 0.5]
    assert not any(p.requires_grad for p in model.parameters())


def test_the_groups_of_a_conv1d_run_along_its_inputs():
    model = make("gpt2")
    wanda_(model, data("gpt2"), group=4, progress=False)
    for t in weight_targets(model):
        weight_OI = t.weight if t.input_dim == 1 else t.weight.T
        assert ((weight_OI.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_shares_of_one_number_are_that_number():
    targets = weight_targets(two())
    assert shares_of(targets, 0.3, None) == {"0.weight": 0.3, "2.weight": 0.3}


def test_nothing_is_pruned_where_the_calibration_only_looks():
    model, dense = make("llama"), make("llama")
    calibrated(model, data("llama"), lambda block, layers: {})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters()))
