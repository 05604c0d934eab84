"""Train N:M sparse networks from scratch: SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010)."""

import math
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_slm.callbacks._hooks import (
    Undo,
    refuse_flat_weights,
    say_what_is_left_alone,
    when_layers_exist,
    wrap_method,
)
from lightning_slm.nn.targets import Patterns, weight_targets
from lightning_slm.pruning.nm_training import NMWeights

STAGES = ("train", "validation", "test", "predict")


class NMSparseTraining(Callback):
    """Compute with the largest N of every M weights from the first step on, and train all of them.

    Every forward pass, in training, validation, test and prediction, has exactly N:M weights. In between, and in
    checkpoints of a run that goes on, the weights are dense, as a resumed run needs them; after the last step they are
    N:M for good.

    Args:
        sparsity: share of zeros.
        group: consecutive inputs of which ``sparsity * group`` are zero (2:4 is ``sparsity=0.5, group=4``).
        decay: how strongly weights that do not compute are pulled towards zero, as a part of their gradient; 0: not at
            all, the plain straight-through estimator.
        warmup: fraction of the run over which the decay rises from 0, linearly; 0: it is constant.
        flips_every: optimizer steps between two looks at how many masks a step has changed (``slm/mask_flips``).
        targets: name patterns of what to train sparsely.
        skip: name patterns of what to leave out again.
    """

    _weights: NMWeights | None
    _warmup_steps: int | None  # once known

    def __init__(
        self,
        sparsity: float = 0.5,
        group: int = 4,
        decay: float = 2e-4,
        warmup: float = 0.0,
        flips_every: int = 10,
        targets: Patterns = "*",
        skip: Patterns = (),
    ) -> None:
        if decay < 0:
            raise ValueError(f"decay={decay} must be 0 or positive: it pulls weights towards zero.")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup={warmup} is a fraction of the run: it must be between 0 and 1.")
        if flips_every < 1:
            raise ValueError(f"flips_every={flips_every} must be at least 1 optimizer step.")
        self.sparsity, self.group, self.decay, self.warmup = sparsity, group, decay, warmup
        self.flips_every, self.targets, self.skip = flips_every, targets, skip
        self._undo: list[Undo] = []
        self._weights, self._warmup_steps, self._last_look, self._watches_end = None, None, 0, False

    # What to override.

    def decay_at(self, step: int) -> float:
        """The decay after ``step`` optimizer steps."""
        return self.decay * min(1.0, step / self._warmup_steps) if self._warmup_steps else self.decay

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand around the batches of every stage; refuse what cannot be N:M before anything else happens."""
        self._release()
        refuse_flat_weights(self, trainer)
        if stage == "fit":
            self._warmup_steps = None
            _refuse_manual(pl_module)
        self._undo.append(when_layers_exist(pl_module, lambda: self._choose(pl_module)))
        for name in STAGES:
            self._undo.append(wrap_method(pl_module, f"on_{name}_batch_start", self._then_hide(trainer, pl_module)))
        self._undo.append(wrap_method(pl_module, "on_before_optimizer_step", self._decay_first(trainer)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights and our state are restored: find the layers again, which another callback may have swapped."""
        self._choose(pl_module)
        say_what_is_left_alone(self, pl_module)
        self._last_look = trainer.global_step
        if self._warmup_steps is None:
            self._warmup_steps = _steps(trainer, self.warmup)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Gradients are there: the step, averages and checkpoints are those of dense weights."""
        self._show()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the share of zeros and, now and then, that of the masks which this step has changed."""
        self._show()  # for a step that was skipped
        assert self._weights is not None
        suffix = "" if sum(hasattr(c, "sparsity") for c in trainer.callbacks) == 1 else f"/{self.targets}"
        pl_module.log(f"slm/sparsity{suffix}", self.sparsity, on_step=True, on_epoch=False)
        step = trainer.global_step
        if step > self._last_look and step % self.flips_every == 0:
            pl_module.log(f"slm/mask_flips{suffix}", self._weights.flips(), on_step=True, on_epoch=False)
        self._last_look = step

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Dense again: what was validated may be a moving average that goes on."""
        self._show()

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Likewise."""
        self._show()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Likewise."""
        self._show()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """N:M for good, if the run ended early; and the moving averages that other callbacks keep of the weights."""
        kept = (value for callback in trainer.callbacks for value in vars(callback).values())
        for model in (pl_module, *(k.module for k in kept if isinstance(k, AveragedModel))):
            self._weights_of(model).finish_()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then; dense, so that the run can go on."""
        self._release()

    # State: one number. The masks are in the weights.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("sparsity", "group", "decay", "warmup", "targets", "skip")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps until the decay is whole."""
        return {} if self._warmup_steps is None else {"warmup_steps": self._warmup_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run keeps the decay it started with, even if it is now a longer run."""
        self._warmup_steps = state_dict["warmup_steps"]

    # How.

    def _weights_of(self, model: nn.Module) -> NMWeights:
        return NMWeights(weight_targets(model, self.targets, self.skip), self.sparsity, self.group)

    def _choose(self, pl_module: Any) -> None:
        self._weights = self._weights_of(pl_module)

    def _show(self) -> None:
        if self._weights is not None:
            self._weights.show_()

    def _then_hide(self, trainer: Any, pl_module: Any) -> Any:
        """After all callbacks have seen the start of a batch, and before a strategy gathers weights for its step."""

        def then_hide(original: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            if trainer.training:
                self._watch_for_end(trainer, pl_module)
            if answer != -1:  # which skips the batch
                assert self._weights is not None
                self._weights.hide_()
            return answer

        return then_hide

    def _watch_for_end(self, trainer: Any, pl_module: Any) -> None:
        """N:M for good with the last step, so that checkpoints of it are: after the steps' other hooks."""
        if self._watches_end:
            return
        self._watches_end, total = True, trainer.estimated_stepping_batches

        def finish_with_the_last(*_: Any) -> None:
            if trainer.global_step + 1 >= total:  # Lightning counts a step after the optimizer's hooks
                self._weights_of(pl_module).finish_()

        self._undo += [
            optimizer.register_step_post_hook(finish_with_the_last).remove for optimizer in trainer.optimizers
        ]

    def _decay_first(self, trainer: Any) -> Any:
        """The decay comes after all callbacks have seen the gradient of the loss alone, and before clipping."""

        def decay_first(original: Any, *args: Any, **kwargs: Any) -> Any:
            assert self._weights is not None
            self._weights.show_()  # a skipped batch has no backward pass
            self._weights.decay_(self.decay_at(trainer.global_step))
            return original(*args, **kwargs)

        return decay_first

    def _release(self) -> None:
        self._show()
        self._weights, self._watches_end = None, False
        while self._undo:
            self._undo.pop()()


def _refuse_manual(pl_module: Any) -> None:
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} optimises manually, so only its training step knows when the weights compute "
            "and when they move: use lightning_slm.pruning.NMWeights there, and leave this callback away."
        )


def _steps(trainer: Any, warmup: float) -> int:
    if warmup == 0.0:
        return 0
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError(
            f"NMSparseTraining(warmup={warmup}) is a fraction of a run whose length is not known; give the Trainer "
            "max_steps or max_epochs (max_time may stand beside it), or warmup=0."
        )
    return round(warmup * total)
