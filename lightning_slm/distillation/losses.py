"""Distillation losses, all by one convention: mean over unmasked tokens of the divergence in nats, times T^2.

Position t's logits predict token t+1, so labels (unshifted, -100 = no loss) mask position t by ``labels[t + 1]``, and
the last position never counts. The factor T^2 keeps gradients of the same size at every temperature (Hinton et al.
2015, section 2, https://arxiv.org/abs/1503.02531). Nothing here makes a second (B, T, V) tensor in float32.
"""

# Shape letters: B = batch, T = tokens, V = vocabulary, N = rows: B * T positions, flattened.

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits computed when they are needed, for a few rows at a time: rows -> (n, V).
LazyRows = Callable[[slice], Tensor]

# Elements per chunk in float32: what stays in a CPU's cache, and what fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**20}
_CHUNK_ELEMENTS_ELSEWHERE = 2**24

_LOG_OF_ZERO = -1e30


def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over unmasked tokens of KL(teacher || student) in nats, times ``temperature``^2; zero if all are masked.

    Student log-probabilities serve as well as logits: log_softmax changes neither.

    Args:
        student_BTV: logits, any float type; the sums run in float32.
        teacher_BTV: logits of the teacher; no gradient flows into them.
        labels_BT: the tokens themselves, unshifted; -100 where a token is not to be predicted.
        temperature: softens both distributions; above zero.

    Raises:
        ValueError: shapes that do not fit: another vocabulary, or labels of another batch.
    """
    keep_N = predicted(labels_BT).flatten()
    if student_BTV.shape[:-1] != labels_BT.shape:
        raise ValueError(f"labels of shape {tuple(labels_BT.shape)} do not fit logits of {tuple(student_BTV.shape)}")
    nats_N = forward_kl_rows(student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), temperature, keep_N)
    return nats_N.sum() * temperature**2 / keep_N.sum().clamp(min=1)


def forward_kl_rows(
    student_NV: Tensor, teacher_NV: Tensor | LazyRows, temperature: float = 1.0, keep_N: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of every row in nats: float32, shape (N,), without the factor T^2.

    A token to which the teacher gives no probability costs nothing, whatever the student's; one to which only the
    student gives none costs 1e30 times the teacher's, which stands for infinity. The gradient comes by formula, in
    the forward pass and in the student's type.

    Args:
        student_NV: logits or log-probabilities.
        teacher_NV: logits, or a function that makes those of a slice of rows when they are needed.
        temperature: softens both distributions; above zero.
        keep_N: bool; the other rows cost zero and get no gradient. None: every row counts.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above zero; 1 leaves the distributions as they are")
    return _ForwardKL.apply(student_NV, teacher_NV, temperature, keep_N)


def distillation_loss(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    labels_BT: Tensor,
    *,
    task_loss: Tensor | None = None,
    temperature: float = 2.0,
    weight: float = 0.5,
) -> Tensor:
    """What ``KnowledgeDistillation`` adds up, for a loop of one's own or manual optimisation.

    Args:
        student_BTV: logits with gradient.
        teacher_BTV: logits of the teacher on the same tokens.
        labels_BT: unshifted, -100 = no loss.
        task_loss: the loss without a teacher; None: cross-entropy of the next token.
        temperature: softens both distributions.
        weight: share of the distillation loss, 0 to 1.

    Returns: (1 - weight) * task loss + weight * forward KL, a scalar in nats per token.
    """
    if task_loss is None:
        next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
        task_loss = F.cross_entropy(student_BTV.flatten(0, 1).float(), next_BT.flatten())
    return (1 - weight) * task_loss + weight * forward_kl(student_BTV, teacher_BTV, labels_BT, temperature=temperature)


def predicted(labels_BT: Tensor) -> Tensor:
    """Which positions predict a token that counts: bool, shape (B, T), the last position False.

    >>> predicted(torch.tensor([[5, 6, -100, 7]]))
    tensor([[ True, False,  True, False]])
    """
    return F.pad(labels_BT[:, 1:] != -100, (0, 1), value=False)


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise if the two cannot be compared token by token."""
    if student != teacher:
        raise ValueError(
            f"The student's vocabulary has {student} entries and the teacher's {teacher}, but logits are compared "
            f"token by token: give both the same tokenizer; if only the padding of the embedding differs, call "
            f"resize_token_embeddings({min(student, teacher)}) on the wider model."
        )


class _ForwardKL(torch.autograd.Function):
    """Chunks of rows, each read once: d KL / d student = (softmax(student/T) - softmax(teacher/T)) / T."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor | LazyRows, temperature: float, keep_N: Tensor | None
    ) -> Tensor:
        N, V = student_NV.shape
        nats_N = torch.empty(N, dtype=torch.float32, device=student_NV.device)
        grad_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        for rows in _chunks(student_NV):
            teacher_nV = teacher_NV[rows] if isinstance(teacher_NV, Tensor) else teacher_NV(rows)
            check_vocabularies(V, teacher_nV.shape[-1])
            nats_N[rows], difference_nV = _kl_chunk(student_NV[rows], teacher_nV, temperature)
            if grad_NV is not None:
                grad_NV[rows] = difference_nV.mul_(1 / temperature)
        ctx.save_for_backward(grad_NV, keep_N)
        return nats_N if keep_N is None else nats_N.masked_fill_(~keep_N, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        grad_NV, keep_N = ctx.saved_tensors
        if keep_N is not None:
            grad_NV.masked_fill_(~keep_N[:, None], 0.0)  # not times zero: a masked row may hold nan
        # In place, for no second (N, V) tensor; autograd's version counter refuses a second backward through it.
        return grad_NV.mul_(grad_N[:, None]), None, None, None


def _chunks(student_NV: Tensor) -> Iterator[slice]:
    N, V = student_NV.shape
    step = max(1, _CHUNK_ELEMENTS.get(student_NV.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // V)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def _kl_chunk(student_nV: Tensor, teacher_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The KL of a few rows, and softmax(student/T) - softmax(teacher/T); both float32."""
    # Finite where a token is forbidden (-inf), since 0 * inf would be nan.
    log_s_nV = torch.log_softmax(student_nV.float() / temperature, dim=-1).clamp_(min=_LOG_OF_ZERO)
    log_t_nV = torch.log_softmax(teacher_nV.float() / temperature, dim=-1).clamp_(min=_LOG_OF_ZERO)
    p_teacher_nV = log_t_nV.exp()
    nats_n = torch.linalg.vecdot(p_teacher_nV, log_t_nV.sub_(log_s_nV))
    return nats_n, log_s_nV.exp_().sub_(p_teacher_nV)
