"""Cross-entropy of an output head without its logits: they exist for one chunk of rows at a time."""

# Shape letters: N = tokens (batch and sequence flattened), n = tokens of one chunk, D = model width, V = vocabulary.

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# fn(logits_nV, labels_n, rows) -> the sum over these rows of a loss per token; logits come in float32.
LogitsLoss = Callable[[Tensor, Tensor, slice], Tensor]

IGNORED = -100  # label of a token without loss


def linear_cross_entropy(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    *,
    chunk: int = 256,
    extra: Sequence[LogitsLoss] = (),
    ce_weight: float = 1.0,
) -> Tensor:
    """``ce_weight`` times the summed cross-entropy of ``head(hidden)`` in nats, plus the sum of ``extra``.

    Where gradients are on, those of the hidden states and of the head are computed in the forward pass already, chunk
    by chunk: neither logits nor their gradient outlive a chunk, and nothing is computed twice, as checkpointing would.

    Args:
        head: any module from (n, D) to (n, V) logits: a linear layer, a fake-quantised one, one with hooks. It is
            called once for each chunk.
        labels_N: the token that each row predicts; -100 = no loss.
        chunk: rows at a time, at most. Fewer save memory, but each chunk adds to the head's whole gradient once.
        extra: losses on the same logits, each called as ``fn(logits_nV, labels_n, rows)``, where ``rows`` is the
            slice of the N rows it is given, and returning the *sum* over them. Gradients flow to the logits only,
            not to parameters of ``fn``.
        ce_weight: factor of the cross-entropy; ``extra`` brings its own.

    Returns: a float32 scalar.

    >>> head = nn.Linear(4, 10)
    >>> hidden, labels = torch.randn(6, 4), torch.tensor([1, 2, 3, 4, 5, -100])
    >>> torch.allclose(linear_cross_entropy(hidden, head, labels, chunk=4), naive_cross_entropy(hidden, head, labels))
    True
    """
    params = [p for p in head.parameters() if p.requires_grad]
    chunks = _Chunks(head, labels_N, chunk, tuple(extra), ce_weight)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or params):
        return _LinearCrossEntropy.apply(hidden_ND, chunks, *params)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for rows in chunks:
        total += chunks.loss(hidden_ND[rows], rows)
    return total


def naive_cross_entropy(hidden_ND: Tensor, head: nn.Module, labels_N: Tensor) -> Tensor:
    """The twin of ``linear_cross_entropy``: all logits at once."""
    return F.cross_entropy(head(hidden_ND).float(), labels_N, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The slices of the rows, and the loss of one of them."""

    head: nn.Module
    labels_N: Tensor
    size: int
    extra: tuple[LogitsLoss, ...]
    ce_weight: float

    def __iter__(self) -> Iterator[slice]:
        N = len(self.labels_N)
        count = max(1, math.ceil(N / self.size))
        size = max(1, math.ceil(N / count))  # alike, so that a compiler sees one shape
        return (slice(start, min(start + size, N)) for start in range(0, N, size))

    def loss(self, hidden_nD: Tensor, rows: slice) -> Tensor:
        labels_n = self.labels_N[rows]
        logits_nV = self.head(hidden_nD).float()
        loss = F.cross_entropy(logits_nV, labels_n, ignore_index=IGNORED, reduction="sum")
        if self.ce_weight != 1.0:
            loss = self.ce_weight * loss
        for fn in self.extra:
            loss = loss + fn(logits_nV, labels_n, rows)
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, chunks: _Chunks, *params: Tensor) -> Tensor:
        grad_ND = torch.zeros_like(hidden_ND)
        grads = [torch.zeros_like(p) for p in params]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in chunks:
            with torch.enable_grad():
                hidden_nD = hidden_ND[rows].detach().requires_grad_()
                loss = chunks.loss(hidden_nD, rows)
            grad_nD, *found = torch.autograd.grad(loss, (hidden_nD, *params), allow_unused=True)
            grad_ND[rows] = grad_nD
            for grad, new in zip(grads, found):
                if new is not None:
                    grad += new
            total += loss.detach()
        ctx.save_for_backward(grad_ND, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, *grads = (grad * grad_loss for grad in ctx.saved_tensors)
        return grad_ND, None, *grads
