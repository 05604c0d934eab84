"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

# Shape letters: D = model width, N = all other axes flattened.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALL = 2**14  # elements: below, the number of steps is all that counts


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32.

    Args:
        size: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        return rms_norm(x_ND, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32 or better.

    On CPU in eager mode, where ``F.rms_norm`` is a chain of small steps, large inputs go through fewer of them, with a
    backward pass of their own that keeps nothing but the input and a number per row.
    """
    if torch.compiler.is_compiling():
        return naive_rms_norm(x_ND, weight_D, eps)  # the compiler fuses it
    few = x_ND.numel() < _SMALL and not torch.is_grad_enabled()
    if x_ND.dtype == weight_D.dtype and (x_ND.is_cuda or few):
        return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)
    return _RMSNorm.apply(x_ND, weight_D, eps)


def naive_rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The twin of ``rms_norm``: its definition."""
    x = x_ND.to(_precise(x_ND))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_ND.dtype)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=_precise(x_ND))
        inverse_N1 = torch.rsqrt(norm_N1.square() / x_ND.shape[-1] + eps)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        ctx.eps = eps
        return weight_D * (x_ND * inverse_N1).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: of the definition
            y_ND = naive_rms_norm(x_ND, weight_D, ctx.eps)
            return *torch.autograd.grad(y_ND, (x_ND, weight_D), grad_ND, create_graph=True), None
        x, grad, weight = (t.to(_precise(x_ND)) for t in (x_ND, grad_ND, weight_D))
        D = len(weight)
        product_ND = (grad * x).view(-1, D)
        grad_weight_D = inverse_N1.view(1, -1).mm(product_ND)[0]
        slope_N1 = product_ND.mv(weight).view_as(inverse_N1) * inverse_N1.pow(3)
        grad_x_ND = (grad * weight).mul_(inverse_N1).addcmul_(x, slope_N1, value=-1 / D)
        return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(weight_D.dtype), None
