"""SR-STE against its formula, and N:M weights that come back bit for bit.

Shape letters: B = batch, O = outputs, I = inputs.
"""

import copy

import pytest
import torch
from support import on_two_ranks
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import NMWeights, magnitude_, prune_mask


def net():
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sparsity", "group"), [(0.5, 2), (0.5, 4), (0.75, 4), (0.5, 8), (0.875, 16), (0.5, 64)])
def test_the_mask_is_that_of_the_sort_ties_included(sparsity, group, dtype):
    for scores_OI in (torch.rand(12, 64), torch.randint(0, 3, (12, 64)).float(), torch.zeros(12, 64)):
        scores_OI = scores_OI.to(dtype)
        groups = scores_OI.reshape(-1, group)
        order = groups.sort(dim=1, stable=True).indices[:, : round(sparsity * group)]
        sorted_out = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(12, 64)
        assert torch.equal(prune_mask(scores_OI, sparsity, group), sorted_out)


class Published(torch.autograd.Function):
    """The layer of the paper: a masked weight forwards; backwards the gradient as it comes, and the decay."""

    @staticmethod
    def forward(ctx, weight_OI, keep_OI, decay):
        ctx.save_for_backward(weight_OI, keep_OI)
        ctx.decay = decay
        return weight_OI * keep_OI

    @staticmethod
    def backward(ctx, grad_OI):
        weight_OI, keep_OI = ctx.saved_tensors
        return grad_OI + ctx.decay * (1 - keep_OI) * weight_OI, None, None


def two_largest_of_four(weight_OI):
    """By hand: a loop over groups of plain numbers."""
    keep = torch.zeros_like(weight_OI).flatten()
    sizes = weight_OI.detach().abs().flatten().tolist()
    for start in range(0, len(sizes), 4):
        for i in sorted(range(start, start + 4), key=lambda i: (sizes[i], i))[2:]:
            keep[i] = 1.0
    return keep.view_as(weight_OI)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.05])
def test_gradients_and_weights_are_those_of_the_formula_over_20_steps(decay, optimizer):
    """In float64, to 1e-12: only the order of one addition differs."""
    ours = net().double()
    theirs = copy.deepcopy(ours)
    kwargs = {"lr": 0.05, "weight_decay": 0.01, **({"momentum": 0.9} if optimizer == "SGD" else {})}
    steps = [getattr(torch.optim, optimizer)(model.parameters(), **kwargs) for model in (ours, theirs)]
    weights = NMWeights(weight_targets(ours), sparsity=0.5, group=4)
    flips = 0
    for _ in range(20):
        x_BI, y_BO = torch.randn(32, 16).double(), torch.randn(32, 8).double()
        with weights.hidden():
            assert all(((t.weight.reshape(-1, 4) != 0).sum(1) == 2).all() for t in weights.targets)
            nn.functional.mse_loss(ours(x_BI), y_BO).backward()
        weights.decay_(decay)

        layers = [theirs[0], theirs[2]]
        keeps = [two_largest_of_four(m.weight) for m in layers]
        masked = [Published.apply(m.weight, keep, decay) for m, keep in zip(layers, keeps)]
        hidden = nn.functional.gelu(nn.functional.linear(x_BI, masked[0], theirs[0].bias))
        out = nn.functional.linear(hidden, masked[1], theirs[2].bias)
        nn.functional.mse_loss(out, y_BO).backward()

        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        for step in steps:
            step.step()
            step.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        changed = sum(int((two_largest_of_four(m.weight) != keep).sum()) for m, keep in zip(layers, keeps))
        assert weights.flips() == changed / sum(m.weight.numel() for m in layers)
        flips += changed
    assert flips > 0


def test_what_was_hidden_comes_back_bit_for_bit_and_twice_is_once():
    model = net()
    before = copy.deepcopy(model.state_dict())
    weights = NMWeights(weight_targets(model))
    weights.hide_()
    once = copy.deepcopy(model.state_dict())
    weights.hide_()
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())
    weights.show_()
    weights.show_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_computes_is_what_magnitude_pruning_of_the_same_pattern_leaves():
    model = net()
    pruned = copy.deepcopy(model)
    magnitude_(pruned, sparsity=0.75, group=8)
    with NMWeights(weight_targets(model), 0.75, 8).hidden():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters()))
    NMWeights(weight_targets(model), 0.75, 8).finish_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters()))


def test_the_groups_of_a_conv1d_run_along_its_inputs():
    model = nn.Sequential(Conv1D(8, 16))
    with NMWeights(weight_targets(model)).hidden():
        assert ((model[0].weight.T.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_frozen_weight_computes_as_the_others_and_gets_no_gradient():
    model = net()
    model[0].weight.requires_grad_(False)
    weights = NMWeights(weight_targets(model))
    with weights.hidden():
        assert ((model[0].weight.reshape(-1, 4) == 0).sum(1) == 2).all()
        model(torch.randn(2, 16)).sum().backward()
    weights.decay_(0.1)
    assert model[0].weight.grad is None


def test_a_group_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'0.weight': sparsity=0.5 of group=3 must be whole weights"):
        NMWeights(weight_targets(net()), sparsity=0.5, group=3)


def test_shards_are_masked_as_whole_weights_are_even_where_a_group_lies_on_two_ranks(tmp_path):
    on_two_ranks(
        """
        import copy
        from torch import nn
        from torch.distributed.tensor import distribute_tensor, Shard
        from lightning_slm.nn.targets import weight_targets
        from lightning_slm.pruning import NMWeights

        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(12, 6), nn.Linear(12, 5)])  # 5 rows on two ranks
        whole = copy.deepcopy(model)
        for i, dim in ((0, 1), (1, 0)):  # 12 inputs in two parts: the second group of 4 is cut
            model[i].weight = nn.Parameter(distribute_tensor(model[i].weight.detach(), mesh, [Shard(dim)]))
        ours, theirs = NMWeights(weight_targets(model)), NMWeights(weight_targets(whole))
        for weights in (ours, theirs):
            weights.hide_()
        for a, b in zip(ours.targets, theirs.targets):
            assert torch.equal(a.weight.full_tensor(), b.weight), a.name
        for weights in (ours, theirs):
            weights.show_()
            for target in weights.targets:
                target.weight.grad = torch.zeros_like(target.weight)
            weights.decay_(0.5)
        for a, b in zip(ours.targets, theirs.targets):
            assert torch.equal(a.weight.grad.full_tensor(), b.weight.grad)
            with torch.no_grad():
                for weight in (a.weight, b.weight):
                    weight.copy_(0.1 - weight)
        assert ours.flips() == theirs.flips() > 0
        """,
        tmp_path,
    )
