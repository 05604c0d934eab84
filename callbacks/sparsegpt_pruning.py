"""Prune by least squares, input by input (SparseGPT, Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774)."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning_slm.callbacks._one_shot import Allocation, OneShotPruning, When
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.one_shot import Pruned
from lightning_slm.pruning.sparsegpt import check_sweep, sparsegpt_


class SparseGPTPruning(OneShotPruning):
    """Prune, and change the weights that stay so that each layer's outputs stay; see `OneShotPruning`.

    Args:
        block_size: without ``group``, so many inputs are chosen from at a time.
        damping: share of the inputs' mean square that is added to each of them.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        group: int | None = None,
        block_size: int = 128,
        damping: float = 0.01,
        when: When = "start",
        calibration: int | Iterable[Any] = 32,
        seed: int = 0,
        targets: Patterns = "*",
        skip: Patterns = (),
        allocation: Allocation = "uniform",
    ) -> None:
        super().__init__(sparsity, group, when, calibration, seed, targets, skip, allocation)
        check_sweep(block_size, damping)
        self.block_size, self.damping = block_size, damping

    def prune(self, pl_module: Any, batches: list[Any], run: Callable[[Any], Any], progress: bool) -> dict[str, Pruned]:
        return sparsegpt_(
            pl_module,
            batches,
            sparsity=self.sparsity,
            group=self.group,
            block_size=self.block_size,
            damping=self.damping,
            targets=self.targets,
            skip=self.skip,
            run=run,
            progress=progress,
        )
