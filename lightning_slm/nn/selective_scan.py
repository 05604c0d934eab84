"""The selective scan of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752), forward and backward.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) b_t        delta = softplus(dt)
    y_t = (c_t h_t + D u_t) silu(gate_t)

Every channel has N states, each with a decay of its own, so no matrix product does the work: 16 or so numbers for every
channel and token are made, used once and forgotten. Written naively they are written to memory a dozen times, which
is all the cost. So they exist for one chunk of tokens at a time, small enough for the processor's cache; the backward
pass makes them again from the state before each chunk, the only ones that are kept.
"""

# Shape letters: B = batch (sometimes some of its rows), T = tokens, C = channels, N = states of a channel,
# L = tokens of a chunk, K = chunks, P = groups of a chunk.
# Channels come last, so that every step of a loop is a few long vectors.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn import selective_scan_mamba_ssm

_CHUNK, _GPU_CHUNK = 16, 256  # tokens; on a GPU the launches count, so a chunk is long and its groups go in parallel
_CACHED = 2**19  # numbers of a chunk that still are in a CPU's cache when they are used again
_GPU_ROOM = 2**26  # numbers of a chunk, on a GPU: 256 MiB for each of three


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


def chunk_size(x: Tensor) -> int:
    """Tokens between two states that are kept for the backward pass."""
    return _GPU_CHUNK if x.is_cuda else _CHUNK


# ------------------------------------------------------------------------------------------------- the scan itself


@dataclass(frozen=True)
class Core:
    """One implementation of the scan without what surrounds it: x = delta u is given, and y = c h.

    Attributes:
        forward: (x, delta, A, b, c, state, starts, keep) -> y, h after the last token, and h before each chunk,
            (B, K, N, C), with K = 0 unless ``keep``.
        backward: (grad_y, grad_h, x, delta, A, b, c, starts, kept, with_y) -> gradients of x, delta (where it makes the
            decay), A, b, c and state; and y once more if ``with_y``, else something empty.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The forward's y and h, of x, delta, A, b, c and state; differentiable, to compare implementations."""
        return _Differentiable.apply(self, *inputs)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Core, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, h, kept = core.forward(*inputs, None, True)
        ctx.core = core
        ctx.save_for_backward(*inputs[:5], kept)
        return y, h

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        return None, *ctx.core.backward(grad_y, grad_h, *inputs, None, kept, False)[:6]


def _core(x: Tensor) -> Core:
    from lightning_slm.nn import selective_scan_cpp  # which needs this file

    return selective_scan_cpp.core_for(x) or TORCH


def _forward(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BNC: Tensor | None,
    starts_BT: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, C), N, L = x_BTC.shape, A_CN.shape[1], chunk_size(x_BTC)
    y_BTC, h_BNC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format), x_BTC.new_zeros(B, N, C)
    if state_BNC is not None:
        h_BNC.copy_(state_BNC)
    kept_BKNC = x_BTC.new_empty(B, -(-T // L) if keep else 0, N, C)
    rate_NC = rates(A_CN)
    for rows in _row_groups(x_BTC, N):
        make = _workspaces(x_BTC[rows], N, 2)
        for k, part in enumerate(_chunks(T, L)):
            if keep:
                kept_BKNC[rows, k] = h_BNC[rows]
            decay, h = make(part)
            x, delta, b, starts = _cut((x_BTC, delta_BTC, b_BTN, starts_BT), rows, part)
            _run_(decay, h, x, delta, b, starts, rate_NC, h_BNC[rows])
            h_BNC[rows] = h[:, -1]
            y_BTC[rows, part] = _over_states(c_BTN[rows, part], h)
    return y_BTC, h_BNC, kept_BKNC


def _backward_of_chunks(
    grad_y_BTC: Tensor,
    grad_h_BNC: Tensor,
    x_BTC: Tensor,
    delta_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    starts_BT: Tensor | None,
    kept_BKNC: Tensor,
    with_y: bool,
) -> tuple[Tensor, ...]:
    (_, T, C), N, L = x_BTC.shape, A_CN.shape[1], chunk_size(x_BTC)
    grad_x, grad_delta = (torch.empty_like(x_BTC, memory_format=torch.contiguous_format) for _ in range(2))
    y = x_BTC.new_empty(x_BTC.shape if with_y else 0)
    grad_b, grad_c = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (b_BTN, c_BTN))
    grad_h, grad_A_NC = grad_h_BNC.clone(), x_BTC.new_zeros(N, C)
    rate_NC, A_NC = rates(A_CN), A_CN.t().contiguous()
    for rows in _row_groups(x_BTC, N):
        make = _workspaces(x_BTC[rows], N, 3)
        for k, part in reversed(list(enumerate(_chunks(T, L)))):
            decay, h, g = make(part)
            before, tensors = kept_BKNC[rows, k], (grad_y_BTC, x_BTC, delta_BTC, b_BTN, c_BTN, starts_BT)
            grad_y, x, delta, b, c, starts = _cut(tensors, rows, part)
            _run_(decay, h, x, delta, b, starts, rate_NC, before)
            torch.mul(grad_y.unsqueeze(2), c.unsqueeze(3), out=g)
            g[:, -1].add_(grad_h[rows])
            recurrence_(g, decay, reverse=True)
            torch.mul(decay[:, 0], g[:, 0], out=grad_h[rows])
            if with_y:
                y[rows, part] = _over_states(c, h)
            grad_c[rows, part] = _over_channels(grad_y, h)
            grad_b[rows, part] = _over_channels(x, g)
            grad_x[rows, part] = _over_states(b, g)
            decay.mul_(g)  # from here on: gradient of the decay's logarithm
            decay[:, 0].mul_(before)
            decay[:, 1:].mul_(h[:, :-1])
            grad_delta[rows, part] = torch.mul(decay, A_NC, out=g).sum(2)
            grad_A_NC += decay.mul_(delta.unsqueeze(2)).sum((0, 1))
    return grad_x, grad_delta, grad_A_NC.t().contiguous(), grad_b, grad_c, grad_h, y


TORCH = Core(_forward, _backward_of_chunks)


def recurrence_(x_BLNC: Tensor, decay_BLNC: Tensor, reverse: bool = False) -> None:
    """x_t += decay_t x_{t-1}, in place, token after token; in reverse x_t += decay_{t+1} x_{t+1}."""
    L = x_BLNC.shape[1]
    if x_BLNC.is_cuda and L >= 16:
        grouped_recurrence_(x_BLNC, decay_BLNC, math.isqrt(L), reverse)
    elif reverse:
        _chain_(x_BLNC.unbind(1)[::-1], decay_BLNC.unbind(1)[:0:-1])
    else:
        _chain_(x_BLNC.unbind(1), decay_BLNC.unbind(1)[1:])


def grouped_recurrence_(x_BLNC: Tensor, decay_BLNC: Tensor, group: int, reverse: bool = False) -> None:
    """The same in fewer steps, for processors that are faster than the steps are launched: every group of tokens by
    itself, all at once, and then what enters a group is added to each of its tokens.
    """
    whole = x_BLNC.shape[1] // group * group
    rest = x_BLNC[:, whole - 1 :].unbind(1), decay_BLNC[:, whole:].unbind(1)
    link_BLNC = decay_BLNC[:, :whole]
    if reverse:
        _chain_(rest[0][::-1], rest[1][::-1])
        link_BLNC = link_BLNC.roll(-1, 1)
    xs, links = (t[:, :whole].unflatten(1, (-1, group)).unbind(2) for t in (x_BLNC, link_BLNC))  # (B, P, N, C) each
    into, source = slice(1, None), slice(None, -1)
    if reverse:
        xs, links, into, source = xs[::-1], links[::-1], source, into
    passed = [links[0]]  # what is left at each token of that which enters its group
    for link in links[1:]:
        passed.append(link * passed[-1])
    _chain_(xs, links[1:])
    ends, through = xs[-1].unbind(1), passed[-1].unbind(1)
    _chain_(*((ends[::-1], through[-2::-1]) if reverse else (ends, through[1:])))
    for x, left in zip(xs[:-1], passed):
        x[:, into].addcmul_(left[:, into], xs[-1][:, source])
    if not reverse:
        _chain_(*rest)


def _chain_(xs: Sequence[Tensor], links: Sequence[Tensor]) -> None:
    for previous, x, link in zip(xs, xs[1:], links):
        x.addcmul_(link, previous)


def rates(A_CN: Tensor) -> Tensor:
    """For powers of two: on CPUs without Intel's library they take a quarter of the time of ``exp``."""
    return A_CN.t().mul(1 / math.log(2)).contiguous()


def _run_(
    decay_BLNC: Tensor,
    h_BLNC: Tensor,
    x_BLC: Tensor,
    delta_BLC: Tensor,
    b_BLN: Tensor,
    starts_BL: Tensor | None,
    rate_NC: Tensor,
    before_BNC: Tensor,
) -> None:
    """Fill the first two with the decays and states of a chunk."""
    torch.mul(delta_BLC.unsqueeze(2), rate_NC, out=decay_BLNC).exp2_()
    if starts_BL is not None:
        decay_BLNC.masked_fill_(starts_BL[:, :, None, None], 0)
    torch.mul(x_BLC.unsqueeze(2), b_BLN.unsqueeze(3), out=h_BLNC)
    h_BLNC[:, 0].addcmul_(decay_BLNC[:, 0], before_BNC)
    recurrence_(h_BLNC, decay_BLNC)


def _cut(tensors: Sequence[Tensor | None], rows: slice, part: slice) -> list[Any]:
    return [None if t is None else t[rows, part] for t in tensors]


def _over_states(weight_BLN: Tensor, x_BLNC: Tensor) -> Tensor:
    (B, L, N, C), x = x_BLNC.shape, x_BLNC.flatten(0, 1)
    return torch.bmm(weight_BLN.reshape(B * L, 1, N), x).view(B, L, C)


def _over_channels(weight_BLC: Tensor, x_BLNC: Tensor) -> Tensor:
    (B, L, N, C), x = x_BLNC.shape, x_BLNC.flatten(0, 1)
    return torch.bmm(weight_BLC.reshape(B * L, 1, C), x.mT).view(B, L, N)  # ten times as fast as the other way round


def _row_groups(x_BTC: Tensor, N: int) -> list[slice]:
    """Rows that are worked on together."""
    B, T, C = x_BTC.shape
    room = _GPU_ROOM if x_BTC.is_cuda else _CACHED
    rows = max(1, room // (min(T, chunk_size(x_BTC)) * N * C))
    return [slice(i, min(i + rows, B)) for i in range(0, B, rows)]


def _chunks(T: int, L: int) -> list[slice]:
    return [slice(i, min(i + L, T)) for i in range(0, T, L)]


def _workspaces(x_BTC: Tensor, N: int, number: int) -> Callable[[slice], list[Tensor]]:
    """A function that gives as many tensors (B, L, N, C) for the tokens of a chunk, always in the same memory."""
    B, T, C = x_BTC.shape
    flat = x_BTC.new_empty(number, B * min(T, chunk_size(x_BTC)) * N * C)

    def make(part: slice) -> list[Tensor]:
        L = part.stop - part.start
        return [t[: B * L * N * C].view(B, L, N, C) for t in flat.unbind(0)]

    return make
