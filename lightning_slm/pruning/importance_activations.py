"""Scores from what a model computes, without gradients: activations of units, and what a block does to the stream."""

# Shape letters: B = batch, T = tokens, U = units of a group, W = width of a unit, D = width of the residual stream.

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.calibration.run import mask_of
from lightning_slm.pruning.gates import gated
from lightning_slm.pruning.importance_gradients import Loss, check_seen
from lightning_slm.pruning.structure import Group, Place


@torch.no_grad()
def activation_scores(groups: Sequence[Group], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, Tensor]:
    """How large the units are in forward passes (Minitron, Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).

    - heads and key-value groups: the L2 norm of what they give to the output projection;
    - feed-forward units: the absolute value of what they give to the last matrix;
    - channels of the residual stream: the absolute value of the outputs of its norms, added up over the norms;
    - layers: `block_influence`.

    Each is averaged over a text's tokens (padding left out), and the L2 norm is taken over the texts: the paper's
    best aggregation, "(L2, mean)". A text is an entry of a batch's first axis.
    """
    wide = [group for group in groups if group.unit != "layer"]
    deep = [group for group in groups if group.unit == "layer"]
    if wide and deep:
        batches = list(batches)  # looked at twice
    squares: dict[tuple[str, int], Tensor] = {}
    count, mask_BT = 0, None

    def add(group: Group, number: int, place: Place, x: Tensor) -> None:
        units_NU = x.detach().float().unflatten(-1, (group.size, place.width)).norm(dim=-1)
        means_BU = _mean_over_tokens(units_NU, mask_BT)
        key = (group.name, number)
        squares[key] = squares.get(key, 0) + means_BU.square().sum(0)

    with _watching(wide, add):
        for batch in batches if wide else ():
            mask_BT, count = mask_of(batch), count + 1
            run(batch)
    scores = block_influence(deep, batches, run) if deep else {}
    if wide:
        check_seen(count)
    return scores | {group.name: _added_up(group, squares) for group in wide}


@torch.no_grad()
def block_influence(groups: Sequence[Group], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, Tensor]:
    """1 - the cosine of the angle between what goes into a block and what comes out, mean over all tokens (ShortGPT,
    Men et al. 2024, https://arxiv.org/abs/2403.03853).
    """
    (group,) = groups
    sums, tokens, mask_BT = torch.zeros(group.size), torch.zeros(group.size), None

    def add(place: Place, x_BTD: Tensor, y_BTD: Tensor) -> None:
        cosine_BT = nn.functional.cosine_similarity(x_BTD.float(), y_BTD.float(), dim=-1)
        cosines = cosine_BT if mask_BT is None else cosine_BT[mask_BT.to(cosine_BT.device)]
        sums[place.unit] += (1 - cosines).sum().cpu()
        tokens[place.unit] += cosines.numel()

    def look(place: Place) -> Any:
        return place.module.register_forward_hook(
            lambda _, args, kwargs, y: add(
                place, args[0] if args else kwargs["hidden_states"], y[0] if isinstance(y, tuple) else y
            ),
            with_kwargs=True,
        )

    handles, count = [look(place) for place in group.places], 0
    try:
        for batch in batches:
            mask_BT, count = mask_of(batch), count + 1
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    check_seen(count)
    return {group.name: sums / tokens.clamp(min=1)}


@torch.no_grad()
def loss_without_block(
    model: nn.Module, groups: Sequence[Group], batches: Iterable[Any], run: Callable[[Any], Any], loss: Loss
) -> dict[str, Tensor]:
    """How much the loss rises when a block is left out, mean over the batches: of Minitron's two measures of a layer
    the better and dearer one. Takes a forward pass for each block.
    """
    (group,) = groups
    device = next(model.parameters()).device
    gates, rises, count = {group.name: torch.ones(group.size, device=device)}, torch.zeros(group.size), 0
    with gated(model, gates):
        for batch in batches:
            gates[group.name], count = torch.ones(group.size, device=device), count + 1
            whole = float(loss(run(batch), batch))
            for i in range(group.size):
                gates[group.name] = torch.ones(group.size, device=device).index_fill_(0, torch.tensor(i).to(device), 0)
                rises[i] += float(loss(run(batch), batch)) - whole
    check_seen(count)
    return {group.name: rises / count}


def _mean_over_tokens(units_NU: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, U); what has no axis of tokens counts as one text."""
    units_BTU = units_NU.unsqueeze(0) if units_NU.ndim == 2 else units_NU.flatten(1, -2)
    if mask_BT is None or mask_BT.shape != units_BTU.shape[:2]:
        return units_BTU.mean(1)
    weights_BT1 = mask_BT.to(units_BTU)[..., None]
    return (units_BTU * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def _added_up(group: Group, squares: dict[tuple[str, int], Tensor]) -> Tensor:
    found = [total_U.sqrt() for (name, _), total_U in squares.items() if name == group.name]
    if not found:
        raise ValueError(
            f"{group.name!r} was never called in the forward passes on the calibration data, so nothing is known of it."
        )
    return torch.stack(found).sum(0)


@contextmanager
def _watching(groups: Sequence[Group], add: Callable[[Group, int, Place, Tensor], None]) -> Iterator[None]:
    """Show what units give at the places that tell: inputs of the layer after them, outputs of norms."""
    handles = []
    for group in groups:
        for number, place in enumerate(group.places):
            if place.at == "input":
                see = lambda _, args, g=group, n=number, p=place: add(g, n, p, args[0])  # noqa: E731
                handles.append(place.module.register_forward_pre_hook(see))
            elif place.at == "norm":
                hear = lambda _, args, y, g=group, n=number, p=place: add(g, n, p, y)  # noqa: E731
                handles.append(place.module.register_forward_hook(hear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
