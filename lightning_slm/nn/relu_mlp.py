"""Feed-forward layers whose activation is exactly zero for many tokens and channels, and their relative with GELU.

ReLU (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), squared ReLU (Primer, So et al. 2021,
https://arxiv.org/abs/2109.08668), a ReLU in the place of SwiGLU's SiLU (ReLU Strikes Back, Mirzadeh et al. 2023,
https://arxiv.org/abs/2310.04564): columns of the down projection that meet a zero need neither be read nor multiplied.
"""

# Shape letters: B = batch, T = tokens, D = model width, I = width between.

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.swiglu import SwiGLU


class ReluMLP(Mixer):
    """down(relu(up x)).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
        bias: whether both layers have one.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias)

    @classmethod
    def from_config(cls, config: Any, *, bias: bool = False) -> Self:
        return cls(config.hidden_size, config.intermediate_size, bias)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        return self.down_proj(self.activations(x_BTD))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """What the down projection reads, (B, T, I)."""
        return F.relu(self.up_proj(x_BTD))


class SquaredReluMLP(ReluMLP):
    """down(relu(up x)^2)."""

    def activations(self, x_BTD: Tensor) -> Tensor:
        return F.relu(self.up_proj(x_BTD)).square()


class GeluMLP(ReluMLP):
    """down(gelu(up x)), with the exact GELU and with biases, as in BERT (Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415).
    """

    @classmethod
    def from_config(cls, config: Any, *, bias: bool = True) -> Self:
        return cls(config.hidden_size, config.intermediate_size, bias)

    def activations(self, x_BTD: Tensor) -> Tensor:
        return F.gelu(self.up_proj(x_BTD))


class ReluGLU(SwiGLU):
    """down(relu(gate x) * up x): SwiGLU's weights under SwiGLU's names, and zeros."""

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        return self.down_proj(self.activations(x_BTD))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """What the down projection reads, (B, T, I)."""
        gate, up = self.gate_up_proj(x_BTD).chunk(2, -1)
        return F.relu(gate) * up


@torch.no_grad()
def zeros_among_activations(layer: ReluMLP | ReluGLU, x_BTD: Tensor) -> float:
    """Fraction of what the down projection reads, for these inputs, that need not be multiplied."""
    return float((layer.activations(x_BTD) == 0).float().mean())
