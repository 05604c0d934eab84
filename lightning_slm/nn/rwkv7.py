"""RWKV-7 "Goose": a matrix memory that is written by a generalised delta rule (Peng et al. 2025,
https://arxiv.org/abs/2503.14456).
"""

# Shape letters: B = batch, T = tokens of this call, D = model width, H = heads, d = width of a head, R = rank.

import functools
import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.delta_scan import delta_scan
from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.token_shift import interpolate, last_token, previous_tokens

_DEPTH = 0.5  # first values depend on how deep a layer lies, from 0 to 1; a mixer does not know: the middle for all
_FASTEST = -math.exp(-0.5)  # log of the smallest decay
_NORM_EPS = 64e-5


class RWKV7(Mixer):
    """Reads from, decays, corrects and writes to a memory of d x d numbers for each head.

    Every token makes, channel by channel and each from its own mixture of itself and the one before: what it reads
    with (r), a key and a value, a decay w, a direction to remove (from the key) with a rate a, and a gate g. Values are
    mixed with those of the first RWKV-7 layer, ``rwkv7_first``.

    Args:
        hidden_size: width of input and output.
        num_heads: H.
        decay_rank: rank of what makes w.
        rate_rank: of what makes a.
        value_rank: of what says how much of the first layer's value is taken; None: nothing is, this is the first.
        gate_rank: of what makes g.
    """

    cache_type: ClassVar[str] = "linear_attention"

    def __init__(
        self, hidden_size: int, num_heads: int, decay_rank: int, rate_rank: int, value_rank: int | None, gate_rank: int
    ) -> None:
        super().__init__()
        D = hidden_size
        self.num_heads = num_heads
        self.receptance = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.decay = LowRank(D, decay_rank, nn.Tanh())
        self.rate = LowRank(D, rate_rank)
        self.value_share = None if value_rank is None else LowRank(D, value_rank)
        self.gate = LowRank(D, gate_rank, nn.Sigmoid())
        self.norm = nn.GroupNorm(num_heads, D, eps=_NORM_EPS)
        self.x_r, self.x_w, self.x_k = _parameter(D), _parameter(D), _parameter(D)
        self.x_v, self.x_a, self.x_g = _parameter(D), _parameter(D), _parameter(D)
        self.w0, self.a0 = _parameter(D), _parameter(D)
        self.k_k, self.k_a, self.r_k = _parameter(D), _parameter(D), _parameter(D)
        self.v0 = None if value_rank is None else _parameter(D)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
    ) -> Self:
        tokens = [block.token.name for block in config.blocks if block.token is not None]
        if "rwkv7_first" not in tokens[: tokens.index("rwkv7")]:
            raise ValueError(
                f"pattern {config.pattern!r}: 'rwkv7' mixes values of the first RWKV-7 layer into its own; let that be "
                "'rwkv7_first', as in 'rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn*11'."
            )
        decay_rank, rate_rank, gate_rank = _ranks(config, decay_rank, rate_rank, gate_rank)
        value_rank = value_rank or _rank(1.7 * config.hidden_size**0.5)
        return cls(config.hidden_size, config.num_attention_heads, decay_rank, rate_rank, value_rank, gate_rank)

    def init_weights_(self, config: Any) -> None:
        """The authors' spreads over the channels; the first ones look back more than the last."""
        D, d = len(self.w0), len(self.w0) // self.num_heads
        channel_D = torch.arange(D)
        line_D = channel_D / max(D - 1, 1)
        zigzag_D = (channel_D % d - (d - 1) / 2) / max((d - 1) / 2, 1)
        zigzag_D = zigzag_D * zigzag_D.abs()
        powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        for name, power in powers.items():
            set_(getattr(self, name), 1 - (channel_D / D) ** (power * (1 - _DEPTH)))
        set_(self.w0, -5.5 + 6 * line_D ** (1 + _DEPTH**0.3) + 2.5 * zigzag_D)
        set_(self.a0, -0.19 + 0.3 * zigzag_D + 0.4 * (line_D - 0.5))
        if self.v0 is not None:
            set_(self.v0, 0.73 - 0.4 * (line_D - 0.5))
        set_(self.k_k, 0.71 - 0.1 * (line_D - 0.5))
        set_(self.k_a, 1.02)
        set_(self.r_k, -0.04)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        kept = context.state(layer_idx)
        previous_BTD = previous_tokens(x_BTD, kept.get("rwkv_shift"), context.starts_BT)
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        for_r, for_w, for_k, for_v, for_a, for_g = interpolate(x_BTD, previous_BTD, *mixes)
        r, k, v = self._heads(self.receptance(for_r)), self.key(for_k), self._value(for_v, context)
        log_w = self._heads(_FASTEST * torch.sigmoid(self.w0 + self.decay(for_w).float()))
        a = torch.sigmoid(self.a0 + self.rate(for_a).float())
        removed = F.normalize(self._heads(k * self.k_k).float(), dim=-1)
        k, v = self._heads(k * (1 + (a - 1) * self.k_a)), self._heads(v)
        y_BTHd, state_BHdd = delta_scan(
            r, log_w, k, v, -removed, removed * self._heads(a), kept.get("delta"), context.starts_BT
        )
        if context.cache is not None:
            context.keep(layer_idx, rwkv_shift=last_token(x_BTD), delta=state_BHdd.detach())
        y_BTD = self.norm(y_BTHd.flatten(0, 1).flatten(1)).view(x_BTD.shape)
        own_BTH1 = (r * k * self.r_k.view(self.num_heads, -1)).sum(-1, keepdim=True)
        return self.output((y_BTD + (own_BTH1 * v).flatten(2)) * self.gate(for_g))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, -1))

    def _value(self, x_BTD: Tensor, context: Context) -> Tensor:
        v_BTD = self.value(x_BTD)
        if self.value_share is None:
            context.shared["rwkv7_value"] = v_BTD
            return v_BTD
        if "reversible" in context.shared:
            raise ValueError("reversible=True runs layers backwards one by one; 'rwkv7' needs the first one's values.")
        first_BTD = context.shared["rwkv7_value"]
        return torch.lerp(v_BTD, first_BTD, torch.sigmoid(self.v0 + self.value_share(x_BTD)).to(v_BTD.dtype))

    def flops_per_token(self, context: int) -> int:
        """Its matrices, and 9 for each element of the memory: decay 1, look-up 2, two changes 4, reading 2."""
        matrices = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * matrices + 9 * len(self.w0) ** 2 // self.num_heads


class RWKV7First(RWKV7):
    """The first RWKV-7 layer of a model: its values are its own, and later layers take them, too."""

    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        config: Any,
        *,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        gate_rank: int | None = None,
    ) -> Self:
        decay_rank, rate_rank, gate_rank = _ranks(config, decay_rank, rate_rank, gate_rank)
        return cls(config.hidden_size, config.num_attention_heads, decay_rank, rate_rank, None, gate_rank)


class LowRank(nn.Module):
    """up(f(down(x))).

    Args:
        size: width of input and output.
        rank: width between.
        between: f.
    """

    def __init__(self, size: int, rank: int, between: nn.Module | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.between = nn.Identity() if between is None else between
        self.up = nn.Linear(rank, size, bias=False)
        self.up.init_weights_ = functools.partial(init_up_, self.up)  # type: ignore[assignment]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.up(self.between(self.down(x_BTD)))


class RWKV7FFN(Mixer):
    """value(relu(key(x_k))^2), with x_k mixed of a token and the one before.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
    """

    cache_type: ClassVar[str] = "linear_attention"

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.x_k = _parameter(hidden_size)
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(config.hidden_size, config.intermediate_size)

    def init_weights_(self, config: Any) -> None:
        """As in the token mixer."""
        D = len(self.x_k)
        set_(self.x_k, 1 - (torch.arange(D) / D) ** ((1 - _DEPTH) ** 4))

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        before_B1D = context.state(layer_idx).get("rwkv_ffn_shift")
        (x_k,) = interpolate(x_BTD, previous_tokens(x_BTD, before_B1D, context.starts_BT), self.x_k)
        if context.cache is not None:
            context.keep(layer_idx, rwkv_ffn_shift=last_token(x_BTD))
        return self.value(torch.relu(self.key(x_k)).square())


def init_up_(linear: nn.Linear, config: Any) -> None:
    """Orthogonal and small."""
    gain = 0.1 * max(1, linear.out_features / linear.in_features) ** 0.5
    set_(linear.weight, nn.init.orthogonal_(torch.empty(linear.weight.shape), gain=gain))


def _ranks(config: Any, decay: int | None, rate: int | None, gate: int | None) -> tuple[int, int, int]:
    """As given, else as the authors suggest."""
    D, H = config.hidden_size, config.num_attention_heads
    if D % H:
        raise ValueError(f"rwkv7: hidden_size={D} must be a multiple of num_attention_heads={H}, its heads.")
    root = D**0.5
    return decay or _rank(2.5 * root), rate or _rank(2.5 * root), gate or _rank(5 * root)


def _rank(suggested: float) -> int:
    """In whole thirty-twos."""
    return max(32, round(suggested / 32) * 32)


def _parameter(size: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(size))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
