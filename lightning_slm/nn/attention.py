"""Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) with rotary positions."""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width,
# H = query heads, K = key-value heads, d = head width.

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rope import rotate


class Attention(Mixer):
    """Causal attention through PyTorch's fused kernel; queries, keys and values are one matrix product.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
    """

    cache_type: ClassVar[str] = "full_attention"

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        H, K, d = self.num_heads, self.num_kv_heads, self.head_dim
        return {"qkv_proj": (H * d, K * d, K * d)}

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        H, K, d = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = self.qkv_proj(x_BTD).view(B, T, H + 2 * K, d).transpose(1, 2).split((H + K, K), 1)
        q, k = rotate(qk, *context.rope).split((H, K), 1)
        v = v.contiguous()  # a view would keep all of qkv alive until the backward pass
        if context.cache is not None:
            k, v = context.cache.update(k, v, layer_idx)
        mask = context.masks.get(self.cache_type)
        y_BHTd = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=H != K)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, H * d))


class SlidingWindowAttention(Attention):
    """The same, looking back at the last ``config.sliding_window`` tokens only (Beltagy et al. 2020,
    https://arxiv.org/abs/2004.05150); the cache forgets what lies behind the window.
    """

    cache_type: ClassVar[str] = "sliding_attention"


def naive_attention(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, window: int | None = None) -> Tensor:
    """The twin of the fused kernel: causal attention of the last T of S tokens, written out in full.

    Args:
        window: how many tokens, the own included, a token looks at; None: all before it.
    """
    H, T, S, d = q_BHTd.shape[1], q_BHTd.shape[2], k_BKSd.shape[2], q_BHTd.shape[3]
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k_BKSd, v_BKSd))
    distance_TS = torch.arange(S - T, S)[:, None] - torch.arange(S)
    visible_TS = (distance_TS >= 0) & (distance_TS < (window or S))
    scores = (q_BHTd @ k.transpose(-1, -2) / d**0.5).masked_fill(~visible_TS, -torch.inf)
    return scores.softmax(-1) @ v
