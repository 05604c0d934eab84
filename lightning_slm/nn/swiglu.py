"""SwiGLU, the gated feed-forward layer (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

# Shape letters: B = batch, T = tokens, D = model width.

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer


class SwiGLU(Mixer):
    """down(silu(gate x) * up x), with gate and up as one matrix product.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(config.hidden_size, config.intermediate_size)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        width = self.down_proj.in_features
        return {"gate_up_proj": (width, width)}

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        gate, up = self.gate_up_proj(x_BTD).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)
