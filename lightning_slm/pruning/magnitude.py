"""Magnitude pruning: small weights matter least (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_slm.nn.sharded import local, part_for, whole
from lightning_slm.nn.targets import Patterns, Target, weight_targets
from lightning_slm.pruning.masks import Budget, prune_masks
from lightning_slm.pruning.one_shot import Sparsity, shares_of, zeros_of


def magnitude_scores(weight: Tensor) -> Tensor:
    """How much a weight is worth: its size. Same shape and dtype."""
    return weight.detach().abs()


@torch.no_grad()
def magnitude_(
    model: nn.Module,
    *,
    sparsity: Sparsity,
    group: int | None = None,
    budget: Budget = "layer",
    targets: Patterns = "*",
    skip: Patterns = (),
) -> dict[str, float]:
    """Set the smallest weights of a model to zero, in place and at once.

    Args:
        model: any module, whole or sharded; which of its weights are meant, `weight_targets` says.
        sparsity: share of the weights to set to zero, between 0 and 1; or shares by name pattern, of which the first
            that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: "row" prunes the same share of each row, "layer" of each layer; "global" the smallest weights wherever
            they are.
        targets: name patterns of what to prune.
        skip: name patterns of what to leave out again.

    Returns:
        The share of zeros of every pruned weight, by its name.

    Raises:
        ValueError: a pattern that matches nothing, or a group that does not fit a layer; names it.

    >>> layer = nn.Linear(4, 2, bias=False)
    >>> magnitude_(layer, sparsity=0.5, group=4)
    {'weight': 0.5}
    """
    if budget == "global" and isinstance(sparsity, Mapping):
        raise ValueError(f'budget="global" settles how much of each layer goes, so sparsity={sparsity!r} cannot.')
    chosen = weight_targets(model, targets, skip)
    shares = shares_of(chosen, sparsity, group)
    for some in [chosen] if budget == "global" else [[target] for target in chosen]:  # who competes with whom
        share = shares[some[0].name]
        scores = [magnitude_scores(_as_OI(whole(t.weight), t)) for t in some]
        masks = prune_masks(scores, share, group=group if 0 < share < 1 else None, budget=budget)
        for target, mask_OI in zip(some, masks):
            mask = part_for(_as_OI(mask_OI, target).contiguous(), target.weight)
            local(target.weight.detach()).masked_fill_(mask, 0)
    return {t.name: zeros_of(t) for t in chosen}


def _as_OI(x: Tensor, target: Target) -> Tensor:
    """From the weight's own layout to (O, I), and back."""
    return x if target.input_dim == 1 else x.T
