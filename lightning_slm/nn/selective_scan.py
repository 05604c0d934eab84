"""The selective scan of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752), forward and backward.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) b_t        delta = softplus(dt)
    y_t = (c_t h_t + D u_t) silu(gate_t)

Every channel has N states, each with a decay of its own, so no matrix product does the work: 16 or so numbers for every
channel and token are made, used once and forgotten. Written naively they are written to memory a dozen times, which
is all the cost. So they exist for one chunk of tokens at a time, small enough for the processor's cache; the backward
pass makes them again from the state before each chunk, the only ones that are kept.
"""

# Shape letters: B = batch, T = tokens, C = channels, N = states of a channel, K = chunks.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn import selective_scan_cpp, selective_scan_mamba_ssm
from lightning_slm.nn.selective_scan_core import TORCH, Core, chunk_size


def selective_scan(
    u_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    D_C: Tensor | None = None,
    gate_BTC: Tensor | None = None,
    state_BNC: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above over a text, in float32 or better whatever the inputs are.

    On a CPU the C++ operator does the work if it is on (`use_cpp_scan`), on a GPU mamba_ssm's kernel if it is
    installed and neither a state nor starts are given; otherwise PyTorch does.

    Args:
        dt_BTC: time steps before softplus.
        A_CN: negative rates of decay.
        D_C: weight of the input that is added; None: zero.
        gate_BTC: the output is multiplied by silu of it; None: it is not.
        state_BNC: h before the first token; None: zeros.
        starts_BT: True where h before the token counts as zero; None: nowhere.

    Returns: y (B, T, C) in the dtype of u, and h after the last token, (B, N, C).
    """
    arguments = (u_BTC, dt_BTC, A_CN, b_BTN, c_BTN, D_C, gate_BTC)
    if state_BNC is None and starts_BT is None and selective_scan_mamba_ssm.usable(u_BTC, A_CN):
        return selective_scan_mamba_ssm.scan(*arguments)
    return own_selective_scan(*arguments, state_BNC, starts_BT)


def own_selective_scan(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same without mamba_ssm: one operator that no compiler looks into."""
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    y_BTC, h_BNC, _ = _scan(*arguments, keep)
    return y_BTC, h_BNC


def naive_selective_scan(
    u_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    D_C: Tensor | None = None,
    gate_BTC: Tensor | None = None,
    state_BNC: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of `selective_scan`: the recurrence as it is written."""
    B, T, C = u_BTC.shape
    h_BCN = u_BTC.new_zeros(B, C, A_CN.shape[1]) if state_BNC is None else state_BNC.mT
    outputs = []
    for t in range(T):
        if starts_BT is not None:
            h_BCN = h_BCN * ~starts_BT[:, t, None, None]
        delta_BC1 = F.softplus(dt_BTC[:, t]).unsqueeze(-1)
        h_BCN = (delta_BC1 * A_CN).exp() * h_BCN + delta_BC1 * u_BTC[:, t].unsqueeze(-1) * b_BTN[:, t, None]
        outputs.append((h_BCN * c_BTN[:, t, None]).sum(-1))
    y_BTC = torch.stack(outputs, 1)
    if D_C is not None:
        y_BTC = y_BTC + D_C * u_BTC
    return y_BTC if gate_BTC is None else y_BTC * F.silu(gate_BTC), h_BCN.mT


# -------------------------------------------------------------------------- one operator, with what surrounds the scan


@torch.library.custom_op("lightning_slm::selective_scan", mutates_args=())
def _scan(
    u_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    D_C: Tensor | None,
    gate_BTC: Tensor | None,
    state_BNC: Tensor | None,
    starts_BT: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(u_BTC.device.type, enabled=False):
        u, dt, A, b, c, state = _precise(u_BTC, dt_BTC, A_CN, b_BTN, c_BTN, state_BNC)
        delta = F.softplus(dt)
        y, h, kept = _core(u).forward(delta * u, delta, A, b, c, state, starts_BT, keep)
        if D_C is not None:
            y.addcmul_(u, D_C.to(u.dtype))
        if gate_BTC is not None:
            y.mul_(F.silu(gate_BTC.to(u.dtype)))
        return y.to(u_BTC.dtype), h, kept


@_scan.register_fake
def _(u_BTC, dt_BTC, A_CN, b_BTN, c_BTN, D_C, gate_BTC, state_BNC, starts_BT, keep):  # type: ignore[no-untyped-def]
    (B, T, C), N = u_BTC.shape, A_CN.shape[1]
    K = -(-T // chunk_size(u_BTC)) if keep else 0
    h_BNC = u_BTC.new_empty(B, N, C, dtype=_precise_dtype(u_BTC))
    return u_BTC.new_empty(B, T, C), h_BNC, h_BNC.new_empty(B, K, N, C)


@torch.library.custom_op("lightning_slm::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y_BTC: Tensor,
    grad_h_BNC: Tensor,
    u_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    D_C: Tensor | None,
    gate_BTC: Tensor | None,
    starts_BT: Tensor | None,
    kept_BKNC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(u_BTC.device.type, enabled=False):
        grad, u, dt, A, b, c = _precise(grad_y_BTC, u_BTC, dt_BTC, A_CN, b_BTN, c_BTN)
        delta, gated = F.softplus(dt), gate_BTC is not None
        gate = None if gate_BTC is None else gate_BTC.to(u.dtype)
        grad_y = grad if gate is None else grad * F.silu(gate)
        grad_x, grad_delta, grad_A, grad_b, grad_c, grad_h, y = _core(u).backward(
            grad_y, grad_h_BNC, delta * u, delta, A, b, c, starts_BT, kept_BKNC, gated
        )
        grad_dt = grad_delta.addcmul_(grad_x, u).mul_(dt.sigmoid())
        grad_u, grad_D, grad_gate = grad_x.mul_(delta), u_BTC.new_empty(0), u_BTC.new_empty(0)
        if D_C is not None:
            grad_u.addcmul_(grad_y, D_C.to(u.dtype))
            grad_D = (grad_y * u).sum((0, 1)).to(D_C.dtype)
        if gate is not None:
            if D_C is not None:
                y.addcmul_(u, D_C.to(u.dtype))
            grad_gate = torch.ops.aten.silu_backward(y.mul_(grad), gate).to(gate_BTC.dtype)  # type: ignore[union-attr]
        inputs = (u_BTC, dt_BTC, A_CN, b_BTN, c_BTN)
        grads = [g.to(t.dtype) for g, t in zip((grad_u, grad_dt, grad_A, grad_b, grad_c), inputs)]
        return *grads, grad_D, grad_gate, grad_h  # type: ignore[return-value]


@_scan_backward.register_fake
def _(grad_y_BTC, grad_h_BNC, u, dt, A, b, c, D, gate, starts, kept):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt, A, b, c)]
    rest = [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (D, gate)]
    return *grads, *rest, torch.empty_like(grad_h_BNC, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _state, starts_BT, _keep = inputs
    ctx.save_for_backward(*tensors, starts_BT, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *grads, grad_state = _scan_backward(grad_y, grad_h, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad
    return *(g if w else None for g, w in zip(grads, wanted)), grad_state if wanted[7] else None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


def _precise_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _precise(first: Tensor, *others: Tensor | None) -> list[Any]:
    dtype = _precise_dtype(first)
    return [None if t is None else t.to(dtype) for t in (first, *others)]


def _core(x: Tensor) -> Core:
    return selective_scan_cpp.core_for(x) or TORCH
