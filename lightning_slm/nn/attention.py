"""Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) with rotary positions, over
everything or over a sliding window.
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width, W = window,
# M = meta tokens, H = query heads, K = key-value heads, d = head width (v: of values), n = windows after the first.

from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.meta_tokens import apart, together
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
        return look_at_all(q_BHTd, k_BKSd, v_BKSd, context)


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

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.project(x_BTD, context)
        y_BHTd = look_back(q, remember(k, v, context, layer_idx), context, self.window)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))


def attend(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSv: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's fused kernel, (B, H, T, v). It wants keys as wide as values: narrower ones are filled up with zeros."""
    grouped, wider, scale = q_BHTd.shape[1] != k_BKSd.shape[1], v_BKSv.shape[-1] - q_BHTd.shape[-1], None
    if wider > 0 and q_BHTd.shape[2] > 1:
        scale = q_BHTd.shape[-1] ** -0.5
        q_BHTd, k_BKSd = F.pad(q_BHTd, (0, wider)), F.pad(k_BKSd, (0, wider))
    return F.scaled_dot_product_attention(
        q_BHTd, k_BKSd, v_BKSv, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def look_at_all(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSv: Tensor, context: Context) -> Tensor:
    """Attention to everything that the context allows, (B, H, T, v)."""
    mask = context.masks.get("full_attention")
    return attend(q_BHTd, k_BKSd, v_BKSv, mask, context.causal and mask is None and q_BHTd.shape[2] > 1)


class Seen(NamedTuple):
    """Keys and values to look back at; those of meta tokens apart, for they stay when the window has moved on."""

    k_BKSd: Tensor
    v_BKSv: Tensor
    meta: tuple[Tensor, Tensor] | None


def remember(k_BKTd: Tensor, v_BKTv: Tensor, context: Context, layer_idx: int) -> Seen:
    """These keys and values and those of earlier calls. Meta tokens are kept as states, not in the rolling cache."""
    meta: tuple[Tensor, Tensor] | None = None
    if context.meta:
        (k_meta, k_BKTd), (v_meta, v_BKTv) = (apart(t, context.meta, context.meta_at_B, 2) for t in (k_BKTd, v_BKTv))
        if context.cache is not None:  # a view would keep the whole prompt
            context.keep(layer_idx, meta_keys=k_meta.clone(), meta_values=v_meta.clone())
        meta = (k_meta, v_meta)
    elif "meta_keys" in (state := context.state(layer_idx)):
        meta = (state["meta_keys"], state["meta_values"])
    if context.cache is not None:
        k_BKTd, v_BKTv = context.cache.update(k_BKTd, v_BKTv, layer_idx)
    return Seen(k_BKTd, v_BKTv, meta)


def look_back(q_BHTd: Tensor, seen: Seen, context: Context, window: int) -> Tensor:
    """Attention to the last ``window`` tokens and to the meta tokens, (B, H, T, v); these see those before them."""
    if not context.meta:
        return _look_back(q_BHTd, seen, context.masks.get("sliding_attention"), context.segments_BT, window)
    assert seen.meta is not None
    M, at_B, segments_BT = context.meta, context.meta_at_B, context.segments_BT
    q_meta, q_BHTd = apart(q_BHTd, M, at_B, 2)
    if segments_BT is not None:
        segments_BT = apart(segments_BT, M, at_B)[1]
    y_BHTv = _look_back(q_BHTd, seen, context.masks.get("sliding_attention"), segments_BT, window)
    return together(attend(q_meta, *seen.meta, causal=True), y_BHTv, at_B, 2)


def _look_back(q_BHTd: Tensor, seen: Seen, mask: Tensor | None, segments_BT: Tensor | None, window: int) -> Tensor:
    k, v, meta = seen
    if mask is None and q_BHTd.shape[2] > 1:
        return windowed_attention(q_BHTd, k, v, window, segments_BT, meta)
    return _attend_with(meta, q_BHTd, k, v, mask)


def _attend_with(
    meta: tuple[Tensor, Tensor] | None, q_BHTd: Tensor, k_BKSd: Tensor, v_BKSv: Tensor, mask: Tensor | None
) -> Tensor:
    """``attend``, also to tokens that are always seen; where rows are several blocks of a text, by each of them."""
    if meta is None:
        return attend(q_BHTd, k_BKSd, v_BKSv, mask)
    blocks, M = len(q_BHTd) // len(meta[0]), meta[0].shape[2]
    k, v = (
        torch.cat((m.repeat_interleave(blocks, 0) if blocks > 1 else m, t), 2) for m, t in zip(meta, (k_BKSd, v_BKSv))
    )
    if mask is not None:
        mask = F.pad(mask, (M, 0), value=mask.dtype == torch.bool)  # visible: True, or nothing added
    return attend(q_BHTd, k, v, mask)


def windowed_attention(
    q_BHTd: Tensor,
    k_BKTd: Tensor,
    v_BKTv: Tensor,
    window: int,
    segments_BT: Tensor | None = None,
    meta: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention over the last ``window`` tokens, in time and memory proportional to T: the tokens are folded
    into blocks as long as the window, and each looks at its own block and the one before.

    Args:
        segments_BT: tokens of other numbers are not seen.
        meta: keys (B, K, M, d) and values of tokens that all see.
    """
    B, H, T, _ = q_BHTd.shape
    K, W = k_BKTd.shape[1], window
    same = None if segments_BT is None else segments_BT[:, None]

    first = slice(0, min(T, W))
    parts = (q_BHTd[:, :, first], k_BKTd[:, :, first], v_BKTv[:, :, first])
    if same is None and meta is None:
        y_BHTv = attend(*parts, causal=True)
    else:
        mask = torch.ones(first.stop, first.stop, dtype=torch.bool, device=q_BHTd.device).tril()
        if same is not None:
            mask = mask & (same[..., first, None] == same[..., None, first])
        y_BHTv = _attend_with(meta, *parts, mask)
    if T <= W:
        return y_BHTv

    n = -(-T // W) - 1
    more = (n + 1) * W - T

    def fold(x: Tensor, heads: int) -> Tensor:  # the blocks after the first: (B * n, heads, W, d)
        x = F.pad(x, (0, 0, 0, more))[:, :, W:]
        return x.reshape(B, heads, n, W, -1).transpose(1, 2).reshape(B * n, heads, W, -1)

    def fold_with_previous(x: Tensor) -> Tensor:  # (B * n, K, 2 W, d)
        blocks = F.pad(x, (0, 0, 0, more)).reshape(B, K, n + 1, W, -1)
        both = torch.cat((blocks[:, :, :-1], blocks[:, :, 1:]), 3)
        return both.transpose(1, 2).reshape(B * n, K, 2 * W, -1)

    distance = torch.arange(W, device=q_BHTd.device)[:, None] + W - torch.arange(2 * W, device=q_BHTd.device)
    mask = (distance >= 0) & (distance < W)
    if segments_BT is not None:
        blocks = F.pad(segments_BT, (0, more), value=-1).view(B, n + 1, W)
        both = torch.cat((blocks[:, :-1], blocks[:, 1:]), 2)
        mask = mask & (blocks[:, 1:, :, None] == both[:, :, None]).view(B * n, 1, W, 2 * W)
    y = _attend_with(meta, fold(q_BHTd, H), fold_with_previous(k_BKTd), fold_with_previous(v_BKTv), mask)
    y = y.view(B, n, H, W, -1).transpose(1, 2).reshape(B, H, n * W, -1)
    return torch.cat((y_BHTv, y[:, :, : T - W]), 2)


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
