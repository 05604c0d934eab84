"""Zeros that are held while a Trainer trains."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import Target
from lightning_slm.pruning import HeldMasks, prune_mask


def all_that_forgets(trainer: Any, masks: HeldMasks) -> Iterator[list[Tensor | None]]:
    """Where pruned weights must become zero: the weights, their momenta, and moving averages that callbacks keep."""
    weights = [t.weight for t in masks.targets]
    yield list(weights)
    for optimizer in trainer.optimizers:
        states = [optimizer.state.get(w, {}) for w in weights]
        for key in {key for state in states for key in state}:
            moments = [state.get(key) for state in states]
            yield [m if getattr(m, "shape", None) == w.shape else None for m, w in zip(moments, weights)]
    for kept in (value for callback in trainer.callbacks for value in vars(callback).values()):
        if isinstance(kept, AveragedModel):
            yield [kept.module.get_parameter(t.name) for t in masks.targets]


@torch.no_grad()
def zeros_in(targets: Sequence[Target]) -> dict[str, Tensor]:
    """Flat positions of the zeros of whole weights, by target name (mostly none); all ranks must call this."""
    found = {t.name: (whole(t.weight) == 0).flatten().nonzero().flatten().cpu() for t in targets}
    return {name: positions for name, positions in found.items() if positions.numel()}


@torch.no_grad()
def more_than_asked(
    targets: Sequence[Target], zeros: Mapping[str, Tensor], shares: Mapping[str, float], group: int | None
) -> dict[str, Tensor]:
    """Those of the ``zeros`` before pruning that pruning did not need, by target name: they may learn.

    A zero-initialised matrix is pruned to its share like any other, not for good.
    """
    kept = {}
    for t in (t for t in targets if t.name in zeros):
        weight = whole(t.weight).abs()
        share = shares[t.name]
        mask_OI = prune_mask(weight if t.input_dim == 1 else weight.T, share, group if 0 < share < 1 else None)
        needed = (mask_OI if t.input_dim == 1 else mask_OI.T).flatten().cpu()
        kept[t.name] = zeros[t.name][~needed[zeros[t.name]]]
    return {name: positions for name, positions in kept.items() if positions.numel()}
