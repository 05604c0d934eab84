"""Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) with rotary positions, over
everything or over a sliding window.
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width, W = window,
# H = query heads, K = key-value heads, d = head width, n = windows after the first.

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rope import rotate


class Attention(Mixer):
    """Attention through PyTorch's fused kernel; queries, keys and values are one matrix product.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
    """

    bidirectional: ClassVar[bool] = True
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
        q, k, v = self.project(x_BTD, context)
        if context.cache is not None:
            k, v = context.cache.update(k, v, layer_idx)
        return self.o_proj(self.look(q, k, v, context).transpose(1, 2).reshape(B, T, -1))

    def project(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) of these tokens, turned to their positions."""
        B, T, _ = x_BTD.shape
        H, K, d = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = self.qkv_proj(x_BTD).view(B, T, H + 2 * K, d).transpose(1, 2).split((H + K, K), 1)
        if context.rope is not None:
            qk = rotate(qk, *context.rope)
        q, k = qk.split((H, K), 1)
        return q, k, v.contiguous()  # a view would keep all of qkv alive until the backward pass

    def look(self, q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, context: Context) -> Tensor:
        """What the queries find, (B, H, T, d)."""
        mask, grouped = context.masks.get("full_attention"), q_BHTd.shape[1] != k_BKSd.shape[1]
        causal = context.causal and mask is None and q_BHTd.shape[2] > 1
        return F.scaled_dot_product_attention(q_BHTd, k_BKSd, v_BKSd, mask, is_causal=causal, enable_gqa=grouped)


class SlidingWindowAttention(Attention):
    """The same, looking back at the last ``window`` tokens only (Beltagy et al. 2020,
    https://arxiv.org/abs/2004.05150); the cache forgets what lies behind the window.

    Args:
        window: tokens that a token looks at, itself included.
    """

    bidirectional: ClassVar[bool] = False
    refusal: ClassVar[str] = "its window looks back only; 'longformer' looks both ways"
    cache_type: ClassVar[str] = "sliding_attention"

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        self.window = window

    @classmethod
    def from_config(cls, config: Any) -> Self:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*sizes, config.sliding_window)

    def look(self, q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, context: Context) -> Tensor:
        mask, T = context.masks.get("sliding_attention"), q_BHTd.shape[2]
        if mask is None and T > 1:
            return windowed_attention(q_BHTd, k_BKSd, v_BKSd, self.window, context.segments_BT)
        grouped = q_BHTd.shape[1] != k_BKSd.shape[1]
        return F.scaled_dot_product_attention(q_BHTd, k_BKSd, v_BKSd, mask, enable_gqa=grouped)


def windowed_attention(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, window: int, segments_BT: Tensor | None = None
) -> Tensor:
    """Causal attention over the last ``window`` tokens, in time and memory proportional to T: the tokens are folded
    into blocks as long as the window, and each looks at its own block and the one before.

    Args:
        segments_BT: tokens of other numbers are not seen.
    """
    B, H, T, d = q_BHTd.shape
    K, W, grouped = k_BKTd.shape[1], window, k_BKTd.shape[1] != H
    same = None if segments_BT is None else segments_BT[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)

    first = slice(0, min(T, W))
    mask = None
    if same is not None:
        near = torch.ones(first.stop, first.stop, dtype=torch.bool, device=q_BHTd.device).tril()
        mask = near & (same[..., first, None] == same[..., None, first])
    y_BHTd = attend(q_BHTd[:, :, first], k_BKTd[:, :, first], v_BKTd[:, :, first], mask)
    if T <= W:
        return y_BHTd

    n = -(-T // W) - 1
    more = (n + 1) * W - T

    def fold(x: Tensor, heads: int) -> Tensor:  # the blocks after the first: (B * n, heads, W, d)
        x = F.pad(x, (0, 0, 0, more))[:, :, W:]
        return x.reshape(B, heads, n, W, d).transpose(1, 2).reshape(B * n, heads, W, d)

    def fold_with_previous(x: Tensor) -> Tensor:  # (B * n, K, 2 W, d)
        blocks = F.pad(x, (0, 0, 0, more)).reshape(B, K, n + 1, W, d)
        both = torch.cat((blocks[:, :, :-1], blocks[:, :, 1:]), 3)
        return both.transpose(1, 2).reshape(B * n, K, 2 * W, d)

    distance = torch.arange(W, device=q_BHTd.device)[:, None] + W - torch.arange(2 * W, device=q_BHTd.device)
    mask = (distance >= 0) & (distance < W)
    if segments_BT is not None:
        blocks = F.pad(segments_BT, (0, more), value=-1).view(B, n + 1, W)
        both = torch.cat((blocks[:, :-1], blocks[:, 1:]), 2)
        mask = mask & (blocks[:, 1:, :, None] == both[:, :, None]).view(B * n, 1, W, 2 * W)
    y = attend(fold(q_BHTd, H), fold_with_previous(k_BKTd), fold_with_previous(v_BKTd), mask)
    y = y.view(B, n, H, W, d).transpose(1, 2).reshape(B, H, n * W, d)
    return torch.cat((y_BHTd, y[:, :, : T - W]), 2)


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
