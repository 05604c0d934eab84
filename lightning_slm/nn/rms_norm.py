"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

# Shape letters: D = model width.

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32.

    Written out, because in eager mode on CPU that trains a small model under bf16 autocast 1.4 x faster than
    ``F.rms_norm`` does (its twin in the tests).

    Args:
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        x = x_D.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_D.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
