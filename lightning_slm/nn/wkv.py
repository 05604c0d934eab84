"""The WKV operator of RWKV-4 (Peng et al. 2023, https://arxiv.org/abs/2305.13048): a weighted mean of the values.

Channel by channel, with decay rate λ > 0 and bonus u:

    y_t = (sum_{s<t} e^{k_s - λ (t-1-s)} v_s + e^{k_t + u} v_t) / (the same without v)

Numerator and denominator are two linear recurrences with the same decay. Their states are kept divided by e^m, where m
is the largest exponent so far, so that keys of any size neither overflow nor make the denominator vanish. Time is cut
into pieces that are read side by side, then what each hands to the next is carried along: T/Q + Q short steps in place
of T.
"""

# Shape letters: B = batch, T = tokens of this call, D = channels, n = pieces, Q = tokens of a piece.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.kernels import OptionalKernel

_NEVER = -1e30  # an exponent: of what has not been seen
_PIECE = 16


def wkv(
    time_decay_D: Tensor,
    time_first_D: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    state_B3D: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted means, (B, T, D), and the state after the last token.

    Computed in float32 whatever the precision of k and v.

    Args:
        time_decay_D: log λ.
        time_first_D: the bonus u of the token itself.
        state_B3D: numerator, denominator and their exponent, as of the call before; None: nothing seen yet. The
            exponent is a scale and has no gradient.
        starts_BT: True where nothing before is to be seen.
    """
    if state_B3D is None:
        state_B3D = empty_state(k_BTD)
    if k_BTD.shape[1] == 1 and starts_BT is None:
        return _step(time_decay_D, time_first_D, k_BTD, v_BTD, state_B3D)
    kernel = FLA_WKV.get(k_BTD) if starts_BT is None else None
    if kernel is not None:
        return kernel(time_decay_D, time_first_D, k_BTD, v_BTD, state_B3D)
    rate_D = time_decay_D.to(state_B3D.dtype).exp()
    y_BTD, state, _ = _wkv(rate_D, time_first_D, k_BTD, v_BTD, state_B3D, starts_BT)
    return y_BTD, state


def empty_state(k_BTD: Tensor) -> Tensor:
    """The state before any token, (B, 3, D)."""
    B, _, D = k_BTD.shape
    state_B3D = torch.zeros(B, 3, D, dtype=_precise(k_BTD), device=k_BTD.device)
    state_B3D[:, 2] = _NEVER
    return state_B3D


def naive_wkv(
    time_decay_D: Tensor,
    time_first_D: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    state_B3D: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of ``wkv``: token by token."""
    state_B3D = empty_state(k_BTD) if state_B3D is None else state_B3D
    outputs = []
    for t in range(k_BTD.shape[1]):
        if starts_BT is not None:
            state_B3D = torch.where(starts_BT[:, t, None, None], empty_state(k_BTD), state_B3D)
        now = slice(t, t + 1)
        y_B1D, state_B3D = _step(time_decay_D, time_first_D, k_BTD[:, now], v_BTD[:, now], state_B3D)
        outputs.append(y_B1D)
    return torch.cat(outputs, 1), state_B3D


def _step(
    time_decay_D: Tensor, time_first_D: Tensor, k_B1D: Tensor, v_B1D: Tensor, state_B3D: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, in few operations: decoding is nothing else."""
    before_B2D, most_B1D = state_B3D.split((2, 1), 1)
    k, most = k_B1D.to(state_B3D.dtype), most_B1D.detach()
    pair_B2D = torch.cat((v_B1D.to(k.dtype), torch.ones_like(k)), 1)
    near = k + time_first_D
    top = torch.maximum(most, near).detach()
    sums_B2D = (most - top).exp() * before_B2D + (near - top).exp() * pair_B2D
    faded = most - time_decay_D.exp()
    top = torch.maximum(faded, k).detach()
    after_B2D = (faded - top).exp() * before_B2D + (k - top).exp() * pair_B2D
    return (sums_B2D[:, :1] / sums_B2D[:, 1:]).to(v_B1D.dtype), torch.cat((after_B2D, top), 1)


class _Pieces:
    """Tokens cut into pieces, (B, n, Q, D), and the weights that they and what came before have.

    Args:
        state_B3D: before the first token; its exponent counts.
    """

    def __init__(
        self,
        rate_D: Tensor,
        first_D: Tensor,
        k_BTD: Tensor,
        v_BTD: Tensor,
        state_B3D: Tensor,
        starts_BT: Tensor | None,
    ) -> None:
        self.rate, self.first, self.dtype = rate_D, first_D, state_B3D.dtype
        self.k, self.v, self.state = self.cut(k_BTD, _NEVER), self.cut(v_BTD), state_B3D
        self.starts = None if starts_BT is None else self.cut(starts_BT[..., None]).mul_(_NEVER)
        self.most = self.most_before = self.k

    def cut(self, x_BTD: Tensor, padding: float = 0.0) -> Tensor:
        """Into pieces; the last is filled up."""
        B, T, D = x_BTD.shape
        return F.pad(x_BTD.to(self.dtype), (0, 0, 0, -T % _PIECE), value=padding).view(B, -1, _PIECE, D)

    def running_maximum(self) -> Tensor:
        """The largest exponent so far, faded by the decay: within pieces, over pieces, then of both."""
        most = self.k.clone()
        fade = self.rate if self.starts is None else self.rate - self.starts  # (D,) or (B, n, Q, D)
        each, fades = most.unbind(2), [fade] * _PIECE if self.starts is None else fade.unbind(2)
        total = [fades[0]]
        for i in range(1, _PIECE):
            torch.maximum(each[i], each[i - 1] - fades[i], out=each[i])
            total.append(total[-1] + fades[i])
        carried = [self.state[:, 2]]
        whole = total[-1] if self.starts is None else total[-1].unbind(1)
        for i, last in enumerate(each[-1].unbind(1)[:-1]):
            fade = whole if isinstance(whole, Tensor) else whole[i]
            carried.append(torch.maximum(last, carried[-1] - fade))
        return torch.maximum(most, torch.stack(carried, 1)[:, :, None] - torch.stack(total, -2), out=most)

    def see(self, most: Tensor) -> None:
        """Take the exponents that states are divided by."""
        self.most = most
        self.most_before = torch.cat((self.state[:, None, 2], most.flatten(1, 2)[:, :-1]), 1).view_as(most)
        if self.starts is not None:
            self.most_before += self.starts
        near = self.k + self.first
        top = torch.maximum(self.most_before, near)
        self.near_weight = near.sub_(top).exp_()
        self.far_weight = torch.sub(self.most_before, top, out=top).exp_()

    def decay(self) -> Tensor:
        """What is left of each state in the next one."""
        return (self.most_before - self.rate).sub_(self.most).exp_()

    def before(self, states: Tensor) -> Tensor:
        """Numerator and denominator before each token."""
        first = self.state.transpose(0, 1)[:2, :, None]
        return torch.cat((first, states.flatten(2, 3)[:, :, :-1]), 2).view_as(states)

    def sums(self, before: Tensor) -> Tensor:
        """Numerator and denominator of the outputs."""
        sums = before * self.far_weight
        sums[0].addcmul_(self.near_weight, self.v)
        sums[1].add_(self.near_weight)
        return sums


def _scan_(decay: Tensor, states: Tensor, first: Tensor, backwards: bool = False) -> None:
    """``states[t] += decay[t] * states[t - 1]``, in place; backwards, ``states[t + 1]``.

    Args:
        decay: (B, n, Q, D).
        states: (2, B, n, Q, D).
        first: before the first (behind the last), (2, B, D).
    """
    step = -1 if backwards else 1
    within, fades = states.unbind(3)[::step], decay.unbind(2)[::step]
    total = [fades[0]]
    for i in range(1, _PIECE):
        within[i].addcmul_(fades[i], within[i - 1])
        total.append(total[-1] * fades[i])
    carried = [first]
    for last, fade in zip(within[-1].unbind(2)[::step][:-1], total[-1].unbind(1)[::step]):
        carried.append(torch.addcmul(last, fade, carried[-1]))
    states.addcmul_(torch.stack(total[::step], 2), torch.stack(carried[::step], 2).unsqueeze(3))


@torch.library.custom_op("lightning_slm::wkv", mutates_args=())
def _wkv(
    rate_D: Tensor, first_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state_B3D: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state, and all states (3, B, n, Q, D) for the backward pass."""
    T = k_BTD.shape[1]
    p = _Pieces(rate_D, first_D, k_BTD, v_BTD, state_B3D, starts_BT)
    states = p.k.new_empty(3, *p.k.shape)
    states[2] = p.running_maximum()
    p.see(states[2])
    torch.exp(torch.sub(p.k, p.most, out=states[1]), out=states[1])
    torch.mul(states[1], p.v, out=states[0])
    _scan_(p.decay(), states[:2], state_B3D.transpose(0, 1)[:2])
    sums = p.sums(p.before(states[:2]))
    y_BTD = torch.div(*sums).flatten(1, 2)[:, :T].to(v_BTD.dtype).contiguous()
    # Padding behind the last token fades the state, so it is read before.
    return y_BTD, states.flatten(2, 3)[:, :, T - 1].transpose(0, 1).contiguous(), states


@_wkv.register_fake
def _(
    rate_D: Tensor, first_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state_B3D: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = k_BTD.shape
    states = state_B3D.new_empty(3, B, -(-T // _PIECE), _PIECE, D)
    return v_BTD.new_empty(v_BTD.shape), state_B3D.new_empty(state_B3D.shape), states


@torch.library.custom_op("lightning_slm::wkv_backward", mutates_args=())
def _wkv_backward(
    grad_BTD: Tensor,
    grad_state_B3D: Tensor,
    rate_D: Tensor,
    first_D: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    state_B3D: Tensor,
    starts_BT: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of decay rate, bonus, k, v and the first state."""
    T = k_BTD.shape[1]
    p = _Pieces(rate_D, first_D, k_BTD, v_BTD, state_B3D, starts_BT)
    p.see(states[2])
    before, decay, weight = p.before(states[:2]), p.decay(), torch.exp(p.k - p.most)
    sums = p.sums(before)
    y = torch.div(*sums)
    grad = p.cut(grad_BTD) / sums[1]  # of the numerator; times -y, of the denominator
    grad_v = grad * p.near_weight
    grad_k = (p.v - y).mul_(grad_v)
    grad_first_D = grad_k.sum((0, 1, 2))
    torch.mul(grad, p.far_weight, out=sums[0])
    torch.mul(sums[0], y, out=sums[1]).neg_()
    grads = _through_states_(decay, sums, grad_state_B3D, T)
    grad_v.addcmul_(weight, grads[0])
    grad_k.addcmul_(weight, torch.addcmul(grads[1], grads[0], p.v))
    kept = torch.addcmul(grads[1] * before[1], grads[0], before[0]).mul_(decay)
    grad_before = torch.addcmul(sums[:, :, 0, 0], decay[:, 0, 0], grads[:, :, 0, 0])
    return (
        kept.sum((0, 1, 2)).neg_().to(rate_D.dtype),
        grad_first_D.to(first_D.dtype),
        grad_k.flatten(1, 2)[:, :T].to(k_BTD.dtype).contiguous(),
        grad_v.flatten(1, 2)[:, :T].to(v_BTD.dtype).contiguous(),
        F.pad(grad_before.transpose(0, 1), (0, 0, 0, 1)),
    )


def _through_states_(decay: Tensor, of_outputs: Tensor, grad_state_B3D: Tensor, T: int) -> Tensor:
    """Gradients of all states (2, B, n, Q, D), each from the next output, ``of_outputs``, and from the next state."""
    grads, fades = torch.empty_like(of_outputs), torch.empty_like(decay)
    flat, flat_fades = grads.flatten(2, 3), fades.flatten(1, 2)
    flat[:, :, :-1] = of_outputs.flatten(2, 3)[:, :, 1:]
    flat_fades[:, :-1] = decay.flatten(1, 2)[:, 1:]
    flat[:, :, T - 1 :], flat_fades[:, T - 1 :] = 0, 0
    flat[:, :, T - 1] = grad_state_B3D.transpose(0, 1)[:2]
    _scan_(fades, grads, torch.zeros_like(flat[:, :, 0]), backwards=True)
    return grads


@_wkv_backward.register_fake
def _(grad_BTD: Tensor, grad_state_B3D: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in saved[:5])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, grad_BTD: Tensor, grad_state_B3D: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_wkv_backward(grad_BTD, grad_state_B3D, *ctx.saved_tensors), None


_wkv.register_autograd(_backward, setup_context=_keep_for_backward)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _load_fla() -> Any:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def fused(
        time_decay_D: Tensor, time_first_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state_B3D: Tensor
    ) -> tuple[Tensor, Tensor]:
        parameters = (time_decay_D.float(), time_first_D.float())
        y_BTD, state = fused_recurrent_rwkv4(
            *parameters, k_BTD.contiguous(), v_BTD.contiguous(), state_B3D[:, :, None].contiguous()
        )
        return y_BTD, state[:, :, 0].detach()

    return fused


def _reference(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    y_BTD, state_B3D = naive_wkv(*arguments)
    return y_BTD, state_B3D.detach()


def _example(device: torch.device) -> list[Tensor]:
    k, v = (torch.randn(2, 24, 64, device=device, requires_grad=True) for _ in range(2))
    decay, first = (torch.randn(64, device=device, requires_grad=True) for _ in range(2))
    return [decay, first, k, v, empty_state(k)]


FLA_WKV = OptionalKernel("flash-linear-attention's WKV", _load_fla, _reference, _example)
