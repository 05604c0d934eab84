"""Prune small weights at once (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

import math
from collections.abc import Callable
from typing import Any, get_args

from lightning_slm.callbacks._one_shot import OneShotPruning, When
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning import magnitude_
from lightning_slm.pruning.masks import Budget
from lightning_slm.pruning.one_shot import Pruned


class MagnitudePruning(OneShotPruning):
    """Zero the smallest weights once, without calibration data, and hold the zeros in all training that follows.

    Args:
        sparsity: share of zeros, between 0 and 1; or shares by name pattern, of which the first that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: which weights compete: "row": those of one output; "layer": those of one layer; "global": all.
        when: "start" of the training, which then recovers with the zeros held; or its "end", after which the model is
            to be saved: checkpoints of the run itself are dense.
        targets: name patterns of what to prune.
        skip: name patterns of what to leave out again.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        group: int | None = None,
        budget: Budget = "layer",
        when: When = "start",
        targets: Patterns = "*",
        skip: Patterns = (),
    ) -> None:
        super().__init__(sparsity, group, when, targets=targets, skip=skip)
        if budget not in get_args(Budget):
            raise ValueError(f"budget={budget!r} must be 'row', 'layer' or 'global'.")
        self.budget = budget

    def calibration_data(self, trainer: Any, pl_module: Any) -> list[Any]:
        """None is needed."""
        return []

    def prune(self, pl_module: Any, batches: list[Any], run: Callable[[Any], Any], progress: bool) -> dict[str, Pruned]:
        shares = magnitude_(
            pl_module,
            sparsity=self.sparsity,
            group=self.group,
            budget=self.budget,
            targets=self.targets,
            skip=self.skip,
        )
        return {name: Pruned(share, error=math.nan, dead=0, seen=True) for name, share in shares.items()}
