"""Mamba: selective state spaces (Gu & Dao 2023, https://arxiv.org/abs/2312.00752)."""

# Shape letters: B = batch, T = tokens of this call, D = model width, C = channels, N = states of a channel, R = rank of
# the time step's projection, W = taps of the convolution.

import functools
import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.rms_norm import RMSNorm
from lightning_slm.nn.selective_scan import selective_scan
from lightning_slm.nn.short_conv import ShortConv

SHORTEST_STEP, LONGEST_STEP, STEP_FLOOR = 1e-3, 0.1, 1e-4  # first time steps are drawn between the first two


class SelectiveSSM(nn.Module):
    """The core of Mamba, (B, T, C) to (B, T, C): short convolution, silu, and a scan whose time step, input and output
    weights depend on the token. What stands around it (projections in and out) is its owner's.

    Args:
        channels: C.
        state_size: N.
        conv_size: W, the token's own included.
        dt_rank: R.
        norms: whether the time step's inputs, B and C each pass an RMSNorm (Jamba, Hymba): ``dt_norm``, ``b_norm``,
            ``c_norm``.
        eps: of these norms.
        conv_bias: whether the convolution has a bias.
    """

    _slm_protected = ("A_log",)

    def __init__(
        self,
        channels: int,
        state_size: int = 16,
        conv_size: int = 4,
        dt_rank: int = 16,
        *,
        norms: bool = False,
        eps: float = 1e-6,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.dt_rank, self.ssm_state_size = dt_rank, state_size
        self.conv = ShortConv(channels, conv_size, conv_bias)
        self.x_proj = nn.Linear(channels, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.dt_proj.init_weights_ = functools.partial(init_time_step_, self.dt_proj)  # type: ignore[assignment]
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.dt_norm = RMSNorm(dt_rank, eps) if norms else None
        self.b_norm = RMSNorm(state_size, eps) if norms else None
        self.c_norm = RMSNorm(state_size, eps) if norms else None
        for p in (self.dt_proj.bias, self.A_log, self.D):
            p._no_weight_decay = True  # type: ignore[attr-defined]

    def init_weights_(self, config: Any = None) -> None:
        """Decay rates 1 to N in every channel (S4D-real), and a skip of one."""
        set_(self.A_log, torch.arange(1.0, self.ssm_state_size + 1).log().expand_as(self.A_log))
        set_(self.D, 1.0)

    def forward(self, u_BTC: Tensor, context: Context, layer_idx: int, gate_BTC: Tensor | None = None) -> Tensor:
        """The scan's output, times silu(gate) where one is given, (B, T, C).

        States ``conv`` (B, W - 1, C) and ``ssm`` (B, N, C) are kept in the context.
        """
        state, starts_BT = context.state(layer_idx), context.starts_BT
        if u_BTC.shape[1] == 1 and "ssm" in state:
            y_BTC, conv_BWC, h_BNC = self.step(u_BTC, state["conv"], state["ssm"], starts_BT)
            y_BTC = y_BTC if gate_BTC is None else y_BTC * F.silu(gate_BTC)
        else:
            u_BTC, conv_BWC = self.conv.silu(u_BTC, state.get("conv"), context.segments_BT)
            A_CN = -torch.exp(_precise(self.A_log))
            how = (*self.select(u_BTC), self.D, gate_BTC, state.get("ssm"), starts_BT)
            y_BTC, h_BNC = selective_scan(u_BTC, how[0], A_CN, *how[1:])
        context.keep(layer_idx, conv=conv_BWC.detach(), ssm=h_BNC.detach())
        return y_BTC

    def select(self, u_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What tokens choose: time steps before softplus (B, T, C), weights into and out of the states (B, T, N)."""
        R, N = self.dt_rank, self.ssm_state_size
        dt_BTR, b_BTN, c_BTN = self.x_proj(u_BTC).split((R, N, N), -1)
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            dt_BTR, b_BTN, c_BTN = self.dt_norm(dt_BTR), self.b_norm(b_BTN), self.c_norm(c_BTN)
        with torch.autocast(u_BTC.device.type, enabled=False):  # bfloat16 would round the bias by percents of the step
            dt_BTC = self.dt_proj(dt_BTR.to(self.dt_proj.bias.dtype))
        return dt_BTC, b_BTN, c_BTN

    def step(
        self, u_B1C: Tensor, conv_BWC: Tensor, h_BNC: Tensor, starts_B1: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token: output without gate (B, 1, C), and the states after it."""
        if starts_B1 is not None:
            conv_BWC, h_BNC = (t.masked_fill(starts_B1.unsqueeze(-1), 0) for t in (conv_BWC, h_BNC))
        window_BWC = torch.cat((conv_BWC.to(u_B1C.dtype), u_B1C), 1)
        u_B1C = (window_BWC * self.conv.weight.t()).sum(1, keepdim=True)
        u_B1C = F.silu(u_B1C if self.conv.bias is None else u_B1C + self.conv.bias).to(window_BWC.dtype)
        dt_B1C, b_B1N, c_B1N = self.select(u_B1C)
        u, b_BN1, c_B1N = (t.to(h_BNC.dtype) for t in (u_B1C, b_B1N.mT, c_B1N))
        delta_B1C = F.softplus(dt_B1C.to(h_BNC.dtype))
        h_BNC = torch.exp(delta_B1C * -torch.exp(self.A_log.t().to(h_BNC.dtype))) * h_BNC + b_BN1 * (delta_B1C * u)
        y_B1C = (c_B1N.mT * h_BNC).sum(1, keepdim=True) + self.D * u
        return y_B1C.to(u_B1C.dtype), window_BWC[:, 1:], h_BNC


class Mamba(Mixer):
    """out_proj(ssm(u) * silu(z)) with [u, z] = in_proj(x).

    Args:
        hidden_size: width of input and output.
        channels: width between; the other arguments are those of `SelectiveSSM`.
    """

    cache_type: ClassVar[str] = "linear_attention"

    def __init__(self, hidden_size: int, channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=False)
        self.ssm = SelectiveSSM(channels, *args, **kwargs)
        self.out_proj = nn.Linear(channels, hidden_size, bias=False)
        self.out_proj.init_weights_ = functools.partial(init_output_, self.out_proj)  # type: ignore[assignment]

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        state_size: int = 16,
        conv_size: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        norms: bool = False,
        conv_bias: bool = True,
    ) -> Self:
        """Options of ``SLMConfig(mixers={"mamba": {...}})``.

        Args:
            state_size: N, numbers that each channel remembers.
            conv_size: W, tokens that the convolution sees, the own included.
            expand: channels for each number of the model's width.
            dt_rank: numbers that a token's time steps are made from; None: a sixteenth of the width, rounded up.
            norms: whether time step, B and C each pass an RMSNorm first (Jamba, Hymba).
            conv_bias: whether the convolution has a bias.
        """
        channels = round(expand * config.hidden_size)
        if channels < 1 or not math.isclose(channels, expand * config.hidden_size):
            raise ValueError(
                f"mamba: expand={expand} times hidden_size={config.hidden_size} is no whole number of channels; "
                "choose an expand that makes one."
            )
        for name, size in (("state_size", state_size), ("conv_size", conv_size), ("dt_rank", dt_rank)):
            if size is not None and size < (least := 2 if name == "conv_size" else 1):
                raise ValueError(f"mamba: {name}={size} must be at least {least}.")
        rank = math.ceil(config.hidden_size / 16) if dt_rank is None else dt_rank
        how = {"norms": norms, "eps": config.rms_norm_eps, "conv_bias": conv_bias}
        return cls(config.hidden_size, channels, state_size, conv_size, rank, **how)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        channels = self.out_proj.in_features
        return {"in_proj": (channels, channels)}

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        u_BTC, gate_BTC = self.in_proj(x_BTD).chunk(2, -1)
        return self.out_proj(self.ssm(u_BTC, context, layer_idx, gate_BTC))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def init_time_step_(linear: nn.Linear, config: Any = None) -> None:
    """First time steps softplus(bias) drawn log-uniformly, moved by inputs of size one to weights of size R^-1/2."""
    bound = linear.in_features**-0.5
    low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
    step_C = torch.empty(linear.out_features).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
    set_(linear.weight, torch.empty(linear.weight.shape).uniform_(-bound, bound))
    set_(linear.bias, step_C + torch.log(-torch.expm1(-step_C)))  # the inverse of softplus


def init_output_(linear: nn.Linear, config: Any) -> None:
    """As ``nn.Linear``'s own, smaller by the root of the number of layers that add to the residual stream."""
    bound = linear.in_features**-0.5 / config.num_hidden_layers**0.5
    set_(linear.weight, torch.empty(linear.weight.shape).uniform_(-bound, bound))
