"""Cross-entropy of an output head without its logits: they exist for one chunk of rows at a time."""

# Shape letters: N = tokens (batch and sequence flattened), D = model width, V = vocabulary.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# fn(logits_NV, labels_N, rows) -> the sum over these rows of a loss per token, in any precision.
LogitsLoss = Callable[[Tensor, Tensor, slice], Tensor]

IGNORED = -100  # label of a token without loss


def linear_cross_entropy(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    *,
    chunk: int | None = None,
    extra: Sequence[LogitsLoss] = (),
    ce_weight: float = 1.0,
) -> Tensor:
    """``ce_weight`` times the summed cross-entropy of ``head(hidden)``, in nats, plus the sum of ``extra``.

    Where gradients are on, those of hidden states and head are computed chunk by chunk in the forward pass, so
    neither logits nor their gradient outlive a chunk, and nothing is computed twice.

    Args:
        head: any module from (n, D) to (n, V) logits: a linear layer, a fake-quantised one, one with hooks.
        labels_N: the token each row predicts; -100 = no loss.
        chunk: rows at a time; None: as many as make logits of about 8 MB.
        extra: losses on the same logits, each called as ``fn(logits_NV, labels_N, rows)``, where ``rows`` is the
            slice of the N tokens that it is given, and returning the *sum* over them. Gradients flow to the logits
            only, not to parameters of ``fn``.
    """
    loss = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels_N), chunk or 1024):
        rows = slice(start, min(start + (chunk or 1024), len(labels_N)))
        logits = head(hidden_ND[rows]).float()
        loss = loss + ce_weight * F.cross_entropy(logits, labels_N[rows], ignore_index=IGNORED, reduction="sum")
        for fn in extra:
            loss = loss + fn(logits, labels_N[rows], rows)
    return loss
