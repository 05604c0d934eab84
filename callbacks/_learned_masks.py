"""Masks that are learned beside the weights for a part of a run, and cut the model at the end of it."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import Parameter

from lightning_slm.callbacks._find import network_of
from lightning_slm.callbacks._hooks import Undo, refuse_flat_weights, when_layers_exist
from lightning_slm.callbacks._structure import (
    RECORD,
    after_a_cut,
    forget_removed,
    refuse_callbacks_that_keep_shapes,
    refuse_what_keeps_shapes,
    restore_structure_first,
)
from lightning_slm.errors import NoEffectWarning
from lightning_slm.pruning import gated
from lightning_slm.pruning.sheared import LearnedMasks


class LearnedMasksCallback(Callback):
    """What `ShearedPruning` and `L0Pruning` share; a subclass says which masks.

    A forward pass in training sees one sample of the gates a step, one in evaluation their middle. The gates learn from
    the gradients of the module's own loss, whatever it is made of; their price is added where they make their step.
    """

    _masks: LearnedMasks | None
    _gates: "_GatesNow"
    _before: list[Parameter]  # those of the module as it came
    _view: contextlib.ExitStack | None  # within it the model is seen through the gates
    _last: int | None  # the optimizer step after which the model is cut, once known
    _record: list[list[Any]]
    _seen: dict[str, Any]  # of the masks, as restored

    def __init__(self, end: float) -> None:
        if not 0.0 < end <= 1.0:
            raise ValueError(f"end={end} is a fraction of the run: it must be 0 < end <= 1.")
        self.end = end
        self._undo: list[Undo] = []
        self._begin_anew()

    # What a subclass says.

    def make_masks(self, pl_module: Any) -> LearnedMasks:
        """The masks for a module, with all gates open."""
        raise NotImplementedError

    def check(self, pl_module: Any) -> None:
        """Refuse what cannot be, before anything happens."""

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be ready for a checkpoint of a model that was cut; refuse what would not survive a cut."""
        self._undo.append(restore_structure_first(pl_module))
        if stage != "fit":
            return
        refuse_flat_weights(self, trainer)
        refuse_what_keeps_shapes(self, trainer, pl_module)
        if sum(isinstance(callback, LearnedMasksCallback) for callback in trainer.callbacks) > 1:
            raise ValueError(
                "Two callbacks learn masks from the first step on: name all that shall go in one of them, or give the "
                "second to a second run."
            )
        self._begin_anew()
        self._before = list(pl_module.parameters())
        self._undo.append(when_layers_exist(pl_module, lambda: self.check(pl_module)))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """An optimizer that was made before the checkpoint's structure came holds parameters that are gone."""
        forget_removed(self._before, pl_module, trainer.optimizers)
        self._before = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights, structure and our state are restored now: make the masks, or be done."""
        if self._last is None:
            self._last = self._steps(trainer.estimated_stepping_batches)
        if self._record:
            return
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{type(self).__name__} goes by the steps of one optimizer, not {len(trainer.optimizers)}."
            )
        self._masks = self.make_masks(pl_module)
        if not self._masks.groups:
            self._masks = None
            warnings.warn(f"{type(self).__name__}: nothing shall go, so nothing will.", NoEffectWarning, stacklevel=2)
            return
        if self._seen:
            self._masks.load_state_dict(self._seen)
        hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._after_step(trainer, pl_module))
        self._undo.append(hook.remove)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Look at the model through this step's gates; not before, while other callbacks look at it as it came."""
        if self._masks is None:
            return
        if self._view is None:
            refuse_callbacks_that_keep_shapes(self, trainer)
            self._gates = _GatesNow(self._masks, pl_module)
            self._gates.sample(trainer.global_step)
            self._view = contextlib.ExitStack()
            self._view.enter_context(gated(pl_module, self._gates))
        self._gates.sample(trainer.global_step)

    def on_new_structure(self, pl_module: Any) -> None:
        """Another callback has cut the model."""
        if self._masks is not None:
            raise ValueError(
                f"{type(self).__name__} learns masks for a model that another callback has cut meanwhile: let that cut "
                "at the start of the run, or give it to a second run."
            )

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """With the gradients of the weights go those of the gates."""
        if self._masks is not None:
            self._masks.zero_grad()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log how many units are open in expectation (in a layer, on average), and what is paid; after the cut, how
        many there are, since Lightning would go on to log what it was told last.
        """
        if self._masks is not None:
            counts: dict[str, Any] = self._masks.gates.expected_by_unit()
            price: Any = self._masks.price(self._progress(trainer.global_step)).detach()
        elif self._record:
            counts, price = _units_left(self._record[-1][1]), 0.0
        else:
            return
        for unit, count in counts.items():
            pl_module.log(f"slm/l0/{unit}", count, on_step=True, on_epoch=False)
        pl_module.log(self.price_name, price, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the run ended before the model was cut."""
        if self._masks is not None:
            warnings.warn(
                f"{type(self).__name__} cuts the model after step {self._last} (end={self.end}), and the run ended "
                f"after {trainer.global_step} steps: the model is as large as it was. Resume the run.",
                stacklevel=2,
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our hooks off again."""
        self._close()
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The last step of the masks; what was cut, or the masks as they are now."""
        if self._last is None:
            return {}
        return {"last": self._last, RECORD: self._record, "masks": self._masks.state_dict() if self._masks else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run cuts where it was to be cut, even if it is now a longer run."""
        self._last, self._record, self._seen = state_dict["last"], state_dict[RECORD], state_dict["masks"]

    # How.

    price_name = "slm/l0_price"

    def _begin_anew(self) -> None:
        self._masks, self._last, self._record, self._seen = None, None, [], {}
        self._view = None

    def _steps(self, total: float) -> int:
        if not math.isfinite(total):
            raise ValueError(
                f"{type(self).__name__}(end={self.end}) needs to know how long the run is, but the Trainer has neither "
                "max_steps nor max_epochs; give it one (max_time may stand beside it)."
            )
        return max(1, round(self.end * total))

    def _progress(self, step: int) -> float:
        return min(1.0, step / (self._last or 1))

    def _after_step(self, trainer: Any, pl_module: Any) -> None:
        if self._masks is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        step = trainer.global_step + 1  # Lightning counts a step after the optimizer's hooks
        self._masks.step_(self._progress(step - 1), 1.0 if scaler is None else scaler.get_scale())
        if step >= (self._last or 0):
            self._cut(step, trainer, pl_module)

    def _cut(self, step: int, trainer: Any, pl_module: Any) -> None:
        assert self._masks is not None
        self._close()
        self._record += [[step, entry] for entry in self._masks.cut_(pl_module, trainer.optimizers)]
        self._masks = None
        after_a_cut(trainer, pl_module)

    def _close(self) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None


class _GatesNow(Mapping[str, Tensor]):
    """The gates that a forward pass is to see: in evaluation mode without gradients, those without randomness.

    (A network may train in evaluation mode, as it came from a file, and may be recomputed without gradients.)
    """

    def __init__(self, masks: LearnedMasks, pl_module: Any) -> None:
        self.masks, self.network = masks, network_of(pl_module)

    def sample(self, step: int) -> None:
        """The gates of a step."""
        self.sampled = self.masks.gates.sample(step)

    def __getitem__(self, name: str) -> Tensor:
        training = torch.is_grad_enabled() or self.network.training
        return self.sampled[name] if training else self.masks.gates.middle()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sampled)

    def __len__(self) -> int:
        return len(self.sampled)


def _units_left(cut: dict[str, Any]) -> dict[str, float]:
    """By the kind of unit, after one entry of `shrink_`."""
    return {name.rpartition("/")[2]: float(len(kept)) for name, kept in cut["kept"].items()}
