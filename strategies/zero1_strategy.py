"""DDP whose optimizer states are shared out (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054)."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_slm.nn.split_steps import SplitSteps


class ZeRO1Strategy(DDPStrategy):
    """ZeRO stage 1: every process has the whole model and whole gradients, and 1/N of the optimizer's states.

    ``Trainer(strategy="slm_zero1")``. Learns what DDP learns, to the last bit. Checkpoints are those of one process.
    Weights and gradients in shards, too: ``strategy="slm_fsdp2"``.

    Args:
        options: of Lightning's ``DDPStrategy``.
    """

    strategy_name = "slm_zero1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._split: dict[int, SplitSteps] = {}

    def setup_optimizers(self, trainer: Any) -> None:
        """Share out the optimizers that the module makes."""
        super().setup_optimizers(trainer)
        self._split = {id(optimizer): SplitSteps(optimizer) for optimizer in self.optimizers}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The states of all processes, on the first."""
        return self._split[id(getattr(optimizer, "_optimizer", optimizer))].state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of any strategy that saves one file."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            self._split[id(optimizer)].load_state_dict(state)
