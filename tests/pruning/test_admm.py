"""ADMM pruning against least squares solved row by row, and against the published iteration written out.

Shape letters: O = outputs of a layer, I = its inputs, N = rows.
"""

from functools import partial

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn

from lightning_slm.calibration import InputGram
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import admm_, prune_mask, sparsegpt_
from lightning_slm.pruning.admm import _zeros, admm_weights, inverted
from lightning_slm.pruning.sparsegpt import factorised, sparsegpt_weights


def gram_of(x_NI):
    gram = InputGram(x_NI.shape[1], x_NI.device)
    gram.update(x_NI)
    return gram


def correlated(rows, inputs):
    return torch.randn(rows, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + torch.randn(inputs)


def solved(weight_OI, gram, sparsity=0.5, group=None, budget="layer", damping=0.1, **turns):
    zeros = partial(_zeros, sparsity=sparsity, group=group, budget=budget)
    return admm_weights(weight_OI.clone(), inverted(gram, "layer", damping), zeros, **turns)


def lost(old_OI, new_OI, x_NI):
    return float(((old_OI - new_OI) @ x_NI.T).square().sum() / (old_OI @ x_NI.T).square().sum())


def least_squares(weight_OI, mask_OI, x_NI):
    """The best that a mask allows, each row by itself."""
    best = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row, (weight, mask) in enumerate(zip(weight_OI.double(), mask_OI)):
        best[row, ~mask] = torch.linalg.lstsq(x_NI[:, ~mask].double(), x_NI.double() @ weight).solution
    return best.float()


@pytest.mark.parametrize("group", [None, 4])
def test_with_a_fixed_mask_it_comes_to_the_least_squares_optimum(group):
    """2000 turns without damping: weights of about 1 to 1e-3, and the error to 1e-4 of itself."""
    x, weight = correlated(400, 48), torch.randn(20, 48)
    found = solved(weight, gram_of(x), group=group, damping=0.0, iterations=2000, mask_iterations=0)
    mask = found == 0
    assert torch.equal(mask, prune_mask(weight.abs() * x.norm(dim=0), 0.5, group))
    best = least_squares(weight, mask, x)
    assert (found - best).abs().max() < 1e-3
    assert lost(weight, found, x) == pytest.approx(lost(weight, best, x), rel=1e-4)


def test_the_published_twenty_turns_come_near_it():
    x, weight = correlated(400, 48), torch.randn(20, 48)
    found = solved(weight, gram_of(x))
    assert lost(weight, found, x) < 1.2 * lost(weight, least_squares(weight, found == 0, x), x)


def published(weight_OI, x_NI, sparsity, group, turns=20, choosing=15, damping=0.1):
    """W, Z and U of the paper's algorithm in float64, with its cubic steps of the sparsity."""
    gram = (x_NI.double().T @ x_NI.double()).numpy()
    gram = torch.from_numpy(gram)
    norm = gram.diagonal().sqrt()
    gram = gram / norm / norm[:, None]
    gram += damping * torch.eye(len(gram))
    start = weight_OI.double() * norm
    w, u = start, torch.zeros_like(start)
    for turn in range(turns):
        if turn < choosing:
            sizes = (w + u).abs()
            if group is not None:
                sizes = sizes.masked_fill(~prune_mask(sizes, sparsity, group), torch.inf)
            mask = prune_mask(sizes, sparsity - sparsity * (1 - (turn + 1) / choosing) ** 3)
        z = (w + u).masked_fill(mask, 0)
        u = u + w - z
        w = torch.linalg.solve(gram + torch.eye(len(gram)), gram @ start.T + (z - u).T).T
    return ((w + u).masked_fill(mask, 0) / norm).float()


@pytest.mark.parametrize("group", [None, 4, 8], ids=["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(24, 64), (96, 32), (1, 128)])
def test_the_weights_are_those_of_the_published_iteration(outputs, inputs, group):
    """To 1e-4, where weights are about 1, on layers small enough that rounding decides about no zero."""
    x, weight = correlated(300, inputs), torch.randn(outputs, inputs)
    found, wanted = solved(weight, gram_of(x), group=group), published(weight, x, 0.5, group)
    assert int((found == 0).sum()) == weight.numel() / 2
    assert ((found == 0) != (wanted == 0)).sum() <= weight.numel() / 500
    same = ((found == 0) == (wanted == 0)).all(1)
    assert (found - wanted)[same].abs().max() < 1e-4


@pytest.mark.parametrize("group", [None, 4])
def test_it_loses_less_than_sparsegpt_on_correlated_inputs(group):
    """Summed over twelve random layers, and on each."""
    errors = []
    for outputs, inputs in [(16, 64), (64, 64), (64, 256), (128, 96)] * 3:
        x, weight = correlated(2 * inputs, inputs), torch.randn(outputs, inputs)
        gram = gram_of(x)
        both = (
            solved(weight, gram, group=group),
            sparsegpt_weights(weight.clone(), factorised(gram, "layer", 0.01), 0.5, group=group),
        )
        errors.append([lost(weight, new, x) for new in both])
    admm, sparsegpt = torch.tensor(errors).T
    assert (admm < sparsegpt).all()
    assert admm.sum() < 0.85 * sparsegpt.sum()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_the_count_of_zeros_is_exact(sparsity):
    weight, gram = torch.randn(33, 100), gram_of(correlated(300, 100))
    assert int((solved(weight, gram, sparsity) == 0).sum()) == round(sparsity * weight.numel())
    by_row = solved(weight, gram, sparsity, budget="row")
    assert ((by_row == 0).sum(1) == round(sparsity * 100)).all()


def test_the_unit_of_an_input_does_not_matter():
    """Unlike in SparseGPT, of each input by itself."""
    x, weight = correlated(256, 64), torch.randn(16, 64)
    units = torch.logspace(-3, 3, 64)
    plain = solved(weight, gram_of(x))
    assert (solved(weight / units, gram_of(x * units)) * units - plain).abs().max() < 1e-3


def test_dead_inputs_lose_their_weights_first():
    x, weight = correlated(256, 64), torch.randn(16, 64)
    alive = torch.arange(64) % 4 != 0
    x[:, ~alive] = 0
    gram = gram_of(x)
    for found in (solved(weight, gram), solved(weight, gram, group=4)):
        assert found.isfinite().all()
        assert (found[:, ~alive] == 0).all()
        assert int((found == 0).sum()) == weight.numel() / 2
    assert (solved(weight, gram_of(torch.zeros(8, 64))) == 0).sum() == 512


@pytest.mark.parametrize("x", [torch.ones(64, 32), torch.randn(3, 32), torch.randn(64, 1).expand(64, 32) * 1e3])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_inputs_that_depend_on_each_other_are_no_harm(x, damping):
    weight = torch.randn(8, 32)
    found = solved(weight, gram_of(x), damping=damping)
    assert found.isfinite().all()
    assert int((found == 0).sum()) == 128
    assert lost(weight, found, x) < 0.02  # so few directions are easy to keep


def some_batches(n=4):
    return [{"input_ids": torch.randint(96, (2, 24))} for _ in range(n)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_slm])
@pytest.mark.parametrize("group", [None, 4])
def test_a_model_is_pruned_exactly_and_its_layers_lose_less_than_by_sparsegpt(make, group):
    batches, errors = some_batches(16), {}
    for prune in (admm_, sparsegpt_):
        torch.manual_seed(1)
        model = make()
        results = prune(model, batches, sparsity=0.5, group=group, progress=False)
        assert {t.name: (t.weight == 0).float().mean().item() for t in weight_targets(model)} == {
            name: 0.5 for name in results
        }
        errors[prune] = sum(result.error for result in results.values())
    assert errors[admm_] < errors[sparsegpt_]


def test_bf16_weights_stay_bf16_with_exact_zeros():
    model = tiny_llama().bfloat16()
    results = admm_(model, some_batches(), sparsity=0.5, group=4, progress=False)
    for target in weight_targets(model):
        assert target.weight.dtype == torch.bfloat16
        assert ((target.weight.view(-1, 4) == 0).sum(1) >= 2).all()
        assert results[target.name].error < 0.5


def test_layers_of_one_row_and_of_one_input():
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 40), nn.Linear(40, 3))
    shares = admm_(model, [torch.randn(64, 8) for _ in range(4)], sparsity=0.5, progress=False)
    assert {name: result.sparsity for name, result in shares.items()} == {f"{i}.weight": 0.5 for i in range(4)}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"iterations": 0, "mask_iterations": 0}, "at least 1 turns"),
        ({"iterations": 10}, "iterations=10 and mask_iterations=15"),
        ({"damping": -0.1}, "damping=-0.1 must be a share"),
        ({"group": 5}, r"'model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=5"),
        ({"targets": "*q_prj"}, r"Near names: .*q_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_weight_is_touched(asked, complaint):
    model = tiny_llama()
    with pytest.raises(ValueError, match=complaint):
        admm_(model, some_batches(), **asked)
    assert all((t.weight != 0).all() for t in weight_targets(model))
