"""When one-shot pruning happens, whatever solves it."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_slm.callbacks._calibration import calibration_batches, forward
from lightning_slm.callbacks._held import all_that_forgets, more_than_asked, zeros_in
from lightning_slm.callbacks._hooks import (
    Undo,
    refuse_flat_weights,
    say_what_is_left_alone,
    when_layers_exist,
    wrap_method,
)
from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import Patterns, weight_targets
from lightning_slm.pruning import HeldMasks, owl_sparsities
from lightning_slm.pruning.one_shot import Pruned, shares_of, zeros_of

When = Literal["start", "end"]
Allocation = Literal["uniform", "owl"]


class OneShotPruning(Callback):
    """Prune once, on calibration data, and hold the zeros in all training that follows.

    Under ``trainer.validate`` and ``trainer.test`` a model that is not pruned yet is pruned before it is evaluated.

    Args:
        sparsity: share of zeros, between 0 and 1; or shares by name pattern, of which the first that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        when: "start" of the training, which then recovers with the zeros held; or its "end", after which the model is
            to be saved: checkpoints of the run itself are dense.
        calibration: how many batches of training data, drawn with ``seed``, each rank calibrates on; or the batches.
        seed: of the calibration data, and of nothing else.
        targets: name patterns of what to prune.
        skip: name patterns of what to leave out again.
        allocation: "uniform": ``sparsity`` in every block; "owl": less in blocks with many outliers, see
            `owl_sparsities`.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        group: int | None = None,
        when: When = "start",
        calibration: int | Iterable[Any] = 32,
        seed: int = 0,
        targets: Patterns = "*",
        skip: Patterns = (),
        allocation: Allocation = "uniform",
    ) -> None:
        if when not in ("start", "end"):
            raise ValueError(f"when={when!r} must be 'start' or 'end' of the training.")
        if isinstance(calibration, int) and calibration < 1:
            raise ValueError(f"calibration={calibration} must be at least 1 batch.")
        if allocation not in ("uniform", "owl"):
            raise ValueError(f"allocation={allocation!r} must be 'uniform' or 'owl'.")
        if allocation == "owl" and (group is not None or isinstance(sparsity, Mapping)):
            raise ValueError("allocation='owl' settles the blocks' shares: it takes one sparsity, and no group.")
        self.sparsity, self.group, self.when, self.calibration, self.seed = sparsity, group, when, calibration, seed
        self.targets, self.skip, self.allocation = targets, skip, allocation
        self._undo: list[Undo] = []
        self._begin_anew()

    # What a technique says.

    def calibration_data(self, trainer: Any, pl_module: Any) -> list[Any]:
        """The batches of this rank."""
        return calibration_batches(trainer, pl_module, self.calibration, self.seed)

    def prune(self, pl_module: Any, batches: list[Any], run: Callable[[Any], Any], progress: bool) -> dict[str, Pruned]:
        """Prune in place; ``run`` runs the network on a batch."""
        raise NotImplementedError

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be pruned before anything else happens."""
        refuse_flat_weights(self, trainer)
        self._begin_anew()
        self._undo.append(when_layers_exist(pl_module, lambda: self._check(pl_module)))
        if stage == "fit" and self.when == "end":  # after all callbacks: one may put an average into the model
            self._undo.append(wrap_method(pl_module, "on_train_end", self._then_prune(trainer, pl_module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights and our state are restored now: hold the zeros of a run that is resumed."""
        say_what_is_left_alone(self, pl_module)
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_post_hook(lambda *_: self._hold()).remove)
        if self.when == "end":
            self._pruned = False  # a model that was pruned and trains on is dense again
        elif self._pruned:
            self._masks = HeldMasks(weight_targets(pl_module, self.targets, self.skip))
            self._masks.find(self._kept_zeros)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Prune, unless the run that is resumed has.

        Not in `on_train_start`, where other callbacks still look at the model as it came.
        """
        self._all_prune(trainer, pl_module, lambda c: c.when == "start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same: this is the first hook of a run that is resumed within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A pruned weight has no gradient: none in the clipped norm, in a momentum, in a Muon update of the others."""
        self._masks.apply_(t.weight.grad for t in self._masks.targets)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the share of zeros."""
        suffix = "" if sum(hasattr(c, "sparsity") for c in trainer.callbacks) == 1 else f"/{self.targets}"
        pl_module.log(f"slm/sparsity{suffix}", self._share, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Prune a model that is only evaluated, if it is dense."""
        if trainer.state.fn in ("validate", "test"):
            self._all_prune(trainer, pl_module, lambda c: not c._is_pruned(pl_module))

    on_test_start = on_validation_start

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our hooks off again."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    # State: plain values. The masks are in the weights.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("sparsity", "group", "when", "targets", "skip")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """That the model is pruned, how much, and which zeros are no pruned weights (mostly none)."""
        return {"sparsity": self._share, "kept_zeros": self._masks.kept_zeros()} if self._pruned else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pruned, self._share = True, state_dict["sparsity"]
        self._kept_zeros = state_dict["kept_zeros"]

    # How.

    def _begin_anew(self) -> None:
        self.results: dict[str, Pruned] = {}  # by weight, once pruned
        self._pruned, self._share = False, 0.0
        self._masks, self._kept_zeros = HeldMasks([]), dict[str, Tensor]()

    def _check(self, pl_module: Any) -> None:
        shares_of(weight_targets(pl_module, self.targets, self.skip), self.sparsity, self.group)

    def _is_pruned(self, pl_module: Any) -> bool:
        """Whether there are as many zeros as are asked for, less those that rounding to whole weights may take."""
        targets = weight_targets(pl_module, self.targets, self.skip)
        shares = shares_of(targets, self.sparsity, self.group)
        asked = sum(shares[t.name] * t.weight.numel() - t.weight.shape[1 - t.input_dim] for t in targets)
        return sum(zeros_of(t) * t.weight.numel() for t in targets) >= asked

    def _hold(self) -> None:
        self._masks.apply_(t.weight for t in self._masks.targets)

    def _then_prune(self, trainer: Any, pl_module: Any) -> Callable[..., None]:
        def around(original: Callable[[], None]) -> None:
            original()
            self._all_prune(trainer, pl_module, lambda c: c.when == "end")

        return around

    def _all_prune(self, trainer: Any, pl_module: Any, due: Callable[["OneShotPruning"], bool]) -> None:
        """All of our kind that are due, the sparsest last: so the order of the list does not matter."""
        ours = [c for c in trainer.callbacks if isinstance(c, OneShotPruning) and not c._pruned]
        for each in sorted(ours, key=lambda c: (c._most(), c.state_key)):
            if due(each):
                each._prune(trainer, pl_module)

    def _most(self) -> float:
        return max(self.sparsity.values()) if isinstance(self.sparsity, Mapping) else self.sparsity

    def _prune(self, trainer: Any, pl_module: Any) -> None:
        targets = weight_targets(pl_module, self.targets, self.skip)
        sizes, before = {t.name: t.weight.numel() for t in targets}, zeros_in(targets)
        with isolate_rng():
            self.results = self._solved(trainer, pl_module)
        shares = shares_of(targets, self.sparsity, self.group)
        kept = {} if self._is_uneven() else more_than_asked(targets, before, shares, self.group)
        self._pruned, self._masks = True, HeldMasks(targets)
        self._masks.find(kept)
        for tensors in all_that_forgets(trainer, self._masks):
            self._masks.apply_(tensors)
        zeros = sum(result.sparsity * sizes[name] for name, result in self.results.items())
        self._share = (zeros - _count(kept)) / sum(sizes.values())
        self._say_what_happened(zeros, _count(before), sum(sizes[name] * share for name, share in shares.items()))

    def _solved(self, trainer: Any, pl_module: Any) -> dict[str, Pruned]:
        batches = self.calibration_data(trainer, pl_module)
        run = lambda batch: forward(trainer, pl_module, batch)  # noqa: E731 (one expression, passed on)
        progress = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with_shares = copy(self)
        if self.allocation == "owl":
            assert isinstance(self.sparsity, float)
            way: dict[str, Any] = {"targets": self.targets, "skip": self.skip, "run": run, "progress": progress}
            with_shares.sparsity = owl_sparsities(pl_module, batches, self.sparsity, **way)
        return with_shares.prune(pl_module, batches, run, progress)

    def _is_uneven(self) -> bool:
        """Whether the layers' shares are settled by what is found in them."""
        return self.allocation == "owl" or getattr(self, "budget", None) == "global"

    def _say_what_happened(self, zeros: float, before: int, asked: float) -> None:
        unseen = [name for name, result in self.results.items() if not result.seen]
        if unseen:
            self._warn(f"{', '.join(map(repr, unseen))}: read without being called, so pruned by magnitude alone.")
        if zeros < before + 0.5 and before > asked * 1.01:
            self._warn(
                f"the model came with {before} zeros in these weights, more than the {asked:.0f} asked for "
                f"(sparsity={self.sparsity}): nothing was pruned, and those beyond may learn again.",
                NoEffectWarning,
            )

    def _warn(self, text: str, kind: type[UserWarning] = UserWarning) -> None:
        warnings.warn(f"{type(self).__name__}: {text}", kind, stacklevel=2)


def _count(positions: Mapping[str, Tensor]) -> int:
    return sum(len(p) for p in positions.values())
