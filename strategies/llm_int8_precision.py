"""LLM.int8() as a precision: products in int8 but for outliers (Dettmers 2022, https://arxiv.org/abs/2208.07339)."""

from typing import ClassVar

import torch
from torch import nn

from lightning_slm.nn.targets import Patterns
from lightning_slm.strategies._low_bit import Base
from lightning_slm.strategies.nf4_precision import FrozenPrecision


class LLMInt8Precision(FrozenPrecision):
    """Linear layers as frozen int8 codes that multiply in int8: ``Trainer(plugins=[LLMInt8Precision()])``.

    Inputs are rounded to int8 too, but for columns with outliers, in training as in evaluation, on CPU as on CUDA.
    Checkpoints hold the plain weights that the codes stand for, under their plain names: they load without this
    plugin, and with it to the same codes.

    Args:
        threshold: columns of inputs with a magnitude from here on are multiplied in full precision; 0: none are.
        base: what everything else computes in, by Lightning's names: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers to freeze; embeddings, output heads and adapters never are.
        skip: name patterns of what to leave out again.
    """

    multiplies: ClassVar[torch.dtype] = torch.int8

    def __init__(
        self, threshold: float = 6.0, base: Base = "bf16-mixed", targets: Patterns = "*", skip: Patterns = ()
    ) -> None:
        super().__init__(base, targets, skip)
        self.threshold = threshold

    def convert_(self, model: nn.Module) -> list[str]:
        """Freeze the layers of ``model`` in place and return their names."""
        from lightning_slm.quantization.bnb import llm_int8_  # importing bitsandbytes takes seconds

        return llm_int8_(model, self.threshold, self.targets, self.skip)
