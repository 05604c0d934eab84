"""What the solvers that keep a layer's outputs have in common: the Gram matrix of its inputs, factorised once.

Shape letters: I = inputs of a layer.
"""

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_slm.calibration import InputGram
from lightning_slm.pruning.one_shot import Task

Factor = TypeVar("Factor")


class OncePerInput(Generic[Factor]):
    """Layers that are given the same inputs (queries, keys and values; gate and up) share what is made of them.

    Only the last one is kept, and no longer than its statistic lives: such layers stand beside each other, and a factor
    is as large as the Gram matrix itself.

    Args:
        make: gets the statistic and the name of the first layer that asks.
    """

    def __init__(self, make: Callable[[InputGram, str], Factor]) -> None:
        self._make = make
        self._last: WeakKeyDictionary[InputGram, Factor] = WeakKeyDictionary()

    def __call__(self, task: Task) -> Factor:
        assert isinstance(task.inputs, InputGram)
        found = self._last.get(task.inputs)
        if found is None:
            self._last.clear()  # before the next one needs its memory
            found = self._last[task.inputs] = self._make(task.inputs, task.name)
        return found


def cholesky_damped(matrix_II: Tensor, damping: float, name: str) -> Tensor:
    """Lower Cholesky factor of ``matrix + damping * mean(diagonal) * identity``, with more damping where that is none.

    Too little is known of a matrix whose damping drowns in the rounding of its large entries: such a factor may exist
    and mean nothing. With damping enough, no squared pivot is smaller than the damping.

    Args:
        matrix_II: positive semi-definite, up to rounding; it is overwritten.
        damping: share of the mean of the diagonal.
        name: of the layer, for the warning that says by how much the damping was raised.
    """
    diagonal_I = matrix_II.diagonal()
    mean = diagonal_I.mean().item() or 1.0
    own_I, raised = diagonal_I.clone(), damping
    while True:
        diagonal_I.copy_(own_I + raised * mean)
        factor_II, failed = torch.linalg.cholesky_ex(matrix_II)
        least = max(0.5 * raised, torch.finfo(matrix_II.dtype).eps) * mean
        if not failed and factor_II.diagonal().square().min() >= least:
            break
        raised = max(10 * raised, 1e-5)
    if raised > damping:
        warnings.warn(
            f"{name!r}: damping={damping:g} is too little for the inputs of this layer (fewer calibration tokens than "
            f"inputs, or inputs that depend on each other); {raised:g} was taken.",
            UserWarning,
            stacklevel=2,
        )
    return factor_II
