"""INT4 products as a precision plugin: Hadamard quantiser and leverage score sampling (arXiv 2306.11987)."""

from typing import ClassVar

import torch
from torch import nn

from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.int4 import int4_
from lightning_slm.strategies._low_bit import Base, LowBitPrecision


class Int4Precision(LowBitPrecision):
    """Trains linear layers with INT4 products, forward and backward; weights and checkpoints stay as they are.

    Args:
        base: what everything else computes in: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers to exchange; embeddings and output heads never are.
        skip: name patterns of what to leave out again.
        sampled: drop half of the rows of the split gradient at random, as the paper does; False keeps them all.
    """

    multiplies: ClassVar[torch.dtype] = torch.int8  # that carries the 4-bit codes: PyTorch has no narrower product

    def __init__(
        self, base: Base = "bf16-mixed", targets: Patterns = "*", skip: Patterns = (), sampled: bool = True
    ) -> None:
        super().__init__(base, targets, skip)
        self.sampled = sampled

    def convert_(self, model: nn.Module) -> list[str]:
        """Exchange the linear layers in place and return their names."""
        return int4_(model, self.targets, self.skip, self.sampled)
