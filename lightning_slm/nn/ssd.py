"""State-space duality (Dao & Gu 2024, https://arxiv.org/abs/2405.21060): a recurrence whose state decays by one number
per head and token, computed as matrix products over chunks of tokens.

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t'        y_t = h_t C_t + D x_t

With dt = 1 and A = 0 it is linear attention (C queries, B keys, x values), with dt = 1 and fixed A it is retention.
"""

# Shape letters: B = batch, T = tokens, H = heads, P = width of a head, G = groups of heads that share B and C,
# N = width of B and C, Q = tokens of a chunk, n = chunks, R = heads of a group, K = B * G, X = R * P.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.kernels import OptionalKernel

_LEAST = -60.0  # of a logarithm of a decay: exp of less is nothing beside 1, and denormal numbers are slow


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk: int = 64,
    state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above, by the fastest way there is for the device.

    Decays and states are in float32 or better; the products are in the precision of ``x_BTHP``.

    Args:
        dt_BTH: step sizes, not negative.
        A_H: decay rates, not positive.
        B_BTGN: what a token writes along; heads of one group are neighbours.
        C_BTGN: what a token reads along.
        D_H: weight of the token itself; None: 0.
        h0: state before the first token, (B, H, P, N); None: zeros.
        starts_BT: True where a text begins, at which the state is reset.
        chunk: tokens within which all pairs are looked at: ``chunk`` + 2 N multiply-adds per token and channel of H P,
            and a state of N numbers per ``chunk`` tokens and channel for the backward pass. Does not change results.
        state: whether the last state is wanted; without it, the last chunk's is not computed.

    Returns: (B, T, H, P) like ``x_BTHP``, and the state after the last token, (B, H, P, N), or None.
    """
    with torch.autocast(x_BTHP.device.type, enabled=False):
        precise = _precise(x_BTHP)
        dt_BTH, A_H = dt_BTH.to(precise), A_H.to(precise)
        D_H = torch.zeros_like(A_H) if D_H is None else D_H.to(precise)
        B_BTGN, C_BTGN = B_BTGN.to(x_BTHP.dtype), C_BTGN.to(x_BTHP.dtype)
        h0 = None if h0 is None else h0.to(precise)
        way = _way(x_BTHP)
        return way(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, h0, starts_BT, chunk, state)


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, h_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, all in the precision of the state: (B, H, P), and the new state."""
    R = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN, C_BHN = (B_BGN, C_BGN) if R == 1 else (t.repeat_interleave(R, 1) for t in (B_BGN, C_BGN))
    decay_BH11 = (dt_BH * A_H).exp()[..., None, None]
    u_BHP1 = (x_BHP * dt_BH.unsqueeze(-1)).unsqueeze(-1)
    h_BHPN = torch.addcmul(h_BHPN * decay_BH11, u_BHP1, B_BHN.unsqueeze(2))
    y_BHP = (h_BHPN @ C_BHN.unsqueeze(-1)).squeeze(-1)
    return torch.addcmul(y_BHP, x_BHP, D_H.unsqueeze(-1)), h_BHPN


def naive_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    h0: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of ``ssd``: its definition, token by token."""
    B, T, H, P = x_BTHP.shape
    h_BHPN = x_BTHP.new_zeros(B, H, P, B_BTGN.shape[-1]) if h0 is None else h0
    ys = []
    for t in range(T):
        if starts_BT is not None:
            h_BHPN = h_BHPN.masked_fill(starts_BT[:, t, None, None, None], 0.0)
        B_BHN, C_BHN = (each[:, t].repeat_interleave(H // each.shape[2], 1) for each in (B_BTGN, C_BTGN))
        decay_BH = torch.exp(dt_BTH[:, t] * A_H)
        h_BHPN = h_BHPN * decay_BH[..., None, None]
        h_BHPN = h_BHPN + torch.einsum("bhp,bhn,bh->bhpn", x_BTHP[:, t], B_BHN, dt_BTH[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h_BHPN, C_BHN) + x_BTHP[:, t] * D_H[:, None])
    return torch.stack(ys, 1), h_BHPN


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _way(x: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A kernel or plain tensor code where those are best; else chunk after chunk, with a backward pass of its own."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return plain_ssd  # the compiler fuses it
    return KERNEL.get(x) or (_SSD.apply if x.device.type == "cpu" else plain_ssd)


def plain_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    h0: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk: int = 64,
    state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``ssd`` for all chunks at once and with autograd's backward pass."""
    (B, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
    n = -(-T // chunk)
    Q, R, dtype = -(-T // n), H // G, x_BTHP.dtype
    starts = torch.zeros_like(dt_BTH[..., 0], dtype=torch.bool) if starts_BT is None else starts_BT
    # Tokens that fill the last chunk have steps of 0: nothing decays, and nothing is written.
    x, dt, key, query, starts = (_folded(t, n, Q) for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN, starts))
    sums = (dt * A_H).cumsum(2).view(B, n, Q, G, R).permute(0, 1, 3, 4, 2)
    text = starts.cumsum(2)[:, :, None, None]  # numbers of texts within the chunk, (B, n, 1, 1, Q)
    seen = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    if starts_BT is not None:
        seen = seen & (text.unsqueeze(-1) == text.unsqueeze(-2))
    # Forbidden pairs are taken out before exp, which would be infinite for some of them.
    within = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~seen, -torch.inf).exp()
    before, after = sums.exp(), (sums[..., -1:] - sums).exp()
    if starts_BT is not None:
        before, after = before * (text == 0), after * (text == text[..., -1:])

    u = (x * dt.unsqueeze(-1)).view(B, n, Q, G, R, P).permute(0, 1, 3, 4, 2, 5)
    key, query = key.transpose(2, 3), query.transpose(2, 3)  # (B, n, G, Q, N)
    pairs = (query @ key.mT).unsqueeze(3) * within
    y = (pairs.to(dtype) @ u.to(dtype)).to(u.dtype)

    written = (u * after.unsqueeze(-1)).to(dtype).permute(0, 1, 2, 4, 3, 5).reshape(B, n, G, Q, R * P)
    new = (key.mT @ written).to(u.dtype).view(B, n, G, N, R, P)
    kept = before[..., -1].view(B, n, G, 1, R, 1)
    h = torch.zeros_like(new[:, 0]) if h0 is None else h0.view(B, G, R, P, N).permute(0, 1, 4, 2, 3)
    entering = []
    for new_c, kept_c in zip(new.unbind(1), kept.unbind(1)):
        entering.append(h)
        h = torch.addcmul(new_c, h, kept_c)
    read = query @ torch.stack(entering, 1).to(dtype).view(B, n, G, N, R * P)
    read = read.to(u.dtype).view(B, n, G, Q, R, P).permute(0, 1, 2, 4, 3, 5)
    y = torch.addcmul(y, read, before.unsqueeze(-1))
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(B, n * Q, H, P)[:, :T]
    y = torch.addcmul(y, x_BTHP.to(y.dtype), D_H.unsqueeze(-1)).to(dtype)
    return y, h.permute(0, 1, 3, 4, 2).reshape(B, H, P, N) if state else None


def _folded(t_BT: Tensor, n: int, Q: int) -> Tensor:
    """(B, T, ...) to (B, n, Q, ...), filled up with zeros."""
    more = n * Q - t_BT.shape[1]
    if more:
        t_BT = F.pad(t_BT, (0, 0) * (t_BT.ndim - 2) + (0, more))
    return t_BT.reshape(t_BT.shape[0], n, Q, *t_BT.shape[2:])


class _Chunk:
    """One chunk, laid out for matrix products. Both passes make it rather than that the first keep it for the second.

    Attributes:
        x: (B, Q, H, P), precise; dt: (B, Q, H).
        within: (B, H, Q, Q), decays from each token (last axis) to each later one; above the diagonal, of no meaning.
        before: (B, H, Q), from the state that enters to each token; at the last one, of the state over the chunk.
        after: (B, H, Q), from each token to the last.
        key, query: (K, Q, N); scores: (K, Q, Q), their products at and below the diagonal.
        u: (B, H, Q, P), x times dt.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, key: Tensor, query: Tensor, starts: Tensor | None, at: slice
    ) -> None:
        (B, Q, H, P), G = x[:, at].shape, key.shape[2]
        self.sizes = B, G, H // G, Q, P
        self.x, self.dt = x[:, at].to(dt.dtype), dt[:, at]
        self._decays(A, None if starts is None else starts[:, at].cumsum(1))
        self.key, self.query = (t[:, at].transpose(1, 2).reshape(B * G, Q, -1) for t in (key, query))
        self.scores = torch.bmm(self.query, self.key.mT).tril_()
        self.u = x.new_empty(B, H, Q, P)
        torch.mul(self.x.transpose(1, 2), self.dt.transpose(1, 2).unsqueeze(-1), out=self.u)

    def _decays(self, A: Tensor, text_BQ: Tensor | None) -> None:
        sums = (self.dt * A).cumsum(1).transpose(1, 2).contiguous()
        self.within = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp_(_LEAST, 0.0).exp_()
        self.before = sums.clamp(min=_LEAST).exp_()
        self.after = (sums[..., -1:] - sums).clamp_(min=_LEAST).exp_()
        if text_BQ is not None:
            self.within.mul_((text_BQ.unsqueeze(-1) == text_BQ.unsqueeze(-2)).unsqueeze(1))
            self.before.mul_((text_BQ == 0).unsqueeze(1))
            self.after.mul_((text_BQ == text_BQ[:, -1:]).unsqueeze(1))

    def pairs(self) -> Tensor:
        """What each token takes of each other's u, (B * H, Q, Q); overwrites ``within``."""
        B, G, R, Q, _ = self.sizes
        pairs = self.within.view(B, G, R, Q, Q).mul_(self.scores.view(B, G, 1, Q, Q))
        return pairs.view(-1, Q, Q).to(self.u.dtype)

    def grouped(self, x_BHQP: Tensor, weight_BHQ: Tensor) -> Tensor:
        """Each row times its weight, (K, Q, X)."""
        B, G, R, Q, P = self.sizes
        out = self.u.new_empty(B, G, Q, R, P)
        x, weight = x_BHQP.unflatten(1, (G, R)), weight_BHQ.view(B, G, R, Q, 1)
        torch.mul(x.transpose(2, 3), weight.transpose(2, 3), out=out)
        return out.view(B * G, Q, R * P)

    def ungrouped(self, x_KQX: Tensor) -> Tensor:
        """(B, Q, H, P), precise."""
        B, G, R, Q, P = self.sizes
        return x_KQX.view(B, G, Q, R, P).transpose(1, 2).reshape(B, Q, G * R, P).to(self.dt.dtype)

    def by_token(self, t_KQN: Tensor) -> Tensor:
        """(B, Q, G, N)."""
        B, G, _, Q, _ = self.sizes
        return t_KQN.view(B, G, Q, -1).transpose(1, 2)

    def add_kept_(self, new_KNX: Tensor, old_KNX: Tensor) -> Tensor:
        """Add what the chunk leaves of the old state to a new one."""
        B, G, R, _, P = self.sizes
        kept = self.before[..., -1].reshape(B, G, R, 1).expand(-1, -1, -1, P).reshape(B * G, 1, R * P)
        return new_KNX.addcmul_(old_KNX, kept)


class _SSD(torch.autograd.Function):
    """Chunk after chunk, so that what is made for one stays in the processor's cache.

    Keeps the inputs, the output, and the states between chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        key: Tensor,
        query: Tensor,
        D: Tensor,
        h0: Tensor | None,
        starts: Tensor | None,
        chunk: int,
        state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        (B, T, H, P), G = x.shape, key.shape[2]
        y = x.new_empty(B, T, H, P)
        h = None if h0 is None else _to_groups(h0, G)
        states = [h]  # that enter the chunks
        for at in _slices(T, chunk):
            c = _Chunk(x, dt, A, key, query, starts, at)
            y_c = torch.bmm(c.pairs(), c.u.view(-1, *c.u.shape[2:])).view_as(c.u).transpose(1, 2).to(dt.dtype)
            y_c = torch.addcmul(y_c, c.x, D.unsqueeze(-1))
            if h is not None:
                read = c.ungrouped(torch.bmm(c.query, h.to(x.dtype)))
                y_c.addcmul_(read, c.before.transpose(1, 2).unsqueeze(-1))
            y[:, at] = y_c
            if at.stop < T or state:
                new = torch.bmm(c.key.mT, c.grouped(c.u, c.after)).to(dt.dtype)
                h = new if h is None else c.add_kept_(new, h)
                if at.stop < T:
                    states.append(h.to(x.dtype))
        last = _from_groups(h, B, H) if state and h is not None else None
        ctx.save_for_backward(x, dt, A, key, query, D, h0, starts, y if y.dtype == dt.dtype else None, *states[1:])
        ctx.chunk, ctx.state = chunk, state
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, g_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, key, query, D, h0, starts, y, *between = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: of the plain code
            return *_double(ctx, (x, dt, A, key, query, D, h0), starts, (gy, g_last)), None, None, None
        G, H, T = key.shape[2], x.shape[2], x.shape[1]
        gy = x.new_zeros(x.shape) if gy is None else gy
        gx, gdt, g_key, g_query = (t.new_empty(t.shape) for t in (x, dt, key, query))
        gA, gD = torch.zeros_like(A), torch.zeros_like(D)
        gh = None if g_last is None else _to_groups(g_last, G).contiguous()
        states = [None if h0 is None else _to_groups(h0, G), *between]
        for at, h in zip(reversed(_slices(T, ctx.chunk)), reversed(states)):
            c, g = _Chunk(x, dt, A, key, query, starts, at), _Gradients()
            _back_within_(g, c, gy[:, at])
            if h is not None:
                read = None if y is None else (gy[:, at] * y[:, at]).sum(-1) - g.own * D
                _back_read_(g, c, gy[:, at], h, read)
            if gh is not None:
                _back_written_(g, c, gh, h)
            v = (g.u * c.x).sum(-1)
            torch.addcmul(v, g.decay, A, out=gdt[:, at])
            gx[:, at] = torch.addcmul(g.u * c.dt.unsqueeze(-1), gy[:, at].to(dt.dtype), D.unsqueeze(-1))
            g_key[:, at], g_query[:, at] = c.by_token(g.key), c.by_token(g.query)
            gA += (g.decay * c.dt).sum((0, 1))
            gD += g.own.sum((0, 1))
            gh = g.entering
        g_h0 = None if h0 is None or gh is None else _from_groups(gh, len(x), H)
        return gx, gdt, gA, g_key, g_query, gD, g_h0, None, None, None


class _Gradients:
    """Of one chunk, gathered from its three parts.

    Attributes:
        u: (B, Q, H, P); own: (B, Q, H), of D before its sum; key, query: (K, Q, N).
        decay: (B, Q, H), of dt times A. A decay acts on every pair of an earlier token and itself or a later one, so
            that it is a running sum. Each part has its own, in which nothing large cancels: with bfloat16's rounding,
            little would be left of those of heads that forget fast.
        rows: (B, Q, H), what of this came to each reader from tokens of the chunk.
        entering: (K, N, X), of the state that enters, if any does.
    """

    u: Tensor
    own: Tensor
    key: Tensor
    query: Tensor
    decay: Tensor
    rows: Tensor
    entering: Tensor | None = None


def _back_within_(g: _Gradients, c: _Chunk, gy: Tensor) -> None:
    """From one token of the chunk to another."""
    B, G, R, Q, P = c.sizes
    dtype, precise = c.u.dtype, c.dt.dtype
    gy_rows = gy.transpose(1, 2).to(dtype).contiguous().view(-1, Q, P)
    pairs = torch.bmm(gy_rows, c.u.view(-1, Q, P).mT).to(precise).mul_(c.within.view(-1, Q, Q)).view(B, G, R, Q, Q)
    g_scores = pairs.sum(2).view(-1, Q, Q).tril_().to(dtype)
    g.query, g.key = torch.bmm(g_scores, c.key), torch.bmm(g_scores.mT, c.query)
    pairs.mul_(c.scores.view(B, G, 1, Q, Q))
    rows, columns = (pairs.sum(axis).view(B, -1, Q).transpose(1, 2) for axis in (-1, -2))
    g.rows, g.decay = rows, _from_here_on(rows - columns)
    g.u = torch.bmm(c.pairs().mT, gy_rows).view_as(c.u).transpose(1, 2).to(precise)
    g.own = (gy * c.x).sum(-1)


def _back_read_(g: _Gradients, c: _Chunk, gy: Tensor, h: Tensor, read: Tensor | None) -> None:
    """From the state that entered.

    Args:
        read: (B, Q, H), each output's product with its gradient, where it is kept in full precision; None: made anew.
    """
    gy = gy.to(c.dt.dtype)
    if read is None:
        y = c.ungrouped(torch.bmm(c.query, h.to(c.u.dtype)))
        g.decay += _from_here_on((gy * y).sum(-1) * c.before.transpose(1, 2))
    else:
        g.decay += _from_here_on(read - g.rows)
    arrived = c.grouped(gy.transpose(1, 2), c.before)
    g.query.baddbmm_(arrived, h.to(c.u.dtype).mT)
    g.entering = torch.bmm(c.query.mT, arrived).to(c.dt.dtype)


def _back_written_(g: _Gradients, c: _Chunk, gh: Tensor, h: Tensor | None) -> None:
    """From the state that leaves, to this chunk's tokens and to the state that entered."""
    B, G, R, _, P = c.sizes
    low = gh.to(c.u.dtype)
    gu = c.ungrouped(torch.bmm(c.key, low)) * c.after.transpose(1, 2).unsqueeze(-1)
    g.key.baddbmm_(c.grouped(c.u, c.after), low.mT)
    v = (gu * c.x).sum(-1) * c.dt
    g.decay += v.cumsum(1) - v
    g.u = g.u + gu
    if h is not None:
        passed = (gh * h).view(B, G, -1, R, P).sum((2, 4)).view(B, -1)
        g.decay += (passed * c.before[..., -1]).unsqueeze(1)
        assert g.entering is not None
        c.add_kept_(g.entering, gh)


def _from_here_on(x_BQH: Tensor) -> Tensor:
    """Sums over each token and those after it."""
    return x_BQH.flip(1).cumsum(1).flip(1)


def _double(ctx: Any, inputs: tuple[Any, ...], starts: Tensor | None, grads: tuple[Any, ...]) -> list[Tensor | None]:
    x, dt, A, key, query, D, h0 = inputs
    outputs = plain_ssd(x, dt, A, key, query, D, h0, starts, ctx.chunk, ctx.state)
    pulled = [(out, grad) for out, grad in zip(outputs, grads) if out is not None and grad is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    pulls = [grad for _, grad in pulled]
    found = iter(torch.autograd.grad([out for out, _ in pulled], wanted, pulls, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _slices(T: int, chunk: int) -> list[slice]:
    return [slice(i, min(T, i + chunk)) for i in range(0, T, chunk)]


def _to_groups(h_BHPN: Tensor, G: int) -> Tensor:
    """(K, N, X), as products with all heads of a group want it."""
    B, H, P, N = h_BHPN.shape
    return h_BHPN.view(B, G, H // G, P, N).permute(0, 1, 4, 2, 3).reshape(B * G, N, -1)


def _from_groups(h_KNX: Tensor, B: int, H: int) -> Tensor:
    K, N, _ = h_KNX.shape
    h = h_KNX.view(B, K // B, N, H * B // K, -1).permute(0, 1, 3, 4, 2)
    return h.reshape(B, H, -1, N).contiguous()


def _load_kernel() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    def kernel(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        key: Tensor,
        query: Tensor,
        D: Tensor,
        h0: Tensor | None = None,
        starts: Tensor | None = None,
        chunk: int = 64,
        state: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        numbers = None if starts is None else starts.cumsum(-1, dtype=torch.int32)
        options = {"D": D, "initial_states": h0, "seq_idx": numbers, "return_final_states": state}
        found = mamba_chunk_scan_combined(x, dt, A, key, query, 256, **options)  # its own chunks suit its own blocks
        return found if state else (found, None)

    return kernel


def _example(device: torch.device) -> list[Any]:
    """Two groups, a state before and a text that begins within."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    B, T, H, P, G, N = 2, 300, 4, 64, 2, 64
    values = [random(B, T, H, P), random(B, T, H).sigmoid() / 10, -random(H).exp(), random(B, T, G, N) / 8]
    values += [random(B, T, G, N), random(H), random(B, H, P, N)]
    starts = torch.zeros(B, T, dtype=torch.bool, device=device)
    starts[0, 100] = True
    return [*(v.requires_grad_() for v in values), starts]


KERNEL = OptionalKernel("mamba_ssm's mamba_chunk_scan_combined", _load_kernel, plain_ssd, _example)
