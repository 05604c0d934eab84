"""BitNet training in any Trainer: weights of 1.58 bits (https://arxiv.org/abs/2402.17764) or of one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.bitnet import Bits, bit_layers, bitnet_, check_bits, quantize_bits, set_share_
from lightning_slm.strategies._low_bit import Base, LowBitPrecision


class BitNetPrecision(LowBitPrecision):
    """Linear layers train weights that count as -1, 0 or +1: ``Trainer(plugins=BitNetPrecision())``.

    Checkpoints are the plain model's; ``save_hf_folder`` packs the codes. Every ``log_every_n_steps``, two shares of
    all codes are logged: ``slm/flip_rate``, those that this step has changed, and ``slm/zero_fraction``.

    Args:
        bits: "1.58" for weights of -1, 0 and +1; "1" for -1 and +1.
        base: what everything else computes in: "bf16-mixed", "bf16-true" or "32-true".
        targets: name patterns of the linear layers; embeddings and output heads never are.
        skip: name patterns of what to leave out again.
        warmup: fraction of the run over which the rounding grows from nothing to all of it: for a model that was
            trained without. 0: all of it from the beginning, as for a new model.
        weight_decay_until: fraction of the run after which weight decay ends; the paper's is 0.5.
        sub_norm: scale each token to a root mean square of 1 before it is rounded, as inside the published layer.

    Raises:
        ValueError: unknown bits or base, or a fraction that is none; when training begins, a run of unknown length with
            either fraction in use.
    """

    multiplies: ClassVar[torch.dtype] = torch.int8  # forward; backward, in the base's

    def __init__(
        self,
        bits: Bits = "1.58",
        base: Base = "bf16-mixed",
        targets: Patterns = "*",
        skip: Patterns = (),
        warmup: float = 0.0,
        weight_decay_until: float = 1.0,
        sub_norm: bool = False,
    ) -> None:
        super().__init__(base, targets, skip)
        check_bits(bits)
        if not (0 <= warmup <= 1 and 0 <= weight_decay_until <= 1):
            raise ValueError(
                f"warmup={warmup} and weight_decay_until={weight_decay_until} are fractions of the run: from 0 to 1."
            )
        self.bits, self.sub_norm = bits, sub_norm
        self.warmup, self.weight_decay_until = warmup, weight_decay_until
        self._model: Any = None
        self._run_steps: int | None = None  # optimizer steps of the run that the fractions are of

    def convert_(self, model: nn.Module) -> list[str]:
        """Exchange the layers."""
        return bitnet_(model, self.bits, self.targets, self.skip, self.sub_norm)

    # When.

    def convert_module(self, module: nn.Module) -> nn.Module:
        """A new run: what was known of the last one is forgotten."""
        self._model, self._run_steps = module, None
        return super().convert_module(module)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """The position of the warm-up is a function of the step, so that a resumed run continues it."""
        if self.warmup:
            set_share_(self._model, self._share(self._model.trainer))
        with super().forward_context():
            yield

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """End the weight decay when it is time, and look at the codes before and after the step when that is logged."""
        trainer = model.trainer
        if self.weight_decay_until < 1 and trainer.global_step >= self._steps(trainer, self.weight_decay_until):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
        every = trainer.log_every_n_steps
        looks = every and (trainer.global_step + 1) % every == 0
        before = self._codes() if looks else []
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        if looks and before:
            for name, value in _shares(before, self._codes()).items():
                model.log(name, value, on_step=True, on_epoch=False)
        return result

    def teardown(self) -> None:
        """Leave layers that feel all of the rounding."""
        if self._model is not None:
            set_share_(self._model, 1.0)
        self._model = None
        super().teardown()

    # State: the length of the run, so that a longer one it is resumed as does not begin anew.

    def state_dict(self) -> dict[str, Any]:
        """Nothing, unless a fraction is in use."""
        return {} if self._run_steps is None else {"run_steps": self._run_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_steps = state_dict.get("run_steps")

    # How.

    def _share(self, trainer: Any) -> float:
        if trainer.state.fn != "fit":  # evaluated alone, a model is what will be exported
            return 1.0
        steps = self._steps(trainer, self.warmup)
        return min(trainer.global_step / steps, 1.0) if steps else 1.0

    def _steps(self, trainer: Any, fraction: float) -> int:
        if self._run_steps is None:
            total = trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise ValueError(
                    f"BitNetPrecision(warmup={self.warmup}, weight_decay_until={self.weight_decay_until}) needs to "
                    "know how long the run is, but the Trainer has neither max_steps nor max_epochs; give it one."
                )
            self._run_steps = int(total)
        return round(fraction * self._run_steps)

    def _codes(self) -> list[Tensor]:
        return [quantize_bits(layer.weight, layer.settings.bits)[0] for _, layer in bit_layers(self._model)]


@torch.no_grad()
def _shares(before: list[Tensor], after: list[Tensor]) -> dict[str, Tensor]:
    """Of all codes, those that have changed and those that are zero now."""
    count = sum(codes.numel() for codes in after)
    flipped, zeros = (
        torch.stack([whole(part.sum()) for part in parts]).sum().float() / count
        for parts in ([a != b for a, b in zip(before, after)], [codes == 0 for codes in after])
    )
    return {"slm/flip_rate": flipped, "slm/zero_fraction": zeros}
