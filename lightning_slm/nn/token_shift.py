"""The token shift of RWKV (Peng et al. 2023, https://arxiv.org/abs/2305.13048): every matrix reads its own mixture, per
channel, of a token and the one before.
"""

# Shape letters: B = batch, T = tokens of this call, D = model width.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def previous_tokens(x_BTD: Tensor, before_B1D: Tensor | None = None, starts_BT: Tensor | None = None) -> Tensor:
    """For each token the one before, (B, T, D).

    Args:
        before_B1D: the last one of the call before, see `last_token`; None: zeros.
        starts_BT: True where zeros stand for it.
    """
    if before_B1D is None:
        previous_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
    else:
        before_B1D = before_B1D.to(x_BTD.dtype)
        previous_BTD = before_B1D if x_BTD.shape[1] == 1 else torch.cat((before_B1D, x_BTD[:, :-1]), 1)
    return previous_BTD if starts_BT is None else previous_BTD.masked_fill(starts_BT[..., None], 0)


def last_token(x_BTD: Tensor) -> Tensor:
    """What the next call needs, (B, 1, D). To be kept after use: the state of before may be overwritten by it."""
    return (x_BTD if x_BTD.shape[1] == 1 else x_BTD[:, -1:].clone()).detach()


def interpolate(from_BTD: Tensor, to_BTD: Tensor, *weights_D: Tensor) -> tuple[Tensor, ...]:
    """``from + (to - from) * weight`` for each weight, each (B, T, D).

    In eager mode the backward pass is one of its own, with fewer steps over memory.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return naive_interpolate(from_BTD, to_BTD, *weights_D)
    return _Interpolate.apply(from_BTD, to_BTD, *weights_D)


def naive_interpolate(from_BTD: Tensor, to_BTD: Tensor, *weights_D: Tensor) -> tuple[Tensor, ...]:
    """The twin of ``interpolate``: its definition."""
    way_BTD = to_BTD - from_BTD
    return tuple(torch.addcmul(from_BTD, way_BTD, weight_D) for weight_D in weights_D)


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, from_BTD: Tensor, to_BTD: Tensor, *weights_D: Tensor) -> tuple[Tensor, ...]:
        way_BTD = to_BTD - from_BTD
        ctx.save_for_backward(way_BTD, *weights_D)
        return tuple(torch.addcmul(from_BTD, way_BTD, weight_D) for weight_D in weights_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        way_BTD, *weights_D = ctx.saved_tensors
        total, grad_to = grads[0].clone(), grads[0] * weights_D[0]
        for grad, weight in zip(grads[1:], weights_D[1:]):
            total.add_(grad)
            grad_to.addcmul_(grad, weight)
        grad_weights = ((grad * way_BTD).sum((0, 1)) for grad in grads)
        return total.sub_(grad_to), grad_to, *grad_weights
