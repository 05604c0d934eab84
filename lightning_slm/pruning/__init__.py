"""Pruning as functions on tensors and modules: scores, masks, schedules."""

from lightning_slm.pruning.admm import admm_
from lightning_slm.pruning.gates import fold_, gated
from lightning_slm.pruning.held import HeldMasks
from lightning_slm.pruning.importance import scores_of
from lightning_slm.pruning.l0 import HardConcrete, L0Gates
from lightning_slm.pruning.magnitude import magnitude_, magnitude_scores
from lightning_slm.pruning.masks import check_targets, prune_mask, prune_masks
from lightning_slm.pruning.nm_training import NMWeights
from lightning_slm.pruning.owl import owl_sparsities
from lightning_slm.pruning.schedules import cubic_sparsity
from lightning_slm.pruning.sheared import PricedMasks, ShearedMasks
from lightning_slm.pruning.shrink import replay_, shrink_
from lightning_slm.pruning.sparsegpt import sparsegpt_
from lightning_slm.pruning.structure import Group, Part, Place, shape_of, structure_of
from lightning_slm.pruning.structured import Target, plan, structured_
from lightning_slm.pruning.wanda import wanda_, wanda_scores

__all__ = [
    "Group", "HardConcrete", "HeldMasks", "L0Gates", "NMWeights", "Part", "Place", "PricedMasks", "ShearedMasks",
    "Target", "admm_", "check_targets", "cubic_sparsity", "fold_", "gated", "magnitude_", "magnitude_scores",
    "owl_sparsities", "plan", "prune_mask", "prune_masks", "replay_", "scores_of", "shape_of",
    "shrink_", "sparsegpt_", "structure_of", "structured_", "wanda_", "wanda_scores",
]  # fmt: skip
