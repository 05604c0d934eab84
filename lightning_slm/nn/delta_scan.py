"""The recurrence of RWKV-7: a matrix memory with a decay per channel and a generalised delta rule (Peng et al. 2025,
https://arxiv.org/abs/2503.14456).

Head by head, with row vectors of keys and values:

    S_t = diag(w_t) S_{t-1} + b_t' (a_t S_{t-1}) + k_t' v_t,        y_t = r_t S_t

Read in chunks. Divided by the decay since the chunk began, S_t = diag(e^{c_t}) R_t, the decay is gone, and what the
rule reads, u_t = a_t S_{t-1}, follows from what it read before in the same chunk: a triangular system of equations, for
all chunks at once. What remains in sequence is one small matrix product for each chunk. The division is safe because
a decay of RWKV-7 is never below e^-0.607: over 32 tokens, 3e8.
"""

# Shape letters: B = batch, T = tokens of this call, H = heads, d = width of a key, v = width of a value, n = chunks,
# Q = tokens of a chunk.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.kernels import OptionalKernel

CHUNK = 32


def delta_scan(
    r_BTHd: Tensor,
    log_w_BTHd: Tensor,
    k_BTHd: Tensor,
    v_BTHv: Tensor,
    a_BTHd: Tensor,
    b_BTHd: Tensor,
    state_BHdv: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """What every token reads, (B, T, H, v), and the memory after the last, (B, H, d, v); both in float32.

    Args:
        log_w_BTHd: log of the decay; ``chunk`` times the smallest must stay above -80.
        a_BTHd: direction that is looked up before it is changed.
        b_BTHd: direction in which what was found there is added.
        state_BHdv: memory of the call before; None: empty.
        starts_BT: True where the memory is empty.
        chunk: tokens of a chunk.
    """
    if state_BHdv is None:
        B, _, H, d = k_BTHd.shape
        state_BHdv = v_BTHv.new_zeros(B, H, d, v_BTHv.shape[-1], dtype=_precise(v_BTHv))
    inputs = (r_BTHd, log_w_BTHd, k_BTHd, v_BTHv, a_BTHd, b_BTHd)
    if starts_BT is None and r_BTHd.shape[1] == 1:
        return delta_step(*inputs, state_BHdv)
    kernel = FLA_DELTA.get(r_BTHd) if starts_BT is None else None
    if kernel is not None:
        return kernel(*inputs, state_BHdv)
    with torch.autocast(r_BTHd.device.type, enabled=False):
        return _chunked([x.to(state_BHdv.dtype) for x in inputs], state_BHdv, starts_BT, chunk)


def delta_step(
    r_B1Hd: Tensor,
    log_w_B1Hd: Tensor,
    k_B1Hd: Tensor,
    v_B1Hv: Tensor,
    a_B1Hd: Tensor,
    b_B1Hd: Tensor,
    state_BHdv: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for one token, in few operations: decoding is nothing else."""
    with torch.autocast(r_B1Hd.device.type, enabled=False):
        row_BH1d = [x.to(state_BHdv.dtype).transpose(1, 2) for x in (r_B1Hd, k_B1Hd, v_B1Hv, a_B1Hd, b_B1Hd)]
        r, k, v, a, b = row_BH1d
        w_BHd1 = log_w_B1Hd.to(state_BHdv.dtype).exp().permute(0, 2, 3, 1)
        changes_BHdv = torch.cat((b, k), 2).transpose(2, 3) @ torch.cat((a @ state_BHdv, v), 2)
        state_BHdv = torch.addcmul(changes_BHdv, w_BHd1, state_BHdv)
        return (r @ state_BHdv).transpose(1, 2), state_BHdv


def naive_delta_scan(
    r_BTHd: Tensor,
    log_w_BTHd: Tensor,
    k_BTHd: Tensor,
    v_BTHv: Tensor,
    a_BTHd: Tensor,
    b_BTHd: Tensor,
    state_BHdv: Tensor,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of ``delta_scan``: its definition, token by token."""
    outputs = []
    for t in range(r_BTHd.shape[1]):
        r, w, k, v, a, b = (x[:, t] for x in (r_BTHd, log_w_BTHd.exp(), k_BTHd, v_BTHv, a_BTHd, b_BTHd))
        if starts_BT is not None:
            state_BHdv = state_BHdv.masked_fill(starts_BT[:, t, None, None, None], 0)
        found_BHv = torch.einsum("bhd,bhdv->bhv", a, state_BHdv)
        state_BHdv = w[..., None] * state_BHdv + b[..., None] * found_BHv[:, :, None] + k[..., None] * v[:, :, None]
        outputs.append(torch.einsum("bhd,bhdv->bhv", r, state_BHdv))
    return torch.stack(outputs, 1), state_BHdv


def _chunked(inputs: list[Tensor], state_BHdv: Tensor, starts_BT: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    T = inputs[0].shape[1]
    Q = min(chunk, T)
    r, log_w, k, v, a, b = (_cut(x, Q) for x in inputs)
    decay = log_w.cumsum(-2)  # c, of tokens 1 to t of the chunk
    whole = decay[..., -1:, :]
    grown = (-decay).exp()
    left = torch.cat((a * (decay - log_w).exp(), r * decay.exp()), -2)  # what reads: (B, H, n, 2 Q, d)
    right = torch.cat((b * grown, k * grown), -2)  # what is read
    last = torch.cat((b, k), -2) * (whole - decay).exp().repeat(1, 1, 1, 2, 1)  # as it is at the chunk's end
    visible, reaches, remains, kept = _visible(Q, starts_BT, T, r.device)
    scores = (left @ right.transpose(-1, -2)) * visible
    if starts_BT is not None:
        left, last = left * reaches, last * remains
    # u = L u + M v + a S, with L and M strictly below the diagonal: u = (I - L)^-1 (M v + a S).
    known = torch.cat((left[..., :Q, :], scores[..., :Q, Q:] @ v), -1)
    solved = torch.linalg.solve_triangular(-scores[..., :Q, :Q], known, upper=False, unitriangular=True)
    of_state, of_values = solved.split((k.shape[-1], v.shape[-1]), -1)
    carry = last[..., :Q, :].transpose(-1, -2) @ of_state + torch.diag_embed((whole.exp() * kept)[..., 0, :])
    added = last.transpose(-1, -2) @ torch.cat((of_values, v), -2)
    states = [state_BHdv]
    for carry_BHdd, added_BHdv in zip(carry.unbind(2), added.unbind(2)):
        states.append(carry_BHdd @ states[-1] + added_BHdv)
    before = torch.stack(states[:-1], 2)
    found = torch.cat((of_state @ before + of_values, v), -2)
    y = left[..., Q:, :] @ before + scores[..., Q:, :] @ found
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), states[-1]


def _cut(x_BTHd: Tensor, chunk: int) -> Tensor:
    """Into chunks, (B, H, n, Q, d); the last is filled up with zeros, which change no memory."""
    B, T, H, d = x_BTHd.shape
    padded = F.pad(x_BTHd, (0, 0, 0, 0, 0, -T % chunk)) if T % chunk else x_BTHd
    return padded.view(B, -1, chunk, H, d).permute(0, 3, 1, 2, 4)


def _visible(Q: int, starts_BT: Tensor | None, T: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each chunk: which of its tokens are seen by the lookups (before them) and the readings (also themselves),
    which of these reach back to the memory before it, which changes remain in the memory behind it, and whether the
    former is a part of the latter.
    """
    triangle = torch.ones(Q, Q, device=device).tril()
    rows = torch.cat((triangle - torch.eye(Q, device=device), triangle))
    visible = torch.cat((rows, rows), 1)
    if starts_BT is None:
        one = visible[-1:, :1]
        return visible, one, one, one
    numbers = F.pad(starts_BT.cumsum(-1), (0, -T % Q), mode="replicate").unflatten(1, (-1, Q))[:, None]
    before = F.pad(numbers[..., -1], (1, 0))[..., :-1, None]
    last = numbers[..., -1:]
    same = (numbers[..., :, None] == numbers[..., None, :]).repeat(1, 1, 1, 2, 2)
    twice = numbers.repeat(1, 1, 1, 2)
    return visible * same, (twice == before)[..., None], (twice == last)[..., None], (before == last)[..., None]


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _load_fla() -> Any:
    from fla.ops.rwkv7 import chunk_rwkv7

    def chunked(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Any:
        inputs = (x.to(v.dtype).contiguous() for x in (r, log_w, k, v, a, b))
        named = dict(zip(("r", "w", "k", "v", "a", "b"), inputs))
        y, state = chunk_rwkv7(**named, scale=1.0, initial_state=state.contiguous(), output_final_state=True)
        return y.to(state.dtype), state

    return chunked


def _example(device: torch.device) -> list[Tensor]:
    r, k, v, x, z = (torch.randn(2, 80, 2, 64, device=device) for _ in range(5))
    log_w = -0.6 * torch.rand(2, 80, 2, 64, device=device)
    x, state = F.normalize(x, dim=-1), torch.randn(2, 2, 64, 64, device=device)
    return [t.requires_grad_() for t in (r, log_w, k, v, -x, x * z.sigmoid(), state)]


FLA_DELTA = OptionalKernel("flash-linear-attention's RWKV-7", _load_fla, naive_delta_scan, _example)
