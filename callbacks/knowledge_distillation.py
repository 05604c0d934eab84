"""A frozen teacher's predictions as a second target (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_slm.callbacks._hooks import Undo, when_layers_exist, wrap_method
from lightning_slm.distillation import (
    Answer,
    ChunkedTerm,
    StudentWatch,
    Teacher,
    fingerprint,
    freeze_,
    vocabulary,
    whole_term,
)
from lightning_slm.errors import NoEffectWarning


class KnowledgeDistillation(Callback):
    """Let the student match a teacher: loss = (1 - weight) * task loss + weight * T^2 * mean KL(teacher || student).

    The teacher is no part of the module: no checkpoint, optimizer, DDP bucket or summary sees it.

    Args:
        teacher: a Hugging Face folder, a Lightning checkpoint of our ``CausalLM``, a preset (with new weights: for
            trying things out), or any module whose forward takes what the student's takes and gives logits.
        temperature: softens both distributions; above zero, 1 to 4 is usual.
        weight: share of the distillation loss, 0 to 1; at 1 the labels only say which tokens count. With several
            teachers, one instance each, the task loss keeps 1 - the sum of their weights.
        student: dotted name of the sub-module that makes the student's logits; "auto" finds it.
    """

    _asked: Teacher
    _watch: StudentWatch

    def __init__(
        self, teacher: nn.Module | str | Path, temperature: float = 2.0, weight: float = 0.5, student: str = "auto"
    ) -> None:
        if temperature <= 0 or not 0 <= weight <= 1:
            raise ValueError(f"temperature={temperature} must be above 0, and weight={weight} from 0 to 1.")
        self.teacher, self.temperature, self.weight, self.student = teacher, temperature, weight, student
        self._undo: list[Undo] = []
        self._fingerprint = self._restored_fingerprint = ""

    # What to override.

    def load_teacher(self) -> nn.Module:
        """The network that ``teacher`` names; it is frozen and moved later."""
        return _load(self.teacher)

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """For a fit: load the teacher, and stand around the training step."""
        if stage != "fit":
            return
        self._release()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimises manually, so its training step returns no loss to add to: call "
                "lightning_slm.distillation.distillation_loss(...) there, and leave this callback away."
            )
        if (task := getattr(pl_module, "task", "causal")) in ("masked", "classification"):
            raise ValueError(
                f"{type(pl_module).__name__} trains for the task {task!r}, but KnowledgeDistillation compares what two "
                "models say of the next token; leave the callback away."
            )
        if self.weight == 0:
            warnings.warn("KnowledgeDistillation(weight=0) does not use its teacher.", NoEffectWarning, stacklevel=2)
            return
        self._share(trainer)
        self._asked = Teacher(self.load_teacher())
        by_chunks = self.student == "auto" and hasattr(pl_module, "add_logits_loss")
        if not by_chunks:
            self._undo.append(when_layers_exist(pl_module, lambda: self._watch_student(pl_module)))
        step = self._step_by_chunks if by_chunks else self._step_by_hooks

        def with_teacher(original: Any, *args: Any) -> Any:  # a validation step may well call the training step
            return step(pl_module, original, *args) if trainer.training else original(*args)

        self._undo.append(wrap_method(pl_module, "training_step", with_teacher))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze the teacher and move it to where the student is, in shards if that is in shards."""
        if not self.weight:
            return
        network = self._asked.network
        if {id(p) for p in network.parameters()} & {id(p) for p in pl_module.parameters()}:
            raise ValueError(
                f"The teacher shares weights with {type(pl_module).__name__}, so it would learn with its student: give "
                "copy.deepcopy(model), and keep it out of the LightningModule."
            )
        self._undo.append(freeze_(network))
        self._fingerprint = fingerprint(network)
        shard = getattr(trainer.strategy, "shard_frozen_", None)  # as the student is
        if shard is not None:
            shard(network)
        network.to(pl_module.device)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Our state is restored now: refuse to go on with another teacher than the run began with."""
        if self._restored_fingerprint not in ("", self._fingerprint):
            raise ValueError(
                f"This run began with another teacher than {self._name()} (fingerprint {self._restored_fingerprint}, "
                f"now {self._fingerprint}), so it cannot be resumed bit by bit. Give the old teacher; or start a new "
                "run from the checkpoint's weights."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave module and teacher as they were."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self._release()

    # State: which teacher it was.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        return self._generate_state_key(
            teacher=self._name(), temperature=self.temperature, weight=self.weight, student=self.student
        )

    def state_dict(self) -> dict[str, Any]:
        """The teacher's fingerprint; its weights stay where they are."""
        return {"teacher": self._fingerprint} if self._fingerprint else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compared in `on_train_start`, since evaluation needs no teacher."""
        self._restored_fingerprint = state_dict["teacher"]

    # How.

    def _share(self, trainer: Any) -> None:
        """The first of several teachers leaves the task loss its share, and the others add to that."""
        teachers = [c for c in trainer.callbacks if isinstance(c, KnowledgeDistillation) and c.weight]
        task_share = 1 - sum(c.weight for c in teachers)
        if task_share < -1e-6:
            raise ValueError(f"The weights of {len(teachers)} teachers add up to {1 - task_share:g}, which is above 1.")
        self._first = teachers[0] is self
        self._task_share = task_share if self._first else 1.0
        self._suffix = "" if len(teachers) == 1 else f"/{teachers.index(self)}"

    def _watch_student(self, pl_module: Any) -> None:
        self._watch = StudentWatch(pl_module, self.student)
        self._undo.append(self._watch.remove)

    def _step_by_hooks(self, pl_module: Any, step: Any, batch: Any, *args: Any) -> Any:
        """The student's own call is seen by hooks; the teacher is then called in the same way."""
        with self._watch.watching():
            output = step(batch, *args)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:  # a skipped batch
            return output
        call = self._watch.take()
        self._asked.check_vocabulary(call.logits.shape[-1])
        answer = self._asked.ask(*call.args, **call.kwargs)
        kd_loss = whole_term(call, answer, batch, self.temperature)
        self._check_and_log(pl_module, answer, kd_loss, loss.detach())
        total = self._task_share * loss + self.weight * kd_loss
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _step_by_chunks(self, pl_module: Any, step: Any, batch: Any, *args: Any) -> Any:
        """The module never makes all its logits; it hands us each chunk of them, and adds what we return."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return step(batch, *args)  # refused there
        self._asked.check_vocabulary(vocabulary(getattr(pl_module, "model", None)))
        context = {k: batch[k] for k in ("attention_mask", "position_ids") if batch.get(k) is not None}
        answer = self._asked.ask(batch["input_ids"], **context)
        term = ChunkedTerm(answer, self.temperature, self.weight)
        handle = pl_module.add_logits_loss(term, ce_weight=self._task_share)
        try:
            output = step(batch, *args)
        finally:
            handle.remove()
        self._check_and_log(pl_module, answer, *term.means())
        return output

    def _check_and_log(self, pl_module: Any, answer: Answer, kd_loss: Tensor, task_loss: Tensor) -> None:
        if kd_loss.isnan() and answer.broken():
            raise ValueError(
                f"The teacher {self._name()} gives nan or infinite logits at step {pl_module.global_step}: its weights "
                "are broken, or its numbers leave the range of this precision (try bf16-mixed or 32-true)."
            )
        pl_module.log(f"slm/kd_loss{self._suffix}", kd_loss.detach())
        if self._first:
            pl_module.log("slm/task_loss", task_loss)

    def _name(self) -> str:
        return type(self.teacher).__qualname__ if isinstance(self.teacher, nn.Module) else str(self.teacher)

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()


def _load(source: nn.Module | str | Path) -> nn.Module:
    if isinstance(source, nn.Module):
        if not hasattr(source, "add_logits_loss"):
            return source
        module: Any = source
        module.configure_model()  # a CausalLM: what it trains is the teacher
        return module.model

    from lightning_slm.models import PRESETS, load_causal_lm  # here, since transformers takes seconds to import

    if str(source).endswith(".ckpt"):
        from lightning_slm.modules import CausalLM

        return CausalLM.load_from_checkpoint(source, map_location="cpu", weights_only=True).model
    if str(source) in PRESETS:
        warnings.warn(f"The teacher {str(source)!r} is a preset: its weights are random.", stacklevel=4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same on every rank and after a restart
        return load_causal_lm(source)
