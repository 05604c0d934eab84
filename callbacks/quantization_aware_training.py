"""Quantisation-aware training (Jacob et al. 2017, https://arxiv.org/abs/1712.05877), with torchao's numbers."""

import math
import warnings
from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_slm.callbacks._hooks import Undo, say_what_is_left_alone, when_layers_exist
from lightning_slm.errors import NoEffectWarning, near
from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization import SCHEMES, enable_fake_quant_, prepare_qat_
from lightning_slm.quantization.qat import EmbeddingBits


class QuantizationAwareTraining(Callback):
    """Train with the rounding that the exported model will have, so that the rounding costs little.

    The layers compute with rounded weights; checkpoints hold the full-precision weights behind them, under their own
    names, and load without us. After the run the model stays prepared: ``lightning_slm.export.save_hf_folder`` packs
    it, ``lightning_slm.quantization.convert_qat_`` makes torchao's tensors of it.

    Args:
        scheme: bits of the weights, and whether inputs are rounded to 8 bits too: "int8_act_int4_weight",
            "int8_act_int8_weight", "int8_weight", "int4_weight" or "int2_weight".
        group: consecutive inputs that share one scale; must divide the rows.
        begin: when the rounding starts, as a fraction of the run's optimizer steps. Validation, too, is in full
            precision before; validate, test and predict outside of a run are rounded.
        targets: name patterns of the linear layers to quantise.
        skip: name patterns of what to leave out again, embeddings and head included.
        embedding: bits of the embeddings and the output head, "int8" or "int4"; None leaves them as they are.
    """

    def __init__(
        self,
        scheme: str = "int8_act_int4_weight",
        group: int = 32,
        begin: float = 0.0,
        targets: Patterns = "*",
        skip: Patterns = (),
        embedding: EmbeddingBits | None = "int8",
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is unknown. {near(scheme, SCHEMES)}")
        if not 0.0 <= begin <= 1.0:
            raise ValueError(f"begin={begin} is a fraction of the run: it must be between 0 and 1.")
        self.scheme, self.group, self.begin = scheme, group, begin
        self.targets, self.skip, self.embedding = targets, skip, embedding
        self._begin_step: int | None = None
        self._layers: list[str] = []
        self._on = False
        self._undo: Undo | None = None

    # What to override.

    def should_round(self, step: int) -> bool:
        """Whether the network feels the rounding after ``step`` optimizer steps."""
        assert self._begin_step is not None
        return step >= self._begin_step

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Exchange the layers' classes: before the optimizers, in every stage, parameters and keys as they were."""
        self._undo = when_layers_exist(pl_module, lambda: self._prepare(pl_module))
        if stage == "fit":
            self._begin_step = None

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model as its first step will find it."""
        self._switch(pl_module, self.begin == 0.0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Weights and our state are restored: find the first step with rounding, and whether it lies behind us."""
        say_what_is_left_alone(self, pl_module)
        if self._begin_step is None:
            self._begin_step = _step(trainer, self.begin)
        self._switch(pl_module, self.should_round(trainer.global_step))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Start to round when it is time."""
        if not self._on and self.should_round(trainer.global_step):
            self._switch(pl_module, True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the run ended before we were done."""
        if not self._on:
            warnings.warn(
                f"QuantizationAwareTraining rounded nothing: the run ended after {trainer.global_step} steps, and "
                f"begin={self.begin} is step {self._begin_step}; train longer, or begin earlier.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_new_structure(self, pl_module: Any) -> None:
        """The model has become smaller: find the layers again, and whether their rows still go into groups."""
        on = self._on
        self._prepare(pl_module)
        self._switch(pl_module, on)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the model prepared and rounding: as it will be exported."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._switch(pl_module, True)

    # State: one number. The rest is in the weights.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        names = ("scheme", "group", "begin", "targets", "skip", "embedding")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """The first optimizer step with rounding. (And by its key a checkpoint tells how it was rounded.)"""
        return {} if self._begin_step is None else {"begin_step": self._begin_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run begins where it was to begin, even if it is now longer."""
        self._begin_step = state_dict["begin_step"]

    # How.

    def _prepare(self, pl_module: Any) -> None:
        self._layers = prepare_qat_(pl_module, self.scheme, self.group, self.targets, self.skip, self.embedding)
        self._on = True

    def _switch(self, pl_module: Any, on: bool) -> None:
        self._on = on
        for name in self._layers:  # ours only: another instance may begin at another time
            enable_fake_quant_(pl_module.get_submodule(name), on)


def _step(trainer: Any, begin: float) -> int:
    if begin == 0.0:
        return 0
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError(
            f"QuantizationAwareTraining(begin={begin}) is a fraction of a run whose length is not known; give the "
            "Trainer max_steps or max_epochs (max_time may stand beside it), or begin at 0."
        )
    return round(begin * total)
