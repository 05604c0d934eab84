"""Magnitude pruning: small weights matter least (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

import torch
from torch import Tensor, nn

from lightning_slm.nn.targets import Patterns, weight_targets
from lightning_slm.pruning.masks import Budget, check_targets, prune_masks


def magnitude_scores(weight: Tensor) -> Tensor:
    """How much a weight is worth: its size. Same shape and dtype."""
    return weight.detach().abs()


@torch.no_grad()
def magnitude_(
    model: nn.Module,
    *,
    sparsity: float,
    group: int | None = None,
    budget: Budget = "layer",
    targets: Patterns = "*",
    skip: Patterns = (),
) -> dict[str, float]:
    """Set the smallest weights of a model to zero, in place and at once.

    Args:
        model: any module; which of its weights are meant, `weight_targets` says.
        sparsity: share of the weights to set to zero, between 0 and 1.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: "layer" prunes the same share of each layer; "global" the smallest weights wherever they are.
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
    chosen = weight_targets(model, targets, skip)
    check_targets(chosen, sparsity, group)
    scores = [magnitude_scores(t.weight if t.input_dim == 1 else t.weight.T) for t in chosen]
    for target, mask_OI in zip(chosen, prune_masks(scores, sparsity, group=group, budget=budget)):
        target.weight.masked_fill_(mask_OI if target.input_dim == 1 else mask_OI.T, 0)
    return {t.name: (t.weight == 0).float().mean().item() for t in chosen}
