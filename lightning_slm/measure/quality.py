"""How well a model predicts text: perplexity and bits per byte, token-correct over batches and ranks.

Perplexity is exp(mean nats per token) over non-overlapping windows; it depends on the tokenizer. Bits per byte is the
same sum of nats, in bits, per byte of the text that the tokens stand for; so models with other tokenizers compare.
"""

# Shape letters: B = batch, T = tokens, V = vocabulary.

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class _NatsPer(Metric):
    """Summed nats over a summed unit. float32, since float64 does not exist on every accelerator (MPS)."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nats: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros(()), dist_reduce_fx="sum")

    def _add(self, nats_sum: Tensor | float, units: Tensor | float) -> None:
        self.nats += torch.as_tensor(nats_sum, dtype=self.nats.dtype, device=self.nats.device)
        self.units += torch.as_tensor(units, dtype=self.units.dtype, device=self.units.device)


class Perplexity(_NatsPer):
    """exp(mean nats per token), from sums: unlike a mean of batch losses it is right for unequal batches and ranks.

    >>> perplexity = Perplexity()
    >>> perplexity.update(3 * math.log(7), 3)
    >>> perplexity.update(1 * math.log(7), 1)
    >>> round(perplexity.compute().item(), 4)
    7.0
    """

    def update(self, nats_sum: Tensor | float, tokens: Tensor | int) -> None:
        """Add a batch: cross-entropy summed over its predicted tokens, in nats, and how many these were."""
        self._add(nats_sum, tokens)

    def compute(self) -> Tensor:
        return torch.exp(self.nats / self.units)


class BitsPerByte(_NatsPer):
    """Bits needed per byte of the original text.

    >>> bits_per_byte = BitsPerByte()
    >>> bits_per_byte.update(12 * math.log(2), 4.0)
    >>> bits_per_byte.compute().item()
    3.0
    """

    def update(self, nats_sum: Tensor | float, bytes: Tensor | float) -> None:
        """Add a batch: cross-entropy summed over its predicted tokens, in nats, and the bytes these stand for."""
        self._add(nats_sum, bytes)

    def compute(self) -> Tensor:
        return self.nats / (self.units * math.log(2))
