"""What the low-bit precision plugins share: when layers are exchanged, what the rest computes in, early refusals."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_slm.nn.sharded import flattens_weights
from lightning_slm.nn.targets import Patterns, what_is_left_alone

Base = Literal["32-true", "bf16-mixed", "bf16-true"]


class LowBitPrecision(Precision):
    """Base of the plugins: ``Trainer(plugins=[...])``, without ``precision=``.

    Layers are exchanged in place, before sharding and before optimizers, as often as Lightning asks; parameters, their
    names and checkpoints stay those of the plain model.

    Args:
        base: what everything but the low-bit layers computes in, by Lightning's names: "bf16-mixed" (weights in
            float32, autocast), "bf16-true" (weights too), "32-true".
        targets: name patterns of the linear layers to exchange; embeddings and output heads never are.
        skip: name patterns of what to leave out again.
    """

    multiplies: ClassVar[torch.dtype]  # what the matrix products are made in: what a peak of hardware is quoted for

    def __init__(self, base: Base = "bf16-mixed", targets: Patterns = "*", skip: Patterns = ()) -> None:
        if base not in get_args(Base):
            raise ValueError(f"base={base!r} must be one of {', '.join(map(repr, get_args(Base)))}.")
        self.base, self.targets, self.skip = base, targets, skip
        self.precision = base  # type: ignore[assignment]
        self.converted: list[str] = []  # names of the exchanged layers
        self._device = "cpu"

    # What a plugin says.

    def convert_(self, model: nn.Module) -> list[str]:
        """Exchange the layers of ``model`` in place and return their names; a second time changes nothing."""
        raise NotImplementedError

    # When.

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Exchange the layers; the module stays the same object, for DDP ignores what is returned."""
        refuse_strategy(self, module)
        self.converted = self.convert_(module)
        return module.to(torch.bfloat16) if self.base == "bf16-true" else module

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> Any:
        """The model is on its device now: autocast there."""
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        if (what := what_is_left_alone(model)) is not None:
            rank_zero_info(f"{type(self).__name__}: {what}.")
        return super().connect(model, optimizers, lr_schedulers)

    # What the rest computes in.

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        mixed = self.base == "bf16-mixed"
        with torch.autocast(self._device, dtype=torch.bfloat16) if mixed else self.tensor_init_context():
            yield

    def tensor_init_context(self) -> Any:
        return _DtypeContextManager(torch.bfloat16) if self.base == "bf16-true" else nullcontext()

    def module_init_context(self) -> Any:
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        if self.base != "bf16-true":
            return data
        return apply_to_collection(data, Tensor, _convert_fp_tensor, dst_type=torch.bfloat16)


def refuse_strategy(plugin: Precision, module: nn.Module) -> None:
    """Raises: ValueError: the strategy keeps weights of its own, which exchanged layers would not reach."""
    if found := flattens_weights(getattr(getattr(module, "_trainer", None), "strategy", None)):
        raise ValueError(
            f"{type(plugin).__name__} does not work with {found}, which casts and flattens the weights by rules of its "
            'own: use strategy="slm_fsdp2" or "slm_zero1", which shard the same states, or "ddp".'
        )
