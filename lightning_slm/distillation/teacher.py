"""A frozen teacher: asked once for each micro-batch, it gives its logits a few rows at a time."""

# Shape letters: B = batch, T = tokens, D = model width, V = vocabulary, N = rows: B * T positions, flattened.

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.distillation.losses import LazyRows, check_vocabularies
from lightning_slm.nn.language_model import backbone_and_head, is_backbone_and_head, logits_of
from lightning_slm.nn.sharded import whole

# What a student may be called with and a teacher should not be: its loss and its cache are not wanted.
_STUDENTS_OWN = ("labels", "num_items_in_batch", "use_cache", "past_key_values", "return_logits")


@dataclass(frozen=True)
class Answer:
    """What a teacher said about one batch: hidden states and the head that makes logits of them, or logits."""

    states: Tensor  # (B, T, D) with a head; (B, T, V) or (N, V) without
    head: Callable[[Tensor], Tensor] | None

    def rows(self, expected: int) -> LazyRows:
        """Logits of a slice of all N rows, one row for each position; ValueError unless N is as ``expected``."""
        flat = self.states.flatten(0, -2)
        if len(flat) != expected:
            raise ValueError(f"The teacher answered for {len(flat)} positions, and the student for {expected}.")
        return lambda rows: self._logits(flat[rows])

    def predicting_rows(self) -> LazyRows:
        """Logits of a slice of the B * (T - 1) rows that predict a next token: no sequence's last position."""
        flat, per_sequence = self.states.flatten(0, -2), self.states.shape[-2] - 1

        def logits_of(rows: slice) -> Tensor:
            shifted = torch.arange(rows.start, rows.stop, device=flat.device)
            return self._logits(flat[shifted + shifted // per_sequence])

        return logits_of

    def broken(self) -> bool:
        """Whether there is nan or +inf in it (-inf forbids a token, which is in order)."""
        return not bool((self.states < torch.inf).all())

    @torch.no_grad()
    def _logits(self, states: Tensor) -> Tensor:
        return states if self.head is None else self.head(states)


class Teacher:
    """Asks a network without touching its gradients; ``freeze_`` it first.

    Where the logits are nothing but an output head on the last hidden states, as in most Hugging Face models, only
    the hidden states are kept. Whether that is so is tried on a few tokens: some models scale or cap their logits.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self._splits: bool | None = None

    @torch.no_grad()
    def ask(self, *args: Any, **kwargs: Any) -> Answer:
        """Answer to the student's own inputs.

        Raises:
            ValueError: inputs that the teacher does not take, or more tokens than it has positions for.
        """
        inputs = self._inputs(args, kwargs)
        ids = token_ids(inputs.values())
        self._check_length(ids)
        if self._splits is None:
            self._splits = ids is not None and is_backbone_and_head(self.network, ids[:1, :8])
        parts = backbone_and_head(self.network) if self._splits and "logits_to_keep" not in inputs else None
        if parts is not None:
            backbone, head = parts
            return Answer(backbone(**inputs).last_hidden_state, head)
        logits = logits_of(self.network(**inputs))
        if logits is None:
            raise ValueError(
                f"The teacher {type(self.network).__name__} returned neither logits nor an object with some"
            )
        return Answer(logits, None)

    def check_vocabulary(self, student: int | None) -> None:
        """Raise if the student has another number of logits, as far as both are known beforehand."""
        own = vocabulary(self.network)
        if student is not None and own is not None:
            check_vocabularies(student, own)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        signature = inspect.signature(self.network.forward)
        kwargs = {name: value for name, value in kwargs.items() if name not in _STUDENTS_OWN}
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ValueError(
                f"The teacher {type(self.network).__name__} cannot be called as the student was: {error}. Wrap it in "
                "a module whose forward takes the student's arguments."
            ) from error
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        inputs = {name: value for name, value in bound.items() if name not in _STUDENTS_OWN}
        return {**inputs, "use_cache": False} if "use_cache" in signature.parameters else inputs

    def _check_length(self, ids: Tensor | None) -> None:
        config = getattr(self.network, "config", None)
        longest = getattr(config, "max_position_embeddings", None)
        if ids is not None and isinstance(longest, int) and ids.shape[-1] > longest:
            raise ValueError(
                f"The batch has {ids.shape[-1]} tokens in a row and the teacher {type(self.network).__name__} "
                f"max_position_embeddings={longest}: shorten the window, or choose another teacher."
            )


def freeze_(network: nn.Module) -> Callable[[], None]:
    """Evaluation mode, no gradients; the returned function puts every flag back."""
    modes = [(m, m.training) for m in network.modules()]
    needs = [(p, p.requires_grad) for p in network.parameters()]
    network.eval().requires_grad_(False)

    def thaw() -> None:
        for module, training in modes:
            module.training = training
        for parameter, required in needs:
            parameter.requires_grad_(required)

    return thaw


def fingerprint(network: nn.Module, samples: int = 64) -> str:
    """A short hash of names, shapes and ``samples`` values of every parameter and buffer: cheap, and it tells two
    trainings of one architecture apart.

    >>> fingerprint(nn.Linear(3, 2)) == fingerprint(nn.Linear(3, 2))
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = whole(tensor.detach()).flatten()
        digest.update(flat[:: max(1, flat.numel() // samples)].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def vocabulary(network: Any) -> int | None:
    """Entries of a network's output, where its head or its configuration tells."""
    head: Any = getattr(network, "get_output_embeddings", lambda: None)()
    if hasattr(head, "weight"):
        return head.weight.shape[0]
    return getattr(getattr(network, "config", None), "vocab_size", None)


def token_ids(values: Iterable[Any]) -> Tensor | None:
    """The first of the values that looks like token ids: integers of shape (B, T)."""
    ids = (v for v in values if isinstance(v, Tensor) and v.ndim == 2)
    return next((v for v in ids if not v.is_floating_point() and v.dtype != torch.bool), None)
