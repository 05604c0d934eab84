"""NF4 as a precision: adapters train on a base that is frozen in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314)."""

from typing import Any, ClassVar

import torch
from torch import nn

from lightning_slm.nn.targets import Patterns
from lightning_slm.strategies._low_bit import Base, LowBitPrecision


class FrozenPrecision(LowBitPrecision):
    """Base of the precisions that freeze weights as codes."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Freeze the layers, after the weights of a checkpoint are there and before optimizers and sharding."""
        refuse_averaging(module)
        return super().convert_module(module)


class NF4Precision(FrozenPrecision):
    """Linear layers as frozen 4-bit codes of bitsandbytes: ``Trainer(plugins=[NF4Precision()])``, on CPU and CUDA.

    Checkpoints hold the plain weights that the codes stand for, under their plain names: they load without this
    plugin, and with it to the same codes.

    Args:
        double_quant: keep the blocks' largest magnitudes in 8 bits: 4.127 bits per weight instead of 4.5.
        block: consecutive inputs that share a magnitude: 32, 64, 128 ... 4096.
        base: what everything else computes in, by Lightning's names: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers to freeze; embeddings, output heads and adapters never are.
        skip: name patterns of what to leave out again.
    """

    multiplies: ClassVar[torch.dtype] = torch.bfloat16  # of what the codes stand for

    def __init__(
        self,
        double_quant: bool = True,
        block: int = 64,
        base: Base = "bf16-mixed",
        targets: Patterns = "*",
        skip: Patterns = (),
    ) -> None:
        super().__init__(base, targets, skip)
        self.double_quant, self.block = double_quant, block
        self._layers: dict[str, Any] = {}

    def convert_(self, model: nn.Module) -> list[str]:
        """Freeze the layers of ``model`` in place and return their names."""
        from lightning_slm.quantization.bnb import frozen_layers, nf4_  # importing bitsandbytes takes seconds

        names = nf4_(model, self.double_quant, self.block, targets=self.targets, skip=self.skip)
        self._layers = frozen_layers(model)
        return names

    def state_dict(self) -> dict[str, Any]:
        """The blocks' magnitudes: rounded to 8 bits they are not found again from the weights they made."""
        if not self.double_quant:
            return {}
        return {name: {k: v.cpu() for k, v in layer.statistics().items()} for name, layer in self._layers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back; Lightning has loaded the weights by now."""
        for name, statistics in state_dict.items():
            layer = self._layers.get(name)
            if layer is not None and shapes(layer.statistics()) == shapes(statistics):  # else in other blocks now
                layer.set_statistics_(statistics)


def shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    """The shape of each."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def refuse_averaging(module: nn.Module) -> None:
    """Raises: ValueError: a callback averages weights; it copied the plain ones, and codes have no average."""
    for callback in getattr(getattr(module, "_trainer", None), "callbacks", ()):
        if any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__):
            raise ValueError(
                f"{type(callback).__name__} averages all parameters, and those of a frozen layer are codes, which have "
                "no average: leave it out (the frozen weights do not change), or train in full precision."
            )
