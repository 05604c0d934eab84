"""Which module makes the student's logits: seen by forward hooks, so that the student runs once."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_slm.distillation.losses import predicted
from lightning_slm.distillation.teacher import token_ids
from lightning_slm.errors import near
from lightning_slm.nn.language_model import logits_of

# Shape letters: B = batch, T = tokens, V = vocabulary, N = rows: B * T positions, flattened.


@dataclass(frozen=True)
class Call:
    """One call of the student: what went in, and the logits that came out."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Tensor  # (B, T, V) or (N, V)

    def counted(self, batch: Any) -> Tensor | None:
        """Which of the N rows of logits count: bool, (N,), from the first there is of: the call's or the batch's
        ``labels`` (unshifted, -100 = no loss), their ``attention_mask``. None: there is neither, so all of them do.
        """
        sources = [s for s in (self.kwargs, batch) if isinstance(s, Mapping)]
        labels = next((s["labels"] for s in sources if isinstance(s.get("labels"), Tensor)), None)
        if labels is None:
            masks = [m for s in sources if isinstance(m := s.get("attention_mask"), Tensor) and m.ndim == 2]
            if not masks:
                return None
            labels = torch.where(masks[0] == 0, -100, 0)
        rows = self.logits.shape[:-1].numel()
        if labels.ndim != 2 or labels.numel() != rows:
            raise ValueError(
                f"Labels or mask of shape {tuple(labels.shape)} do not fit logits of shape {tuple(self.logits.shape)}: "
                "the training step must make the logits of every token (no logits_to_keep)."
            )
        return predicted(labels).flatten()


class StudentWatch:
    """Hooks on the modules that may be the student; they record only within ``watching()``, and with gradients on.

    Args:
        root: the module that trains.
        student: dotted name of the sub-module that yields the logits; "auto": ``root`` itself or one of its children,
            whichever takes token ids and gives logits.
    """

    def __init__(self, root: nn.Module, student: str = "auto") -> None:
        self._auto = student == "auto"
        modules = {"": root, **dict(root.named_children())} if self._auto else {student: _submodule(root, student)}
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self._watching = False
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            if not isinstance(module, nn.Embedding):  # ids in, floats out, and no logits
                self._hook(name, module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._calls.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def take(self) -> Call:
        """The one call that made logits while watching; nothing of it is kept here.

        Raises:
            ValueError: none, or several that cannot be told apart.
        """
        seen, calls = self._calls.copy(), [call for c in self._calls if (call := self._with_logits(*c)) is not None]
        self._calls.clear()
        # The module's own forward answers for its children: it may do more to the logits than they did.
        calls = [c for c in calls if c.module == ""] or calls
        if len(calls) == 1:
            return calls[0]
        raise ValueError(
            f"Distillation needs the one module that makes the logits, but of those called in the training step "
            f"({[name or 'forward of the module itself' for name, *_ in seen]}) {len(calls)} did so. Name it, as in "
            "student='model.lm'; or leave the callback away and add lightning_slm.distillation.distillation_loss(...) "
            "in the training step."
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, module: nn.Module) -> None:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._watching and torch.is_grad_enabled():
                self._calls.append((name, args, kwargs, output))

        def ask_for_logits(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, "return_logits": True}) if self._watching else None

        self._handles.append(module.register_forward_hook(record, with_kwargs=True))
        if "return_logits" in inspect.signature(module.forward).parameters:  # our models leave them out in training
            self._handles.append(module.register_forward_pre_hook(ask_for_logits, with_kwargs=True))

    def _with_logits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
        logits = logits_of(output)
        if logits is None or not logits.requires_grad or (self._auto and token_ids((*args, *kwargs.values())) is None):
            return None
        return Call(name, args, kwargs, logits)


def _submodule(root: nn.Module, name: str) -> nn.Module:
    modules = dict(root.named_modules())
    if name not in modules or not name:
        raise ValueError(f"student={name!r} is no sub-module. {near(name, [n for n in modules if n])}")
    return modules[name]
