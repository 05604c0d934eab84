"""How well a model predicts text: perplexity and bits per byte, token-correct over batches and ranks.

Perplexity is exp(mean nats per token) over non-overlapping windows; it depends on the tokenizer. Bits per byte is the
same sum of nats, in bits, per byte of the text that the tokens stand for; so models with other tokenizers compare.
"""

# Shape letters: B = batch, T = tokens, V = vocabulary.

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_slm.nn.language_model import logits_of


class _NatsPer(Metric):
    """Summed nats over a summed unit. float32, since float64 does not exist on every accelerator (MPS)."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nats: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros(()), dist_reduce_fx="sum")

    def _add(self, nats_sum: Tensor | float, units: Tensor | float) -> None:
        self.nats += torch.as_tensor(nats_sum, dtype=self.nats.dtype, device=self.nats.device)
        self.units += torch.as_tensor(units, dtype=self.units.dtype, device=self.units.device)


class Perplexity(_NatsPer):
    """exp(mean nats per token), from sums: unlike a mean of batch losses it is right for unequal batches and ranks.

    >>> perplexity = Perplexity()
    >>> perplexity.update(3 * math.log(7), 3)
    >>> perplexity.update(1 * math.log(7), 1)
    >>> round(perplexity.compute().item(), 4)
    7.0
    """

    def update(self, nats_sum: Tensor | float, tokens: Tensor | int) -> None:
        """Add a batch: cross-entropy summed over its predicted tokens, in nats, and how many these were."""
        self._add(nats_sum, tokens)

    def compute(self) -> Tensor:
        return torch.exp(self.nats / self.units)


class BitsPerByte(_NatsPer):
    """Bits needed per byte of the original text.

    >>> bits_per_byte = BitsPerByte()
    >>> bits_per_byte.update(12 * math.log(2), 4.0)
    >>> bits_per_byte.compute().item()
    3.0
    """

    def update(self, nats_sum: Tensor | float, bytes: Tensor | float) -> None:
        """Add a batch: cross-entropy summed over its predicted tokens, in nats, and the bytes these stand for."""
        self._add(nats_sum, bytes)

    def compute(self) -> Tensor:
        return self.nats / (self.units * math.log(2))


class Nats(NamedTuple):
    """Cross-entropy summed over predicted tokens, how many these were, and in how many windows of which length."""

    nats: float
    tokens: int
    windows: int
    window: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.nats / math.log(2) / (self.tokens * bytes_per_token)


def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """exp(mean nats per predicted token) over the windows of ``batches``; see `summed_nats` for what a batch may be."""
    return summed_nats(model, batches).perplexity


def bits_per_byte(model: nn.Module, batches: Iterable[Any], bytes_per_token: float) -> float:
    """Bits per byte of text over the windows of ``batches``.

    Args:
        model: gives logits; see `summed_nats`.
        batches: see `summed_nats`.
        bytes_per_token: bytes of the text, in UTF-8, divided by its tokens.
    """
    return summed_nats(model, batches).bits_per_byte(bytes_per_token)


@torch.no_grad()
def summed_nats(model: nn.Module, batches: Iterable[Any]) -> Nats:
    """Cross-entropy of ``model`` on every predicted token of ``batches``, in evaluation mode; window after window.

    Args:
        model: its forward gives logits (B, T, V), or an object or dict with ``logits``.
        batches: each is a dict with ``input_ids`` (B, T) and optionally unshifted ``labels`` (-100: no loss),
            ``attention_mask`` and ``position_ids``; or the ids alone; or a pair (ids, targets), where ``targets``
            are the next tokens already (and are passed on to a model whose forward asks for two arguments). They are
            moved to the model's device.

    Raises:
        ValueError: there is nothing to predict, or a batch of another kind.
    """
    device = next(model.parameters()).device
    nats, tokens, windows, window = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in batches:
            inputs, targets_BT = _inputs_and_targets(batch, device)
            logits_BTV = _logits(model, inputs, targets_BT)
            # One sequence at a time: in float32 the logits of a whole batch can be larger than the model.
            for logits_TV, targets_T in zip(logits_BTV, targets_BT):
                nats += nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum").item()
            tokens += int((targets_BT != -100).sum())
            windows, window = windows + len(targets_BT), max(window, targets_BT.shape[1])
    if not tokens:
        raise ValueError("no token to predict: there are no batches, or every label is -100.")
    return Nats(nats, tokens, windows, window)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _inputs_and_targets(batch: Any, device: torch.device) -> tuple[dict[str, Tensor] | Tensor, Tensor]:
    """What the model takes, and the token that each of its outputs shall predict; -100 where there is none."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if isinstance(batch, Mapping) and "input_ids" in batch:
        known = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[name].to(device) for name in known if batch.get(name) is not None}
        labels_BT = batch["labels"].to(device) if batch.get("labels") is not None else inputs["input_ids"]
        if "attention_mask" in inputs:
            labels_BT = labels_BT.masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs, nn.functional.pad(labels_BT[:, 1:], (0, 1), value=-100)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch):
        return batch[0].to(device), batch[1].to(device)
    kind = type(batch).__name__
    raise ValueError(f"a batch is a dict with input_ids, a tensor of token ids, or a pair (ids, next ids), not {kind}.")


def _logits(model: nn.Module, inputs: dict[str, Tensor] | Tensor, targets_BT: Tensor) -> Tensor:
    """Logits (or log-probabilities) of shape (B, T, V), however the model takes its inputs and returns them."""
    if isinstance(inputs, dict):
        output = model(**inputs)
    else:
        output = model(inputs, targets_BT) if _required_arguments(model) > 1 else model(inputs)
    logits = logits_of(output)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} returned neither logits nor an object with some; measure the network that does."
        )
    return logits.reshape(*targets_BT.shape, -1)


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    named = (p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return sum(p.default is p.empty for p in named)
