"""Prune by least squares, all inputs at once (ADMM, Boza 2024, https://arxiv.org/abs/2401.02938)."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning_slm.callbacks._one_shot import Allocation, OneShotPruning, When
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.admm import admm_, check_turns
from lightning_slm.pruning.one_shot import Pruned


class ADMMPruning(OneShotPruning):
    """Prune, and fit the weights that stay so that each layer's outputs stay; see `OneShotPruning`.

    Args:
        iterations: turns of the fit.
        mask_iterations: in so many of them zeros are chosen; 0: once, those of Wanda's smallest scores.
        damping: how much the weights shall stay near what they were, as a share of the inputs' mean square.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        group: int | None = None,
        iterations: int = 20,
        mask_iterations: int = 15,
        damping: float = 0.1,
        when: When = "start",
        calibration: int | Iterable[Any] = 32,
        seed: int = 0,
        targets: Patterns = "*",
        skip: Patterns = (),
        allocation: Allocation = "uniform",
    ) -> None:
        super().__init__(sparsity, group, when, calibration, seed, targets, skip, allocation)
        check_turns(iterations, mask_iterations, damping)
        self.iterations, self.mask_iterations, self.damping = iterations, mask_iterations, damping

    def prune(self, pl_module: Any, batches: list[Any], run: Callable[[Any], Any], progress: bool) -> dict[str, Pruned]:
        return admm_(
            pl_module,
            batches,
            sparsity=self.sparsity,
            group=self.group,
            iterations=self.iterations,
            mask_iterations=self.mask_iterations,
            damping=self.damping,
            targets=self.targets,
            skip=self.skip,
            run=run,
            progress=progress,
        )
