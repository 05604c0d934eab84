"""Hymba (Dong et al. 2024, https://arxiv.org/abs/2411.13676): attention and a selective state space side by side in one
layer, fed by one projection:

    q, k, v, u, gate = in_proj(x)
    y = out_proj((norm(attention(q, k, v)) + norm(ssm(u) * silu(gate))) / 2)

Attention looks at everything in a few layers and back over a window in the others, and neighbouring layers may share
keys and values. Meta tokens, the third part of Hymba, are ``SLMConfig(meta_tokens=128)``.
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width, C = channels of the state
# space, H = query heads, K = key-value heads, d = width of a query and a key, v = C / H = width of a value, W = window,
# N = states of a channel.

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.attention import Seen, look_at_all, look_back, remember
from lightning_slm.nn.mamba import SelectiveSSM
from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rms_norm import RMSNorm
from lightning_slm.nn.rope import rotate
from lightning_slm.nn.selective_scan import naive_selective_scan
from lightning_slm.nn.short_conv import naive_short_conv


class Hymba(Mixer):
    """Attention to everything and a state space. Their outputs are equally wide, for values are wider than keys.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: K, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: d.
        channels: C, a multiple of H.
        window: W; None: everything.
        eps: of the norms.
        lends: whether a later layer takes this one's keys and values.
        ssm: state_size, conv_size and dt_rank of `SelectiveSSM`.
    """

    cache_type: ClassVar[str] = "hybrid"
    reach: ClassVar[str] = "hymba"  # the name of those that keys and values are taken from
    reuses: ClassVar[bool] = False  # keys and values of the nearest earlier layer of this reach that has its own

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        channels: int,
        window: int | None = None,
        eps: float = 1e-6,
        lends: bool = False,
        **ssm: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.channels, self.v_head_dim, self.window, self.lends = channels, channels // num_heads, window, lends
        own = 0 if self.reuses else num_kv_heads
        self.rows = (num_heads * head_dim, own * head_dim, own * self.v_head_dim, channels, channels)
        self.in_proj = nn.Linear(hidden_size, sum(self.rows), bias=False)
        self.ssm = SelectiveSSM(channels, norms=True, eps=eps, **ssm)
        self.attention_norm = RMSNorm(channels, eps)
        self.ssm_norm = RMSNorm(channels, eps)
        self.out_proj = nn.Linear(channels, hidden_size, bias=False)

    @classmethod
    def from_config(
        cls, config: Any, *, expand: float = 2, state_size: int = 16, conv_size: int = 4, dt_rank: int | None = None
    ) -> Self:
        """Options of ``SLMConfig(mixers={"hymba": {...}})``, and of its other names.

        Args:
            expand: channels of the state space, and width of all values together, for each number of the model's width.
            state_size: N, numbers that each channel remembers.
            conv_size: tokens that the short convolution sees, the own included.
            dt_rank: numbers that a token's time steps are made from; None: a sixteenth of the width, rounded up.
        """
        channels, heads = expand * config.hidden_size, config.num_attention_heads
        if channels < heads or channels % heads:
            raise ValueError(
                f"hymba: expand={expand} times hidden_size={config.hidden_size} must be a multiple of "
                f"num_attention_heads={heads}: attention's output is as wide as the state space's."
            )
        for name, size in (("state_size", state_size), ("conv_size", conv_size), ("dt_rank", dt_rank)):
            if size is not None and size < (least := 2 if name == "conv_size" else 1):
                raise ValueError(f"hymba: {name}={size} must be at least {least}.")
        tokens = [block.token.name for block in config.blocks if block.token is not None]
        if cls.reuses:
            cls._check_lender(config, tokens, expand)
        rank = math.ceil(config.hidden_size / 16) if dt_rank is None else dt_rank
        return cls(
            config.hidden_size,
            heads,
            config.num_key_value_heads,
            config.head_dim,
            int(channels),
            config.sliding_window if cls.reach == "hymba_swa" else None,
            config.rms_norm_eps,
            f"{cls.reach}_reuse" in tokens,
            state_size=state_size,
            conv_size=conv_size,
            dt_rank=rank,
        )

    @classmethod
    def _check_lender(cls, config: Any, tokens: list[str], expand: float) -> None:
        if cls.reach not in tokens[: tokens.index(f"{cls.reach}_reuse")]:
            raise ValueError(
                f"pattern {config.pattern!r}: '{cls.reach}_reuse' takes keys and values from an earlier "
                f"'{cls.reach}', and there is none."
            )
        if expand != config.options(cls.reach).get("expand", 2):
            raise ValueError(
                f"mixers: '{cls.reach}_reuse' has expand={expand}, but must have that of '{cls.reach}', whose values "
                "it takes."
            )

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"in_proj": tuple(rows for rows in self.rows if rows)}

    def flops_per_token(self, context: int) -> int:
        """Meta tokens aside."""
        linears = (self.in_proj, self.out_proj, self.ssm.x_proj, self.ssm.dt_proj)
        weights = sum(2 * linear.in_features * linear.out_features for linear in linears)
        looks = min(context, self.window or context)
        attention = 2 * self.num_heads * (self.head_dim + self.v_head_dim) * looks
        return weights + 2 * self.ssm.conv.weight.numel() + 6 * self.ssm.A_log.numel() + attention

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v, u_BTC, gate_BTC = self.in_proj(x_BTD).split(self.rows, -1)
        found_BHTv = self.attention(q, k, v, context, layer_idx)
        found_BTC = self.attention_norm(found_BHTv.transpose(1, 2).reshape(B, T, -1))
        summary_BTC = self.ssm_norm(self.ssm(u_BTC, context, layer_idx, gate_BTC))
        return self.out_proj((found_BTC + summary_BTC) / 2)

    def attention(self, q_BTR: Tensor, k_BTR: Tensor, v_BTR: Tensor, context: Context, layer_idx: int) -> Tensor:
        """What the queries find, (B, H, T, v); R: all heads side by side."""
        q = self._heads(q_BTR, self.head_dim, context)
        if self.reuses:
            find = _find_outside if context.cache is None else _find
            return self.look(q, find(context.shared, self.reach, layer_idx), context)
        k = self._heads(k_BTR, self.head_dim, context)
        v = v_BTR.unflatten(-1, (-1, self.v_head_dim)).transpose(1, 2).contiguous()
        seen = self.remember(k, v, context, layer_idx)
        if self.lends:
            (_leave_outside if context.cache is None else _leave)(context.shared, self.reach, layer_idx, seen)
        return self.look(q, seen, context)

    def _heads(self, x_BTR: Tensor, width: int, context: Context) -> Tensor:
        x_BHTd = x_BTR.unflatten(-1, (-1, width)).transpose(1, 2)
        return x_BHTd if context.rope is None else rotate(x_BHTd, *context.rope)

    def remember(self, k_BKTd: Tensor, v_BKTv: Tensor, context: Context, layer_idx: int) -> Seen:
        """These keys and values, and those of earlier calls."""
        if context.cache is not None:
            k_BKTd, v_BKTv = context.cache.update(k_BKTd, v_BKTv, layer_idx)
        return Seen(k_BKTd, v_BKTv, None)

    def look(self, q_BHTd: Tensor, seen: Seen, context: Context) -> Tensor:
        """Attention, (B, H, T, v)."""
        return look_at_all(q_BHTd, seen.k_BKSd, seen.v_BKSv, context)


class HymbaReuse(Hymba):
    """The same with keys and values of an earlier layer: no weights for them, and no cache."""

    cache_type: ClassVar[str] = "linear_attention"
    reuses: ClassVar[bool] = True


class HymbaSliding(Hymba):
    """Attention to the last ``sliding_window`` tokens and the meta tokens, and a state space."""

    cache_type: ClassVar[str] = "hybrid_sliding"
    reach: ClassVar[str] = "hymba_swa"

    def remember(self, k_BKTd: Tensor, v_BKTv: Tensor, context: Context, layer_idx: int) -> Seen:
        return remember(k_BKTd, v_BKTv, context, layer_idx)

    def look(self, q_BHTd: Tensor, seen: Seen, context: Context) -> Tensor:
        assert self.window is not None
        return look_back(q_BHTd, seen, context, self.window)


class HymbaSlidingReuse(HymbaSliding):
    """The same with keys and values of an earlier layer: no weights for them, and no cache."""

    cache_type: ClassVar[str] = "linear_attention"
    reuses: ClassVar[bool] = True


def _leave(shared: dict[str, Any], reach: str, layer_idx: int, seen: Seen) -> None:
    shared[f"{reach}.{layer_idx}"] = seen


def _find(shared: dict[str, Any], reach: str, layer_idx: int) -> Seen:
    """Keys and values of the nearest earlier layer of this reach that has its own."""
    for earlier in range(layer_idx - 1, -1, -1):
        if (seen := shared.get(f"{reach}.{earlier}")) is not None:
            return seen
    raise ValueError(f"layer {layer_idx}: no earlier '{reach}' has left its keys and values.")


# In training, blocks are compiled one by one: code that knows its layer's number would be compiled for every layer.
_leave_outside, _find_outside = torch.compiler.disable(_leave), torch.compiler.disable(_find)


def naive_hymba(
    layer: Hymba,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    meta: int = 0,
    lent: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The twin: whole texts, part by part.

    Args:
        meta: how many of the first tokens all see, wherever their window is.
        lent: keys and values of an earlier layer.

    Returns: the output, and keys and values as later layers take them.
    """
    T, H, d = x_BTD.shape[1], layer.num_heads, layer.head_dim
    wq, wk, wv, wu, wgate = layer.in_proj.weight.split(layer.rows)

    def heads(weight: Tensor, width: int, turned: bool) -> Tensor:
        x_BHTd = torch.einsum("btd,rd->btr", x_BTD, weight).unflatten(-1, (-1, width)).transpose(1, 2)
        return rotate(x_BHTd, *rope) if turned and rope is not None else x_BHTd

    q, (k, v) = heads(wq, d, True), lent or (heads(wk, d, True), heads(wv, layer.v_head_dim, False))
    found = []
    for t in range(T):
        seen = [s for s in range(t + 1) if s < meta or layer.window is None or t - s < layer.window]
        k_seen, v_seen = (x[:, :, seen].repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        weights = (torch.einsum("bhd,bhsd->bhs", q[:, :, t], k_seen) / d**0.5).softmax(-1)
        found.append(torch.einsum("bhs,bhsv->bhv", weights, v_seen).flatten(1))

    def norm(x: Tensor, of: RMSNorm | None) -> Tensor:
        assert of is not None
        return x / (x.square().mean(-1, keepdim=True) + of.eps).sqrt() * of.weight

    ssm = layer.ssm
    u = F.silu(naive_short_conv(x_BTD @ wu.T, ssm.conv.weight, ssm.conv.bias))
    dt, b, c = (u @ ssm.x_proj.weight.T).split((ssm.dt_rank, ssm.ssm_state_size, ssm.ssm_state_size), -1)
    dt = norm(dt, ssm.dt_norm) @ ssm.dt_proj.weight.T + ssm.dt_proj.bias
    y, _ = naive_selective_scan(u, dt, -ssm.A_log.exp(), norm(b, ssm.b_norm), norm(c, ssm.c_norm), ssm.D)
    summary = y * F.silu(x_BTD @ wgate.T)
    both = norm(torch.stack(found, 1), layer.attention_norm) + norm(summary, layer.ssm_norm)
    return both / 2 @ layer.out_proj.weight.T, (k, v)
