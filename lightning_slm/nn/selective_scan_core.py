"""The selective scan without what surrounds it, in PyTorch: chunk after chunk, in memory that the cache holds.

``selective_scan`` makes an operator of it; ``selective_scan_cpp`` has the same in C++.
"""

# Shape letters: B = batch (sometimes some of its rows), T = tokens, C = channels, N = states of a channel,
# L = tokens of a chunk, K = chunks, P = groups of a chunk.
# Channels come last, so that every step of a loop is a few long vectors.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK, _GPU_CHUNK = 16, 256  # tokens; on a GPU the launches count, so a chunk is long and its groups go in parallel
_CACHED = 2**19  # numbers of a chunk that still are in a CPU's cache when they are used again
_GPU_ROOM = 2**26  # numbers of a chunk, on a GPU: 256 MiB for each of three


def chunk_size(x: Tensor) -> int:
    """Tokens between two states that are kept for the backward pass."""
    return _GPU_CHUNK if x.is_cuda else _CHUNK


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
