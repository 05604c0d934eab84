"""Prune a little at a time while training (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878)."""

import math
import warnings
from typing import Any, Literal, get_args

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_slm.callbacks._held import all_that_forgets
from lightning_slm.callbacks._hooks import Undo, refuse_flat_weights, say_what_is_left_alone, when_layers_exist
from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import Patterns, Target, weight_targets
from lightning_slm.pruning import HeldMasks, check_targets, cubic_sparsity
from lightning_slm.pruning.criteria import Magnitude, criterion_named
from lightning_slm.pruning.masks import Budget


class GradualPruning(Callback):
    """Raise the share of zero weights from nothing to ``sparsity`` while the model trains, and hold it from then on.

    The masks are in the weights: what is zero stays zero, so a checkpoint needs no mask and loads without us. Criteria
    that look at gradients or inputs look at every optimizer step, from the first one on.

    Args:
        sparsity: share of zeros at the end, between 0 and 1.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        begin: when to begin, as a fraction of the run's optimizer steps.
        end: when ``sparsity`` is reached, as a fraction of the run; the rest of the run heals. Equal to ``begin``:
            prune at once.
        every: optimizer steps between two looks at the weights.
        criterion: what a weight is worth. "magnitude": its size; "movement": how far it moved away from zero;
            "taylor": what its loss would cost, by its gradient; "wanda": its size times the norm of its input. For
            another one override `scores`.
        budget: "row" prunes the same share of each row, "layer" of each layer; "global" the lowest scores wherever they
            are. None: as published, "row" for "wanda" and "layer" for the others.
        targets: name patterns of what to prune.
        skip: name patterns of what to leave out again.
    """

    _masks: HeldMasks
    _criterion: Magnitude
    _ramp: tuple[int, int] | None  # first and last optimizer step, once known
    _sparsity_now: float
    _kept_zeros: dict[str, Tensor]  # as restored
    _seen: dict[str, Any]  # by the criterion, as restored

    def __init__(
        self,
        sparsity: float = 0.5,
        group: int | None = None,
        begin: float = 0.0,
        end: float = 0.6,
        every: int = 10,
        criterion: Literal["magnitude", "movement", "taylor", "wanda"] = "magnitude",
        budget: Budget | None = None,
        targets: Patterns = "*",
        skip: Patterns = (),
    ) -> None:
        if not 0.0 <= begin <= end <= 1.0:
            raise ValueError(f"begin={begin}, end={end} are fractions of the run: they must be 0 <= begin <= end <= 1.")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 optimizer step.")
        if budget not in (None, *get_args(Budget)):
            raise ValueError(f"budget={budget!r} must be 'row', 'layer', 'global' or None.")
        criterion_named(criterion)
        self.sparsity, self.group, self.begin, self.end, self.every = sparsity, group, begin, end, every
        self.criterion, self.budget, self.targets, self.skip = criterion, budget, targets, skip
        self._undo: list[Undo] = []
        self._begin_anew()

    # What to override.

    def scores(self, target: Target) -> Tensor:
        """What each weight of a target is worth, in the weight's own layout; the lowest go first."""
        return self._criterion.scores(target)

    def should_prune(self, step: int) -> bool:
        """Whether more weights go after ``step`` optimizer steps."""
        return self._last_due(step) == step

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be pruned before anything else happens."""
        if stage == "fit":
            refuse_flat_weights(self, trainer)
            self._begin_anew()
            self._undo.append(when_layers_exist(pl_module, lambda: self._choose(pl_module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights, optimizer and our state are restored now, under any strategy: find the masks in the weights."""
        self._choose(pl_module)  # again: another callback may have swapped the layers
        say_what_is_left_alone(self, pl_module)
        self._undo.append(self._criterion.watch())
        if self._seen:
            self._criterion.load_state_dict(self._seen)
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)).remove)
        if self._ramp is None:
            self._ramp = self._steps(trainer.estimated_stepping_batches)
        elif self._sparsity_now:
            self._masks.find(self._kept_zeros)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Catch up with a schedule that began without us: at step 0, or in a checkpoint without our state.

        Not in `on_train_start`, where other callbacks still look at the model as it came; and not before a criterion
        has seen the steps of one look.
        """
        wait = bool(self._masks) or not self._criterion.is_ready(self.every)
        due = None if wait else self._last_due(trainer.global_step)
        if due is not None:
            self._prune(due, trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A pruned weight has no gradient: none in the clipped norm, in a momentum, in a Muon update of the others.

        The criterion sees it as it is before clipping.
        """
        self._criterion.see()
        self._masks.apply_(t.weight.grad for t in self._masks.targets)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the share of zeros."""
        alone = sum(isinstance(c, GradualPruning) for c in trainer.callbacks) == 1
        name = "slm/sparsity" if alone else f"slm/sparsity/{self.targets}"
        pl_module.log(name, self._sparsity_now, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the run ended before we were done."""
        begin, end = self._ramp or (0, 0)
        if trainer.global_step < end or not self._masks:
            warnings.warn(
                f"GradualPruning reached a sparsity of {self._sparsity_now:.3f} of {self.sparsity}: it runs from step "
                f"{begin} to {end} (begin={self.begin}, end={self.end}), and the run ended after {trainer.global_step} "
                "steps. Resume it, or choose smaller fractions.",
                UserWarning if self._masks else NoEffectWarning,
                stacklevel=2,
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our hooks off again."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    # State: plain numbers. The masks are in the weights.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("sparsity", "group", "begin", "end", "criterion", "budget", "targets", "skip")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """The ramp in steps, the sparsity reached, which zeros are no pruned weights (mostly none), and what the
        criterion has seen.
        """
        if self._ramp is None:
            return {}
        state = {"ramp": list(self._ramp), "sparsity": self._sparsity_now, "kept_zeros": self._masks.kept_zeros()}
        return {**state, "seen": self._criterion.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run keeps the ramp it started with, even if it is now a longer run."""
        begin, end = state_dict["ramp"]
        self._ramp, self._kept_zeros = (begin, end), state_dict["kept_zeros"]
        self._sparsity_now, self._seen = state_dict["sparsity"], state_dict["seen"]

    # How.

    def _begin_anew(self) -> None:
        self._masks, self._ramp, self._sparsity_now, self._kept_zeros = HeldMasks([]), None, 0.0, {}
        self._criterion, self._seen = Magnitude([]), {}

    def _choose(self, pl_module: Any) -> None:
        targets = weight_targets(pl_module, self.targets, self.skip)
        check_targets(targets, self.sparsity, self.group)
        self._masks, self._criterion = HeldMasks(targets), criterion_named(self.criterion)(targets)

    def _steps(self, total: float) -> tuple[int, int]:
        if not math.isfinite(total):
            raise ValueError(
                f"GradualPruning(begin={self.begin}, end={self.end}) needs to know how long the run is, but the "
                "Trainer has neither max_steps nor max_epochs; give it one (max_time may stand beside it)."
            )
        return round(self.begin * total), round(self.end * total)

    def _last_due(self, step: int) -> int | None:
        """The last step up to ``step`` at which weights go: each ``every`` steps of the ramp, and its end."""
        begin, end = self._ramp or (0, 0)
        looks = (step - begin) // self.every
        return end if step >= end else begin + looks * self.every if looks > 0 else None

    def _after_step(self, trainer: Any) -> None:
        step = trainer.global_step + 1  # Lightning counts a step after the optimizer's hooks
        if self.should_prune(step):
            self._prune(step, trainer)
        else:
            self._masks.apply_(t.weight for t in self._masks.targets)

    def _prune(self, step: int, trainer: Any) -> None:
        begin, end = self._ramp or (0, 0)
        ramp = cubic_sparsity((step - begin) / (end - begin) if end > begin else 1.0, final=1.0)
        scores = [self.scores(t) for t in self._masks.targets]
        budget = self.budget or self._criterion.budget
        self._sparsity_now = self._masks.grow(scores, self.sparsity, group=self.group, budget=budget, ramp=ramp)
        self._criterion.forget()
        for tensors in all_that_forgets(trainer, self._masks):
            self._masks.apply_(tensors)
