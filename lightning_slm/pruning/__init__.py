"""Pruning as functions on tensors and modules: scores, masks, schedules."""

from lightning_slm.pruning.held import HeldMasks
from lightning_slm.pruning.magnitude import magnitude_, magnitude_scores
from lightning_slm.pruning.masks import check_targets, prune_mask, prune_masks
from lightning_slm.pruning.schedules import cubic_sparsity

__all__ = [
    "HeldMasks", "check_targets", "cubic_sparsity", "magnitude_", "magnitude_scores", "prune_mask", "prune_masks",
]  # fmt: skip
