"""Prune by weight and activation (Wanda, Sun et al. 2023, https://arxiv.org/abs/2306.11695)."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

from lightning_slm.callbacks._one_shot import Allocation, OneShotPruning, When
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.masks import Budget
from lightning_slm.pruning.one_shot import Pruned
from lightning_slm.pruning.wanda import wanda_


class WandaPruning(OneShotPruning):
    """Zero the weights of the smallest product of size and input norm; see `OneShotPruning`.

    Args:
        budget: which weights compete: "row": those of one output, as published; "layer": those of one layer;
            "global": all.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        group: int | None = None,
        budget: Budget = "row",
        when: When = "start",
        calibration: int | Iterable[Any] = 32,
        seed: int = 0,
        targets: Patterns = "*",
        skip: Patterns = (),
        allocation: Allocation = "uniform",
    ) -> None:
        super().__init__(sparsity, group, when, calibration, seed, targets, skip, allocation)
        if budget not in get_args(Budget):
            raise ValueError(f"budget={budget!r} must be 'row', 'layer' or 'global'.")
        self.budget = budget

    def prune(self, pl_module: Any, batches: list[Any], run: Callable[[Any], Any], progress: bool) -> dict[str, Pruned]:
        return wanda_(
            pl_module,
            batches,
            sparsity=self.sparsity,
            group=self.group,
            budget=self.budget,
            targets=self.targets,
            skip=self.skip,
            run=run,
            progress=progress,
        )
