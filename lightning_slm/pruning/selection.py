"""The lowest scores without sorting, for solvers that choose many times: of a whole, or of every few inputs.

Shape letters: O = outputs of a layer, I = its inputs, G = groups of inputs, M = members of a group,
P = pairs of members.
"""

import functools

import torch
from torch import Tensor

from lightning_slm.pruning.masks import prune_mask


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at exactly ``count`` lowest scores; among equals the first.

    The upper halves of the numbers' bits are counted, which tells in which small class the ``count``-th is; only that
    class is searched.

    Args:
        scores: not negative, float32: then they are ordered as their bits are.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    classes = flat.view(torch.int32) >> 16
    up_to = torch.bincount(classes, minlength=1 << 15).cumsum(0)
    found = int(torch.searchsorted(up_to, count))
    inside = flat[classes == found]
    left = count - (int(up_to[found - 1]) if found else 0)
    cut = inside.kthvalue(left).values
    if int((inside <= cut).sum()) == left:
        return scores <= cut
    mask = flat < cut
    ties = (flat == cut).nonzero().flatten()
    mask[ties[: left - int((inside < cut).sum())]] = True
    return mask.view(scores.shape)


def lowest_of_groups(scores_IO: Tensor, count: int, group: int) -> Tensor:
    """True at the ``count`` lowest of every ``group`` inputs of every output, (I, O); among equals the first.

    The place of each member is counted by comparing it with the others: no sort of millions of tiny rows.
    """
    if group > 16:  # where comparing all with all is more work than a sort
        return prune_mask(scores_IO.T, count / group, group).T
    if len(scores_IO) == group:  # few and small: all comparisons at once
        first_P, second_P, signs_MP, earlier_M1 = _pairs(group, scores_IO.device)
        behind_PO = (scores_IO[first_P] <= scores_IO[second_P]).float()
        return signs_MP @ behind_PO < count - earlier_M1
    members = scores_IO.view(-1, group, scores_IO.shape[1]).unbind(1)
    places_GMO = scores_IO.new_zeros((len(scores_IO) // group, group, scores_IO.shape[1]), dtype=torch.int8)
    places = places_GMO.unbind(1)
    for second in range(1, group):
        for first in range(second):
            behind = (members[first] <= members[second]).view(torch.int8)
            places[second].add_(behind)
            places[first].sub_(behind)
    earlier_M1 = torch.arange(group - 1, -1, -1, dtype=torch.int8, device=scores_IO.device)[:, None]
    return (places_GMO < count - earlier_M1).view(scores_IO.shape)


@functools.cache
def _pairs(group: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of members, the earlier first; who moves back (1) or forward (-1) if the second is behind; and with how
    many members each is paired as the first.
    """
    second_P, first_P = torch.tril_indices(group, group, -1, device=device)
    places_M = torch.eye(group, device=device)
    earlier_M1 = torch.arange(group - 1.0, -1.0, -1.0, device=device)[:, None]
    return first_P, second_P, (places_M[second_P] - places_M[first_P]).T.contiguous(), earlier_M1
