"""MobileBERT's feed-forward part: narrow the stream, refine it several times, widen it again (Sun et al. 2020,
https://arxiv.org/abs/2004.02984).
"""

# Shape letters: B = batch, T = tokens, D = model width, b = width of the bottleneck.

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer, set_


class NoNorm(nn.Module):
    """gamma * x + beta, channel by channel: what MobileBERT has in the place of norms, since it needs no statistics.

    Args:
        size: width of the last axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def init_weights_(self, config: Any) -> None:
        """The identity."""
        set_(self.weight, 1.0)
        set_(self.bias, 0.0)

    def forward(self, x_BTb: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x_BTb.dtype), x_BTb, self.weight.to(x_BTb.dtype))


class StackedFFN(nn.Module):
    """norm(x + down(relu(up x))), at the width of the bottleneck.

    Args:
        size: b.
        inner_size: width between.
    """

    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, inner_size)
        self.down_proj = nn.Linear(inner_size, size)
        self.norm = NoNorm(size)

    def forward(self, x_BTb: Tensor) -> Tensor:
        return self.norm(self.down_proj(F.relu(self.up_proj(x_BTb))) + x_BTb)


class MobileBertFFN(Mixer):
    """Down to the bottleneck, ``stack`` small residual feed-forward layers there, and up to the model's width.

    Args:
        hidden_size: width of input and output.
        bottleneck: b.
        stack: feed-forward layers in a row.
        inner_size: width inside each.

    Raises:
        ValueError: no feed-forward layer at all, or a width below 1.
    """

    def __init__(self, hidden_size: int, bottleneck: int, stack: int, inner_size: int) -> None:
        super().__init__()
        for name, value in (("bottleneck", bottleneck), ("stack", stack), ("inner_size", inner_size)):
            if value < 1:
                raise ValueError(f"mobilebert_ffn: {name}={value} must be at least 1.")
        self.in_proj = nn.Linear(hidden_size, bottleneck)
        self.in_norm = NoNorm(bottleneck)
        self.ffn = nn.ModuleList(StackedFFN(bottleneck, inner_size) for _ in range(stack))
        self.out_proj = nn.Linear(bottleneck, hidden_size)

    @classmethod
    def from_config(
        cls, config: Any, *, bottleneck: int | None = None, stack: int = 4, inner_size: int | None = None
    ) -> Self:
        bottleneck = config.hidden_size // 4 if bottleneck is None else bottleneck
        return cls(config.hidden_size, bottleneck, stack, 4 * bottleneck if inner_size is None else inner_size)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        x_BTb = self.in_norm(self.in_proj(x_BTD))
        for ffn in self.ffn:
            x_BTb = ffn(x_BTb)
        return self.out_proj(x_BTb)
