"""INT8 products as a precision plugin: torchao's mixed-precision training, or Jetfire (arXiv 2403.12422)."""

from typing import ClassVar

import torch
from torch import nn

from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.int8 import Recipe, int8_
from lightning_slm.strategies._low_bit import Base, LowBitPrecision


class Int8Precision(LowBitPrecision):
    """Trains linear layers with INT8 products, forward and backward; weights and checkpoints stay as they are.

    Args:
        recipe: how scales are chosen: "rowwise" (a scale per token and per output, torchao's) or "blockwise" (a scale
            per square, Jetfire's, which saves the inputs for the backward pass in one byte each).
        block: side of the squares of "blockwise".
        base: what everything else computes in: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers to exchange; embeddings and output heads never are.
        skip: name patterns of what to leave out again.
    """

    multiplies: ClassVar[torch.dtype] = torch.int8

    def __init__(
        self,
        recipe: Recipe = "rowwise",
        block: int = 32,
        base: Base = "bf16-mixed",
        targets: Patterns = "*",
        skip: Patterns = (),
    ) -> None:
        super().__init__(base, targets, skip)
        self.recipe, self.block = recipe, block

    def convert_(self, model: nn.Module) -> list[str]:
        """Exchange the linear layers in place and return their names."""
        return int8_(model, self.recipe, self.block, self.targets, self.skip)
