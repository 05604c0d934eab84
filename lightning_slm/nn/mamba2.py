"""Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060): a selective state space with one decay per head."""

# Shape letters: B = batch, T = tokens of this call, D = model width, C = channels of the convolution (I + 2 G N),
# I = width inside (H P), H = heads, P = width of a head, G = groups of heads that share B and C, N = states of a
# channel, W = taps of the convolution.

import functools
import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.short_conv import ShortConv
from lightning_slm.nn.ssd import ssd, ssd_step

SHORTEST_STEP, LONGEST_STEP, STEP_FLOOR = 1e-3, 0.1, 1e-4  # first time steps are drawn between the first two
FASTEST_DECAY = 16.0  # first decay rates are drawn between 1 and this


class Mamba2(Mixer):
    """out_proj(norm(ssd(x, dt, A, B, C, D), z)): z, x, B, C and dt are one projection, and a short convolution with
    silu passes over x, B and C.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: P.
        state_size: N.
        groups: G.
        conv_size: W, the token's own included.
        chunk: tokens within which all pairs are looked at (see `lightning_slm.nn.ssd.ssd`).
        eps: of the norm.
        conv_bias: whether the convolution has a bias.
    """

    cache_type: ClassVar[str] = "linear_attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        state_size: int = 128,
        groups: int = 1,
        conv_size: int = 4,
        chunk: int = 64,
        eps: float = 1e-5,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.groups, self.chunk = num_heads, head_dim, groups, chunk
        self.ssm_state_size, self.intermediate_size = state_size, num_heads * head_dim
        self.in_proj = nn.Linear(hidden_size, sum(self.fused_rows()["in_proj"]), bias=False)
        self.conv = ShortConv(self.intermediate_size + 2 * groups * state_size, conv_size, conv_bias)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.norm = GatedRMSNorm(self.intermediate_size, groups, eps)
        self.out_proj = nn.Linear(self.intermediate_size, hidden_size, bias=False)
        self.out_proj.init_weights_ = functools.partial(init_output_, self.out_proj)  # type: ignore[assignment]
        for p in (self.A_log, self.D, self.dt_bias):
            p._no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        groups: int = 1,
        conv_size: int = 4,
        expand: float = 2,
        chunk: int = 64,
        conv_bias: bool = True,
    ) -> Self:
        heads = expand * config.hidden_size / head_dim
        if heads != int(heads) or heads < 1:
            raise ValueError(
                f"mamba2: head_dim={head_dim} must divide expand * hidden_size = {expand} * {config.hidden_size}; "
                "choose a head_dim that does."
            )
        if heads % groups:
            raise ValueError(
                f"mamba2: groups={groups} must divide the {int(heads)} heads (expand * hidden_size / head_dim)."
            )
        for name, value in (("state_size", state_size), ("conv_size", conv_size), ("chunk", chunk)):
            if value < 1 + (name == "conv_size"):
                raise ValueError(f"mamba2: {name}={value} must be at least {1 + (name == 'conv_size')}.")
        sizes = (config.hidden_size, int(heads), head_dim, state_size, groups, conv_size, chunk)
        return cls(*sizes, config.rms_norm_eps, conv_bias)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        inside, shared = self.intermediate_size, self.groups * self.ssm_state_size
        return {"in_proj": (inside, inside, shared, shared, self.num_heads)}

    def init_weights_(self, config: Any = None) -> None:
        """Decay rates uniform from 1 to 16, time steps log-uniform from 0.001 to 0.1, a skip of one."""
        set_(self.A_log, torch.empty(self.num_heads).uniform_(1.0, FASTEST_DECAY).log())
        set_(self.D, 1.0)
        low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
        step_H = torch.empty(self.num_heads).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
        set_(self.dt_bias, step_H + torch.log(-torch.expm1(-step_H)))  # the inverse of softplus

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        z_BTI, conv_BTC, dt_BTH = self.in_proj(x_BTD).split(self._split(), -1)
        dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias)
        state = context.state(layer_idx)
        mix = self._step if state and x_BTD.shape[1] == 1 and context.starts_BT is None else self._scan
        y_BTI = mix(conv_BTC, dt_BTH, state, context, layer_idx)
        return self.out_proj(self.norm(y_BTI, z_BTI))

    def _split(self) -> tuple[int, int, int]:
        z, x, key, query, dt = self.fused_rows()["in_proj"]
        return z, x + key + query, dt

    def _rates(self) -> Tensor:
        return -self.A_log.float().exp()

    def _heads(self, conv_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution's output as x (B, ..., H, P), B and C (B, ..., G, N)."""
        _, *widths, _ = self.fused_rows()["in_proj"]
        x, key, query = conv_BC.split(widths, -1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            key.unflatten(-1, (self.groups, self.ssm_state_size)),
            query.unflatten(-1, (self.groups, self.ssm_state_size)),
        )

    def _scan(
        self, conv_BTC: Tensor, dt_BTH: Tensor, state: dict[str, Tensor], context: Context, layer_idx: int
    ) -> Tensor:
        conv_BTC, before_BWC = self.conv.silu(conv_BTC, state.get("conv"), context.segments_BT)
        x, key, query = self._heads(conv_BTC)
        how: dict[str, Any] = {"h0": state.get("ssm"), "starts_BT": context.starts_BT, "chunk": self.chunk}
        y, h_BHPN = ssd(x, dt_BTH, self._rates(), key, query, self.D, **how, state=context.cache is not None)
        if h_BHPN is not None:
            context.keep(layer_idx, conv=before_BWC, ssm=h_BHPN.detach())
        return y.flatten(2)

    def _step(
        self, conv_B1C: Tensor, dt_B1H: Tensor, state: dict[str, Tensor], context: Context, layer_idx: int
    ) -> Tensor:
        """One token, in few operations."""
        window_BWC = torch.cat((state["conv"].to(conv_B1C.dtype), conv_B1C), 1)
        conv_BC = torch.einsum("bwc,cw->bc", window_BWC, self.conv.weight.to(window_BWC.dtype))
        conv_BC = conv_BC if self.conv.bias is None else conv_BC + self.conv.bias
        x, key, query = self._heads(F.silu(conv_BC.float()))
        y_BHP, h_BHPN = ssd_step(x, dt_B1H[:, 0], self._rates(), key, query, self.D.float(), state["ssm"])
        context.keep(layer_idx, conv=window_BWC[:, 1:].detach(), ssm=h_BHPN.detach())
        return y_BHP.flatten(1).unsqueeze(1).to(conv_B1C.dtype)


def init_output_(linear: nn.Linear, config: Any) -> None:
    """As ``nn.Linear``'s own, smaller by the root of the number of layers that add to the residual stream."""
    bound = linear.in_features**-0.5 / config.num_hidden_layers**0.5
    set_(linear.weight, torch.empty(linear.weight.shape).uniform_(-bound, bound))


class GatedRMSNorm(nn.Module):
    """RMSNorm of y * silu(z), in each group of channels for itself.

    Args:
        size: width of the last axis.
        groups: into which it is divided.
        eps: added to the mean square.
    """

    def __init__(self, size: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or y.device.type != "cpu" or not torch.is_grad_enabled():
            return naive_gated_rms_norm(y, z, self.weight, self.groups, self.eps)
        return _GatedRMSNorm.apply(y, z, self.weight, self.groups, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, groups={self.groups}, eps={self.eps}"


def naive_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """The definition."""
    precise = torch.promote_types(y.dtype, torch.float32)
    product = (y.to(precise) * F.silu(z.to(precise))).unflatten(-1, (groups, -1))
    product = product * torch.rsqrt(product.square().mean(-1, keepdim=True) + eps)
    return weight * product.flatten(-2).to(y.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps y, z and a number per row and group."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        product = _gated(y, z).unflatten(-1, (groups, -1))
        norm = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        inverse = torch.rsqrt(norm.square() / product.shape[-1] + eps)
        ctx.save_for_backward(y, z, weight, inverse)
        ctx.groups, ctx.eps = groups, eps
        return weight * product.mul_(inverse).flatten(-2).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: of the definition
            out = naive_gated_rms_norm(y, z, weight, ctx.groups, ctx.eps)
            return *torch.autograd.grad(out, (y, z, weight), grad, create_graph=True), None, None
        product, G = _gated(y, z), ctx.groups
        precise = product.dtype
        unit = product.unflatten(-1, (G, -1)).mul_(inverse).flatten(-2)
        grad = grad.to(precise)
        g_weight = (grad * unit).flatten(0, -2).sum(0)
        g = (grad * weight.to(precise)).unflatten(-1, (G, -1))
        unit = unit.unflatten(-1, (G, -1))
        slope = (g * unit).mean(-1, keepdim=True)
        g = g.addcmul_(unit, slope, value=-1.0).mul_(inverse).flatten(-2)
        z_precise = z.to(precise)
        g_z = torch.ops.aten.silu_backward(g * y, z_precise)
        g_y = g.mul_(F.silu(z_precise))
        return g_y.to(y.dtype), g_z.to(z.dtype), g_weight.to(weight.dtype), None, None


def _gated(y: Tensor, z: Tensor) -> Tensor:
    precise = torch.promote_types(y.dtype, torch.float32)
    return F.silu(z.to(precise)).mul_(y)
