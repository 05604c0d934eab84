"""Learn which part of a model to keep, for an exact shape (Xia et al. 2024, https://arxiv.org/abs/2310.06694)."""

from typing import Any

from lightning_slm.callbacks._learned_masks import LearnedMasksCallback
from lightning_slm.pruning.sheared import LearnedMasks, ShearedMasks, check_shape


class ShearedPruning(LearnedMasksCallback):
    """Learn masks on layers, heads, feed-forward units and channels of the residual stream while the model trains, cut
    it to exactly ``shape``, and train what is left for the rest of the run.

    The masked model computes what the smaller one will compute, so that the cut changes little. What comes out is a
    plain model: its checkpoints resume here with the right shapes, and `save_pretrained` writes it.

    Args:
        shape: what shall be left: of "layers", "heads" (query heads; with grouped-query attention a multiple of the
            key-value heads) or "kv_heads" (with their query heads), "ffn", "hidden". What is not named stays.
        end: when to cut, as a fraction of the run's optimizer steps.
        lr: Adam's learning rate for the gates.
        multiplier_lr: the same for the multipliers of the constraints.
        warmup: the constraints move from the model's shape to the target's over this share of the steps before ``end``.
        seed: of the gates' random numbers.
    """

    price_name = "slm/lagrangian"

    def __init__(
        self,
        shape: dict[str, int],
        end: float = 0.4,
        lr: float = 1.0,
        multiplier_lr: float = 1.0,
        warmup: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(end)
        if not shape:
            raise ValueError("shape={} names nothing; give, for example, {'ffn': 1024, 'layers': 12}.")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup={warmup} is a fraction of the steps before end: it must be 0 <= warmup <= 1.")
        if lr <= 0 or multiplier_lr <= 0 or seed < 0:
            raise ValueError(f"lr={lr} and multiplier_lr={multiplier_lr} must be above 0, and seed={seed} not below.")
        self.shape, self.lr, self.multiplier_lr, self.warmup, self.seed = shape, lr, multiplier_lr, warmup, seed

    def check(self, pl_module: Any) -> None:
        """Whether the model can have this shape."""
        check_shape(pl_module, self.shape)

    def make_masks(self, pl_module: Any) -> LearnedMasks:
        """One gate for each unit that may go."""
        settings = (self.lr, self.multiplier_lr, self.warmup, self.seed)
        return ShearedMasks(pl_module, self.shape, *settings, pl_module.device)

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("shape", "end", "lr", "multiplier_lr", "warmup", "seed")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})
