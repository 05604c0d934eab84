"""Scores to masks: exactly as many weights as asked for, the same ones on every rank and in every run.

Shape letters: O = outputs of a layer, I = its inputs, G = groups of weights, M = weights of a group. A mask is True
where the weight goes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_slm.nn.targets import Target

# Weights of a group up to which comparing all pairs is faster than a sort: 3.5 times for 2:4 (float32, CPU).
RANKED_UP_TO = 32
# Which weights compete: those of a row (one output), of a layer, of all layers.
Budget = Literal["row", "layer", "global"]


def prune_mask(scores_OI: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """The lowest scores of one layer.

    Args:
        scores_OI: the higher, the more the weight is worth; any float dtype, one row per output.
        sparsity: share of the weights to prune, rounded to whole weights. With ``group`` it must be whole weights.
        group: consecutive inputs of which ``sparsity * group`` go; None: the lowest of the whole layer.
            ``sparsity=0.5, group=4`` is the 2:4 pattern of NVIDIA's sparse tensor cores
            (Mishra et al. 2021, https://arxiv.org/abs/2104.08378).

    Returns:
        bool, shape (O, I); equal scores go in the order in which they stand.

    Raises:
        ValueError: if ``group`` does not divide the row, or ``sparsity * group`` is not whole.

    >>> prune_mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), sparsity=0.5, group=2).int().tolist()
    [[0, 1, 1, 0]]
    """
    if group is None:
        return _lowest(scores_OI.flatten(), round(sparsity * scores_OI.numel())).view(scores_OI.shape)
    check_group(sparsity, group, inputs=scores_OI.shape[1], name="scores")
    return _lowest_of_each(scores_OI.reshape(-1, group), round(sparsity * group)).reshape(scores_OI.shape)


def prune_masks(
    scores: Sequence[Tensor], sparsity: float, *, group: int | None = None, budget: Budget = "layer", ramp: float = 1.0
) -> list[Tensor]:
    """Masks of several layers, on the way to ``sparsity``.

    On the way to N:M, a group is dense, half done or done: its candidates are its ``sparsity * group`` lowest, and of
    all candidates the lowest go first. So the sparsity rises smoothly and ends in the pattern exactly.

    Args:
        scores: one (O, I) tensor per layer; weights that must stay pruned score ``-inf``.
        sparsity: share of the weights to prune at the end of the ramp.
        group: as for `prune_mask`.
        budget: "row" prunes the same share of each row, rounded to whole weights; "layer" of each layer; "global" the
            lowest scores wherever they are.
        ramp: part of ``sparsity`` that is due now, 0 to 1.
    """
    if group is not None:
        candidates = [prune_mask(s, sparsity, group) for s in scores]
        scores = [s.masked_fill(~c, math.inf) for s, c in zip(scores, candidates)]
    if budget == "row":
        return [_lowest_of_each(s, round(ramp * sparsity * s.shape[1])) for s in scores]
    if budget == "layer":
        return [prune_mask(s, ramp * sparsity) for s in scores]
    flat = torch.cat([s.flatten() for s in scores])
    parts = prune_mask(flat[None], ramp * sparsity)[0].split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores)]


def check_targets(targets: Sequence[Target], sparsity: float, group: int | None = None) -> None:
    """Refuse what cannot be pruned as asked, before any weight is touched.

    Raises:
        ValueError: nothing to prune, a sparsity outside of (0, 1), a group that does not fit a layer (names it), or a
            layer whose weights are packed integers.
    """
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} must lie between 0 and 1, both excluded: it is the share of zeros.")
    if not targets:
        raise ValueError("`skip` leaves no weight to prune; name fewer layers there, or drop the pruning.")
    for target in targets:
        weight = target.weight
        if not weight.is_floating_point():
            raise ValueError(
                f"{target.name!r} holds packed {weight.dtype}; prune before quantising, or skip this layer."
            )
        if group is not None:
            check_group(sparsity, group, inputs=weight.shape[target.input_dim], name=target.name)


def check_group(sparsity: float, group: int, inputs: int, name: str) -> None:
    """Raise ValueError unless ``sparsity`` is whole weights in whole groups of the row; name the layer."""
    whole = group > 0 and math.isclose(sparsity * group, round(sparsity * group), abs_tol=1e-6)
    if not whole or inputs % group:
        raise ValueError(
            f"{name!r}: sparsity={sparsity} of group={group} must be whole weights in whole groups, but a row has "
            f"{inputs} inputs; skip this layer, or choose another group (None: the whole layer)."
        )


def _lowest_of_each(scores_GM: Tensor, count: int) -> Tensor:
    """True at the ``count`` lowest entries of each row; among equals the first."""
    if scores_GM.shape[1] > RANKED_UP_TO:
        # A stable sort, since topk may break ties differently from one call to the next.
        order = scores_GM.sort(dim=1, stable=True).indices[:, :count]
        return torch.zeros_like(scores_GM, dtype=torch.bool).scatter_(1, order, True)
    columns_MG = scores_GM.T.contiguous()
    rank_MG = torch.zeros_like(columns_MG, dtype=torch.int8)  # how many of its row go before it
    for i, j in itertools.combinations(range(len(columns_MG)), 2):
        first = columns_MG[i] <= columns_MG[j]
        rank_MG[j] += first
        rank_MG[i] += ~first
    return (rank_MG < count).T


def _lowest(scores: Tensor, count: int) -> Tensor:
    """True at exactly ``count`` lowest entries of a vector; among equals the first.

    Only the value at the cut is taken from topk: which of several equals it picks is not determined.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.topk(count, largest=False, sorted=False).values.max()
    mask = scores < cut
    ties = (scores == cut).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask
