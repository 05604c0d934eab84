"""Masks against a sort of plain Python numbers. Shape letters: O = outputs, I = inputs."""

import pytest
import torch
from torch import nn

from lightning_slm.nn.targets import Target
from lightning_slm.pruning import HeldMasks, prune_mask, prune_masks

SCORES = {
    "distinct": lambda: torch.rand(6, 16),
    "many ties": lambda: torch.randint(0, 3, (6, 16)).float(),
    "all zero": lambda: torch.zeros(6, 16),
    "bf16": lambda: torch.rand(6, 16).bfloat16(),
}


def naive_mask(scores_OI, sparsity, group):
    """Sort (score, position) pairs; the first go."""
    flat = scores_OI.flatten().tolist()
    size = group or len(flat)
    mask = [False] * len(flat)
    for start in range(0, len(flat), size):
        order = sorted(range(start, start + size), key=lambda i: (flat[i], i))
        for i in order[: round(sparsity * size)]:
            mask[i] = True
    return torch.tensor(mask).view(scores_OI.shape)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(("sparsity", "group"), [(0.5, None), (0.37, None), (0.01, None), (0.5, 4), (0.75, 8)])
def test_the_lowest_scores_go_and_among_equals_the_first(scores, sparsity, group):
    scores_OI = scores()
    assert torch.equal(prune_mask(scores_OI, sparsity, group), naive_mask(scores_OI, sparsity, group))


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("group", [None, 4])
def test_every_stop_of_the_ramp_is_exact_and_the_end_is_the_whole_mask(scores, budget, group):
    layers = [scores(), scores()[:3]]
    elements = sum(s.numel() for s in layers)
    for ramp in (0.0, 0.3, 0.5, 0.99, 1.0):
        masks = prune_masks(layers, 0.5, group=group, budget=budget, ramp=ramp)
        if budget == "layer":
            assert [int(m.sum()) for m in masks] == [round(ramp * 0.5 * m.numel()) for m in masks]
        assert sum(int(m.sum()) for m in masks) == pytest.approx(ramp * 0.5 * elements, abs=1)
        if group:
            assert max(int(m.view(-1, 4).sum(1).max()) for m in masks) <= 2
    if group:
        assert all((m.view(-1, 4).sum(1) == 2).all() for m in masks)


def test_a_global_budget_takes_from_the_layer_of_small_weights():
    small, large = torch.rand(4, 8) * 0.1, torch.rand(4, 8) + 1
    first, second = prune_masks([small, large], 0.5, budget="global")
    assert first.all()
    assert not second.any()


@pytest.mark.parametrize(("sparsity", "group", "inputs"), [(0.5, 3, 12), (0.5, 4, 10), (0.3, 4, 8), (0.5, 0, 8)])
def test_a_group_that_does_not_fit_is_refused_with_the_way_out(sparsity, group, inputs):
    with pytest.raises(ValueError, match=f"whole weights in whole groups, but a row has {inputs} inputs; skip this"):
        prune_mask(torch.rand(2, inputs), sparsity, group)


def linear_masks(weight_OI):
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight.data.copy_(weight_OI)
    return layer.weight, HeldMasks([Target("w", layer, "weight", input_dim=1)])


@pytest.mark.parametrize("group", [None, 4])
def test_a_pruned_weight_stays_pruned_before_a_kept_one_that_became_zero(group):
    weight, masks = linear_masks(torch.rand(8, 16) + 0.1)
    masks.grow([weight.abs()], 0.5, group=group, ramp=0.4)
    masks.apply_([weight])
    pruned = weight == 0
    weight.data[:, :6] = 0.0  # zeros by chance, first in every tie
    masks.grow([weight.abs()], 0.5, group=group)
    later = torch.ones(8, 16)
    masks.apply_([later])
    assert not later[pruned].any()
    assert (later == 0).sum() == 64


def test_masks_are_found_again_in_the_weights_though_some_kept_weights_are_zero():
    weight, masks = linear_masks(torch.randn(8, 16))
    masks.grow([weight.abs()], 0.25)
    masks.apply_([weight])
    weight.data[0] = 0.0
    kept_zeros = masks.kept_zeros()
    _, found = linear_masks(weight.data)
    found.find(kept_zeros)
    ones, again = torch.ones(8, 16), torch.ones(8, 16)
    masks.apply_([ones])
    found.apply_([again])
    assert torch.equal(ones, again)
    assert 0 < kept_zeros["w"].numel() < 16
    assert (ones == 0).sum() == 32


def test_a_freshly_zeroed_matrix_keeps_its_share_of_free_weights():
    weight, masks = linear_masks(torch.zeros(8, 16))  # as LoRA's B
    masks.grow([weight.abs()], 0.5)
    masks.apply_([weight])
    kept_zeros = masks.kept_zeros()
    masks.find(kept_zeros)
    ones = torch.ones(8, 16)
    masks.apply_([ones])
    assert ones.sum() == 64
