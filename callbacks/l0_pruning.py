"""Learn which heads a model needs, at a price for each (Voita et al. 2019, https://arxiv.org/abs/1905.09418)."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_slm.callbacks._learned_masks import LearnedMasksCallback
from lightning_slm.pruning import structure_of
from lightning_slm.pruning.sheared import LearnedMasks, PricedMasks

Unit = Literal["head", "kv_group", "ffn", "hidden", "layer"]


class L0Pruning(LearnedMasksCallback):
    """Let every head cost ``strength`` while the model trains, and remove those that are not worth it.

    The layers may want different numbers of heads, and a configuration has one for all: as many stay in each as in the
    layer that wants most. What was shut and stays begins at zero, and may learn again.

    Args:
        unit: what has a price; several make a list.
        strength: of the price, in units of the loss (nats), for an expected open gate.
        end: when to cut, as a fraction of the run's optimizer steps.
        lr: Adam's learning rate for the gates.
        seed: of the gates' random numbers.
    """

    def __init__(
        self,
        unit: Unit | Sequence[Unit] = "head",
        strength: float = 0.01,
        end: float = 0.6,
        lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(end)
        if strength < 0 or lr <= 0 or seed < 0:
            raise ValueError(f"strength={strength} and seed={seed} must not be below 0, and lr={lr} must be above 0.")
        self.unit, self.strength, self.lr, self.seed = unit, strength, lr, seed

    def check(self, pl_module: Any) -> None:
        """Whether the model has such units."""
        structure_of(pl_module, self.unit)

    def make_masks(self, pl_module: Any) -> LearnedMasks:
        """One gate for each unit."""
        return PricedMasks(pl_module, self.unit, self.strength, self.lr, self.seed, pl_module.device)

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("unit", "strength", "end", "lr", "seed")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})
