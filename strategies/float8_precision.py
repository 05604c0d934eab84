"""FP8 training in any Trainer: linear layers multiply 8-bit floats (https://arxiv.org/abs/2209.05433)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lightning_slm.errors import NoEffectWarning, near
from lightning_slm.nn.targets import Patterns
from lightning_slm.strategies._low_bit import Base, LowBitPrecision

# torchao is imported when layers are exchanged: importing it takes seconds.

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Float8Precision(LowBitPrecision):
    """Linear layers round their operands to FP8 and multiply that: ``Trainer(plugins=Float8Precision())``.

    Weights stay in high precision and are rounded anew at every step, with scales from their present magnitudes; so
    checkpoints are the plain model's, and no state is kept.

    Args:
        recipe: "tensorwise": one scale per tensor, gradients in E5M2; fastest. "rowwise": one per row, all in E4M3.
            "rowwise_with_gw_hp": as rowwise, but the weights' gradients are not computed in FP8; most exact.
        emulate: round as FP8 does but multiply in float32: for trying it out on any hardware. Slower than without FP8.
        base: what everything else computes in: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers; embeddings and output heads never are.
        skip: name patterns of what to leave out again.
        fp8_all_gather: under ``strategy="slm_fsdp2"``, gather the weights as FP8 too. With "tensorwise" only.

    Raises:
        ValueError: an unknown recipe or base, or ``fp8_all_gather`` with another recipe.
        RuntimeError: when training begins, where the hardware does not multiply FP8 and ``emulate`` is off.
    """

    multiplies: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def __init__(
        self,
        recipe: Recipe = "tensorwise",
        emulate: bool = False,
        base: Base = "bf16-mixed",
        targets: Patterns = "*",
        skip: Patterns = (),
        fp8_all_gather: bool = False,
    ) -> None:
        super().__init__(base, targets, skip)
        if recipe not in get_args(Recipe):
            raise ValueError(f"recipe={recipe!r} is unknown. {near(recipe, get_args(Recipe))}")
        if fp8_all_gather and recipe != "tensorwise":
            raise ValueError(
                f"fp8_all_gather=True needs one scale per weight, and recipe={recipe!r} has one per row: use "
                'recipe="tensorwise", or leave fp8_all_gather out.'
            )
        self.recipe, self.emulate, self.fp8_all_gather = recipe, emulate, fp8_all_gather
        self._gathering: nn.Module | None = None  # the model, if its weights are gathered as FP8

    def convert_(self, model: nn.Module) -> list[str]:
        """Exchange the layers, unless the hardware cannot do what is asked."""
        from lightning_slm.quantization.float8 import check_hardware, float8_

        if not self.emulate:
            strategy = getattr(getattr(model, "_trainer", None), "strategy", None)
            check_hardware(self.recipe, getattr(strategy, "root_device", None))
        return float8_(model, self.recipe, self.emulate, self.targets, self.skip)

    def before_sharding_(self, module: nn.Module) -> None:
        """For ``slm_fsdp2``, between the exchange and ``fully_shard``."""
        if self.fp8_all_gather:
            from lightning_slm.quantization.float8 import float8_all_gather_

            float8_all_gather_(module)

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> Any:
        """Look whether weights are gathered as FP8."""
        self._gathering = None
        if self.fp8_all_gather:
            from lightning_slm.quantization.float8 import gathers_float8

            if any(gathers_float8(m) for m in model.modules()):
                self._gathering = model
            else:
                warnings.warn(
                    "fp8_all_gather=True has no effect: no weight is gathered as FP8. It needs "
                    'strategy="slm_fsdp2" without meta_init, and layers that multiply in FP8.',
                    NoEffectWarning,
                    stacklevel=2,
                )
        return super().connect(model, optimizers, lr_schedulers)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Before a step, find all scales of the gathered weights with one reduction instead of one per layer.

        Not after the optimizer's step: whatever writes weights in between (a checkpoint, an average of the weights)
        would be rounded by scales that are not its own.
        """
        if self._gathering is not None:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(self._gathering)
        with super().forward_context():
            yield
