"""Make the model really smaller: remove heads, feed-forward units, channels or layers that matter least."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_slm.calibration import run_model
from lightning_slm.callbacks._calibration import calibration_batches
from lightning_slm.callbacks._hooks import Undo, refuse_flat_weights, when_layers_exist
from lightning_slm.callbacks._structure import (
    RECORD,
    after_a_cut,
    forget_removed,
    refuse_callbacks_that_keep_shapes,
    refuse_what_keeps_shapes,
    restore_structure_first,
    structure_in,
)
from lightning_slm.errors import NoEffectWarning
from lightning_slm.pruning import replay_, shape_of, shrink_
from lightning_slm.pruning.importance import Criterion, Scores, scores_of
from lightning_slm.pruning.structure import Unit
from lightning_slm.pruning.structure_families import network_in
from lightning_slm.pruning.structured import Shape, Target, check_target, kept, on_the_way, target_shape


class StructuredPruning(Callback):
    """Score the units of the model on training data, remove the least important ones, and train what is left.

    What comes out is a plain model of the same family: checkpoints resume here with the right shapes, and
    ``save_pretrained`` writes what ``from_pretrained`` loads without us. In a list of callbacks this one comes first.

    Args:
        unit: what may go: "head", "kv_group", "ffn", "hidden", "layer", or several. Of no account with a ``shape``.
        criterion: by what units are judged, by name; see `lightning_slm.pruning.scores_of`.
        ratio: share of the units to remove, of each kind. With no target at all, 0.25.
        parameters: or: how many parameters may stay.
        flops: or: how many operations the forward pass of a token may take.
        shape: or: exactly what stays, such as {"ffn": 512, "layers": 10}.
        context: tokens that a token attends to, for ``flops``.
        begin: when to cut first, as a fraction of the run's optimizer steps.
        end: when to cut last. Equal to ``begin``: all at once.
        cuts: how many times, from ``begin`` to ``end``; each scores anew what is left.
        calibration: how many batches of training data, drawn with ``seed``, each rank scores on; or the batches.
        seed: of the calibration data and of "random".
    """

    _record: list[list[Any]]  # [optimizer step, entry of `shrink_`]
    _steps: list[int]  # of all cuts, once known
    _done: int
    _from: Shape  # the sizes that change, before the first cut and after the last
    _to: Shape
    _before: list[nn.Parameter]

    def __init__(
        self,
        unit: Unit | list[Unit] = "ffn",
        criterion: Criterion = "activation",
        ratio: float | None = None,
        parameters: int | None = None,
        flops: float | None = None,
        shape: dict[str, int] | None = None,
        context: int = 1024,
        begin: float = 0.0,
        end: float = 0.0,
        cuts: int = 4,
        calibration: int | Iterable[Any] = 32,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= begin <= end < 1.0:
            raise ValueError(f"begin={begin}, end={end} are fractions of the run: it must be 0 <= begin <= end < 1.")
        if cuts < 1 or (isinstance(calibration, int) and calibration < 1):
            raise ValueError(f"cuts={cuts} and calibration={calibration} must be at least 1.")
        self.unit, self.criterion, self.ratio, self.parameters, self.flops = unit, criterion, ratio, parameters, flops
        self.shape, self.context, self.begin, self.end, self.cuts = shape, context, begin, end, cuts
        self.calibration, self.seed = calibration, seed
        none = all(target is None for target in (ratio, parameters, flops, shape))
        self.target = Target(0.25 if none else ratio, parameters, flops, shape, context)
        self.target.units(unit)
        self._undo: list[Undo] = []
        self._begin_anew()

    # What to override.

    def scores(self, pl_module: Any, batches: Sequence[Any], run: Callable[[Any], Any]) -> Scores:
        """What each unit is worth; ``run`` runs the network on a batch. Another loss goes here."""
        units = self.target.units(self.unit)
        return scores_of(pl_module, batches, self.criterion, units, run=run, seed=self.seed)

    @staticmethod
    def load_(module: nn.Module, checkpoint: str | Path) -> dict[str, Any]:
        """Cut a module as it was cut in the run that wrote a checkpoint, and give it the weights of that.

        For modules that build the large model themselves, so that their ``load_from_checkpoint`` finds other shapes.

        Returns: the checkpoint.
        """
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        replay_(module, structure_in(stored))
        module.load_state_dict(stored["state_dict"])
        return stored

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be ready for a checkpoint of a model that was cut; refuse what would not survive a cut."""
        self._undo.append(restore_structure_first(pl_module))
        if stage != "fit":
            return
        refuse_flat_weights(self, trainer)
        self._begin_anew()
        self._before = list(pl_module.parameters())
        self._undo.append(when_layers_exist(pl_module, lambda: self._check(trainer, pl_module)))
        _go_first(self, trainer.callbacks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """An optimizer that was made before the checkpoint's structure came holds parameters that are gone."""
        forget_removed(self._before, pl_module, trainer.optimizers)
        self._before = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights, structure and our state are restored now; other callbacks, but for reports, look after us."""
        if not self._steps:
            self._steps = self._schedule(trainer.estimated_stepping_batches)
        refuse_callbacks_that_keep_shapes(self, trainer, masks=self._steps[-1] > trainer.global_step)
        self._cut_if_due(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Cut on when it is time."""
        self._cut_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log how many parameters the network has."""
        count = sum(p.numel() for p in network_in(pl_module).module.parameters())
        pl_module.log("slm/parameters", float(count), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the run ended before we were done."""
        if self._done < len(self._steps):
            warnings.warn(
                f"StructuredPruning made {self._done} of {len(self._steps)} cuts: the next is due at step "
                f"{self._steps[self._done]} (begin={self.begin}, end={self.end}), and the run ended after "
                f"{trainer.global_step} steps. Resume it, or choose smaller fractions.",
                UserWarning if self._done else NoEffectWarning,
                stacklevel=2,
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our hooks off again."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    # State: plain values.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("unit", "criterion", "ratio", "parameters", "flops", "shape", "begin", "end", "cuts")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """What was cut, the steps of all cuts, how many of them are made, and from where to where they lead."""
        if not self._steps:
            return {}
        return {RECORD: self._record, "steps": self._steps, "done": self._done, "from": self._from, "to": self._to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run cuts where it was to be cut, even if it is now a longer run."""
        self._record, self._steps, self._done = state_dict[RECORD], state_dict["steps"], state_dict["done"]
        self._from, self._to = state_dict["from"], state_dict["to"]

    # How.

    def _begin_anew(self) -> None:
        self._record, self._steps, self._done = [], [], 0
        self._from, self._to, self._before = {}, {}, []

    def _check(self, trainer: Any, pl_module: Any) -> None:
        refuse_what_keeps_shapes(self, trainer, pl_module)
        if not _resumes(trainer):
            check_target(pl_module, self.target, self.unit, self.criterion)

    def _schedule(self, total: float) -> list[int]:
        if self.end and not math.isfinite(total):
            raise ValueError(
                f"StructuredPruning(begin={self.begin}, end={self.end}) needs to know how long the run is, but the "
                "Trainer has neither max_steps nor max_epochs; give it one (max_time may stand beside it)."
            )
        if self.begin == self.end:
            return [round(self.end * total) if self.end else 0]
        width = (self.end - self.begin) / max(1, self.cuts - 1)
        places = [self.begin + i * width for i in range(self.cuts - 1)] + [self.end]
        return [round(place * total) for place in places]

    def _cut_if_due(self, trainer: Any, pl_module: Any) -> None:
        due = sum(step <= trainer.global_step for step in self._steps)
        if due > self._done:
            if not self._done:
                _let_others_look(trainer, pl_module)
            self._cut(trainer, pl_module, due)
            self._done = due

    def _cut(self, trainer: Any, pl_module: Any, due: int) -> None:
        network = network_in(pl_module).module

        def run(batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return run_model(network, batch)

        scores = self.scores(pl_module, calibration_batches(trainer, pl_module, self.calibration, self.seed), run)
        if not self._to:
            self._to = target_shape(pl_module, scores, self.target)
            self._from = {size: shape_of(pl_module)[size] for size in self._to}
        shape = on_the_way(pl_module, scores, self._from, self._to, due, len(self._steps))
        now = shape_of(pl_module)
        if any(now[size] != count for size, count in shape.items()):
            entries = shrink_(pl_module, kept(pl_module, scores, shape), trainer.optimizers)
            self._record += [[trainer.global_step, entry] for entry in entries]
            after_a_cut(trainer, pl_module)


def _resumes(trainer: Any) -> bool:
    return trainer.ckpt_path is not None


def _go_first(callback: Any, callbacks: list[Any]) -> None:
    """To the front of the list, behind others of its kind: who looks at the weights then sees those that stay.

    Lightning is walking through the list; who stands behind us stays where it was.
    """
    at, place = callbacks.index(callback), 0
    while place < at and isinstance(callbacks[place], StructuredPruning):
        place += 1
    callbacks.insert(place, callbacks.pop(at))


def _let_others_look(trainer: Any, pl_module: Any) -> None:
    """At the model as it came: a report measures it."""
    for callback in trainer.callbacks:
        look = getattr(callback, "before_first_cut", None)
        if callable(look):
            look(trainer, pl_module)
