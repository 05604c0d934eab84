"""What is kept of a layer's inputs: their norms, or their Gram matrix. Sums, so that ranks and batches add up."""

# Shape letters: N = rows (positions of all texts), I = inputs of a layer.

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

_PANEL = 128  # inputs at a time; of 1376 inputs, 0.6 of the time of a whole product (one thread of an EPYC)


class InputNorms:
    """The root mean square of every input feature (up to a common factor, the norm that Wanda multiplies by).

    Memory: I floats.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.squares_I = torch.zeros(inputs, device=device)
        self.rows = 0

    def update(self, x_NI: Tensor) -> None:
        """Add rows."""
        self.squares_I += x_NI.float().square().sum(0)
        self.rows += len(x_NI)

    def reduce_(self) -> Self:
        """Add up over all ranks; each must call this."""
        self.rows = _over_ranks(self.squares_I, self.rows)
        return self

    @property
    def energy_I(self) -> Tensor:
        """Summed squares of every feature; 0: the feature is dead."""
        return self.squares_I

    @property
    def rms_I(self) -> Tensor:
        """Root mean square of every feature, float32."""
        return (self.squares_I / max(self.rows, 1)).sqrt()


class InputGram:
    """X^T X over all rows: what the squared error of a layer's outputs depends on (the Hessian of least squares).

    Memory: I * I floats.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.gram_II = torch.zeros(inputs, inputs, device=device)
        self.rows = 0

    def update(self, x_NI: Tensor) -> None:
        """Add rows: products in float32, whatever the model computes in, of one triangle; the other mirrors it."""
        x_NI = x_NI.float()
        for start in range(0, x_NI.shape[1], _PANEL):
            stop = start + _PANEL
            self.gram_II[start:stop, :stop].addmm_(x_NI[:, start:stop].T, x_NI[:, :stop])
            self.gram_II[:start, start:stop] = self.gram_II[start:stop, :start].T
        self.rows += len(x_NI)

    def reduce_(self) -> Self:
        """Add up over all ranks; each must call this."""
        self.rows = _over_ranks(self.gram_II, self.rows)
        return self

    @property
    def energy_I(self) -> Tensor:
        """Summed squares of every feature; 0: the feature is dead."""
        return self.gram_II.diagonal()

    @property
    def rms_I(self) -> Tensor:
        """Root mean square of every feature, float32."""
        return (self.energy_I / max(self.rows, 1)).sqrt()


Statistic = InputNorms | InputGram


def over_ranks(value: Any) -> list[Any]:
    """What each rank has to say, a plain value; all must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def _over_ranks(sums: Tensor, rows: int) -> int:
    counts = over_ranks(rows)
    if len(counts) > 1:
        dist.all_reduce(sums)
    return sum(counts)
