"""The distillation loss of a training step, for logits that were made whole and for logits that never are."""

# Shape letters: N = rows (positions, flattened), V = vocabulary.

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_slm.distillation.losses import forward_kl_rows
from lightning_slm.distillation.student import Call
from lightning_slm.distillation.teacher import Answer


def whole_term(call: Call, answer: Answer, batch: Any, temperature: float) -> Tensor:
    """T^2 times the mean forward KL over the tokens that count, by the student's own logits: a scalar."""
    student_NV = call.logits.flatten(0, -2)
    counted_N = call.counted(batch)
    nats_N = forward_kl_rows(student_NV, answer.rows(len(student_NV)), temperature, counted_N)
    tokens = len(nats_N) if counted_N is None else counted_N.sum().clamp(min=1)
    return nats_N.sum() * temperature**2 / tokens


class ChunkedTerm:
    """The same for a module that makes its logits chunk by chunk: it calls this with each, and adds what it returns.

    Args:
        answer: the teacher's, on the whole micro-batch.
        temperature: softens both distributions.
        weight: factor of the returned sums; the means are without it.
    """

    def __init__(self, answer: Answer, temperature: float, weight: float) -> None:
        self._teacher_rows = answer.predicting_rows()
        self._temperature, self._weight = temperature, weight
        device = answer.states.device
        self._sums = torch.zeros(2, device=device)  # distillation loss, cross-entropy
        self._tokens = torch.zeros((), dtype=torch.long, device=device)

    def __call__(self, student_NV: Tensor, labels_N: Tensor, rows: slice) -> Tensor:
        """Sum over the chunk's tokens of weight * T^2 * KL; ``rows`` are positions that predict a next token."""
        counted_N = labels_N != -100
        nats_N = forward_kl_rows(student_NV, self._teacher_rows(rows), self._temperature, counted_N)
        loss = nats_N.sum() * self._temperature**2
        task_loss = F.cross_entropy(student_NV.detach(), labels_N, reduction="sum")
        self._sums += torch.stack([loss.detach(), task_loss])
        self._tokens += counted_N.sum()
        return self._weight * loss

    def means(self) -> tuple[Tensor, Tensor]:
        """T^2 times the forward KL, and the cross-entropy; per token, over all chunks so far."""
        kd_loss, task_loss = (self._sums / self._tokens.clamp(min=1)).unbind()
        return kd_loss, task_loss
