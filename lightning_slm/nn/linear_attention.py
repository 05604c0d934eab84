"""Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236): a kernel of features instead of the
softmax, so that a text is summed up in a matrix of fixed size.
"""

# Shape letters: B = batch, T = tokens of this call, D = model width, H = query heads, K = key-value heads,
# R = query heads to a key-value head, d = head width, f = features of a key, e = width of a value and its one,
# C = tokens of a chunk, n = chunks, N = B K n.

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.attention import Attention
from lightning_slm.nn.kernels import OptionalKernel
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import rotate

_EPS = 1e-6  # added to the denominator, as in the authors' code
_Rope = tuple[Tensor, Tensor]


class LinearAttention(Attention):
    """y_t = phi(q_t) S_t / (phi(q_t) z_t), with S_t the sum of phi(k_s) v_s' and z_t that of phi(k_s).

    In a decoder the sums run over the tokens up to t, in chunks when a text is read and one by one when it is
    written; in an encoder, over all. They are taken in float32. Scores are not divided by sqrt(d): a common factor of
    numerator and denominator would cancel.

    Rotary positions turn phi(q) and phi(k) in the numerator and leave the denominator as it is (Su et al. 2021,
    https://arxiv.org/abs/2104.09864, section 3.3): turned features can be negative, and their sum near zero. Turning
    before phi would be no rotation any more, and the score no function of the distance.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
        feature_map: phi, one of ``FEATURE_MAPS``.
        chunk: tokens that are multiplied with each other at once. It changes speed, not results.
    """

    bidirectional: ClassVar[bool] = True
    cache_type: ClassVar[str] = "linear_attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        feature_map: str = "elu1",
        chunk: int = 64,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        if feature_map not in FEATURE_MAPS:
            known = ", ".join(map(repr, FEATURE_MAPS))
            raise ValueError(f"linear_attention: feature_map={feature_map!r} must be one of {known}.")
        if chunk < 1:
            raise ValueError(f"linear_attention: chunk={chunk} must be at least 1; 64 is usual.")
        self.feature_map, self.chunk = feature_map, chunk

    @classmethod
    def from_config(cls, config: Any, *, feature_map: str = "elu1", chunk: int = 64) -> Self:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*sizes, feature_map, chunk)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.project(x_BTD, context)
        state = context.state(layer_idx).get("linear_state") if context.causal else None
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BHTd, state = normalised(self._sums(T, context, state), q, k, v, context.rope, state)
        if context.causal and context.cache is not None:
            context.keep(layer_idx, linear_state=state.detach())
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1).to(x_BTD.dtype))

    def project(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values, in float32 or better; rotation comes later."""
        q, k, v = super().project(x_BTD, Context())
        phi = FEATURE_MAPS[self.feature_map][0]
        return phi(q), phi(k), v.to(_precise(v))

    def _sums(self, T: int, context: Context, state: Tensor | None) -> "Sums":
        starts_BT, tokens_BS = context.starts_BT, context.tokens_BS
        if not context.causal:
            return lambda q, k, v, _: two_sided_sums(q, k, v, tokens_BS, starts_BT)
        if T == 1 and state is not None:
            return lambda q, k, v, s: sums_of_one(q, k, v, s, starts_BT)
        return lambda q, k, v, s: causal_sums(q, k, v, s, starts_BT, self.chunk)

    def flops_per_token(self, context: int) -> int:
        """Of the matrices, and two each for every element of the state that is written and every one that is read."""
        f = self.head_dim * FEATURE_MAPS[self.feature_map][1]
        matrices = sum(2 * m.in_features * m.out_features for m in (self.qkv_proj, self.o_proj))
        return matrices + 2 * (self.num_heads + self.num_kv_heads) * f * (self.head_dim + 1)


# ---- feature maps: every feature is at least zero, so that no denominator is below it


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020): e^x below zero, x + 1 above."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EluPlusOne.apply(x)
    return F.elu(x.to(_precise(x))) + 1


def relu(x: Tensor) -> Tensor:
    """The positive part, plus 0.001 (Performer-ReLU, Choromanski et al. 2021, https://arxiv.org/abs/2009.14794)."""
    return F.relu(x.to(_precise(x))) + 1e-3


def softmax(x: Tensor) -> Tensor:
    """The softmax over a head of x, and that of -x: Hedgehog's exponentials that cannot overflow (Zhang et al. 2024,
    https://arxiv.org/abs/2402.04347); its linear map is the projection before them.
    """
    x = x.to(_precise(x))
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)


def dpfp(x: Tensor) -> Tensor:
    """Products of neighbours among (relu(x), relu(-x)) (DPFP with nu = 1, Schlag et al. 2021,
    https://arxiv.org/abs/2102.11174).
    """
    x = x.to(_precise(x))
    both = torch.cat((F.relu(x), F.relu(-x)), -1)
    return both * both.roll(1, -1)


# The map, and its features for each number that it is given.
FEATURE_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "elu1": (elu1, 1),
    "relu": (relu, 1),
    "softmax": (softmax, 2),
    "dpfp": (dpfp, 2),
}


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _EluPlusOne(torch.autograd.Function):
    """Its slope is min(y, 1), so that nothing but the features is kept, which the sums keep anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=_precise(x), device=x.device).copy_(x)
        y = F.elu(y, inplace=True).add_(1)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (grad * y.clamp(max=1)).to(ctx.dtype)


# ---- sums over tokens: (q, k, v, state) to what each query finds, (B, H, T, e), and the state after, (B, K, f, e)

Sums = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def normalised(
    sums: Sums, q_BHTf: Tensor, k_BKTf: Tensor, v_BKTd: Tensor, rope: _Rope | None, state_BKfe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values that the queries find, divided by the sum of their weights, (B, H, T, d); and the state after.

    Args:
        sums: over which tokens.
        rope: turns the features of the numerator.
        state_BKfe: of earlier calls: sums of the values, and in the last column of ones.
    """
    if rope is None:
        found_BHTe, state = sums(q_BHTf, k_BKTf, F.pad(v_BKTd, (0, 1), value=1.0), state_BKfe)
        above, below = found_BHTe.split((v_BKTd.shape[-1], 1), -1)
        return divided(above, below), state
    values, ones = (None, None) if state_BKfe is None else state_BKfe.split((v_BKTd.shape[-1], 1), -1)
    above, values = sums(rotate_features(q_BHTf, rope), rotate_features(k_BKTf, rope), v_BKTd, values)
    below, ones = sums(q_BHTf, k_BKTf, torch.ones_like(v_BKTd[..., :1]), ones)
    return divided(above, below), torch.cat((values, ones), -1)


def divided(above_BHTd: Tensor, below_BHT1: Tensor) -> Tensor:
    """Values over the sum of their weights."""
    if below_BHT1.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Divided.apply(above_BHTd, below_BHT1)
    return above_BHTd / (below_BHT1 + _EPS)


class _Divided(torch.autograd.Function):
    """Half the passes of a quotient's own gradient: what was divided is not needed again, the quotient is."""

    @staticmethod
    def forward(ctx: Any, above_BHTd: Tensor, below_BHT1: Tensor) -> Tensor:
        inverse_BHT1 = (below_BHT1 + _EPS).reciprocal_()
        y_BHTd = above_BHTd * inverse_BHT1
        ctx.save_for_backward(y_BHTd, inverse_BHT1)
        return y_BHTd

    @staticmethod
    def backward(ctx: Any, grad_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        y_BHTd, inverse_BHT1 = ctx.saved_tensors
        slope_BHTd = grad_BHTd * inverse_BHT1
        return slope_BHTd, -(slope_BHTd * y_BHTd).sum(-1, keepdim=True)


def rotate_features(x_BHTf: Tensor, rope: _Rope) -> Tensor:
    """Turn features by their positions' angles, each head's width of them for itself."""
    cos, sin = (angle.unsqueeze(-2) for angle in rope)
    return rotate(x_BHTf.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin).flatten(-2)


def sums_of_one(
    q_BH1f: Tensor, k_BK1f: Tensor, v_BK1e: Tensor, state_BKfe: Tensor | None, starts_B1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of a single token after others: the recurrence itself."""
    assert state_BKfe is not None
    if starts_B1 is not None:
        state_BKfe = state_BKfe * ~starts_B1[:, :, None, None]
    state_BKfe = torch.addcmul(state_BKfe, k_BK1f.transpose(-1, -2), v_BK1e)
    found = q_BH1f.view(q_BH1f.shape[0], state_BKfe.shape[1], -1, q_BH1f.shape[-1]) @ state_BKfe
    return found.view(*q_BH1f.shape[:-1], -1), state_BKfe


def two_sided_sums(
    q_BHTf: Tensor, k_BKTf: Tensor, v_BKTe: Tensor, tokens_BT: Tensor | None, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Over all tokens of a row that are no padding, or over those of the same packed text."""
    if tokens_BT is None and starts_BT is not None:
        before, state = causal_sums(q_BHTf, k_BKTf, v_BKTe, None, starts_BT)
        ends_BT = F.pad(starts_BT[:, 1:], (0, 1))
        after, _ = causal_sums(q_BHTf.flip(2), k_BKTf.flip(2), v_BKTe.flip(2), None, ends_BT.flip(1))
        R = q_BHTf.shape[1] // k_BKTf.shape[1]
        k, v = (t.repeat_interleave(R, 1) for t in (k_BKTf, v_BKTe))
        return before + after.flip(2) - (q_BHTf * k).sum(-1, keepdim=True) * v, state
    if tokens_BT is not None:
        k_BKTf = k_BKTf * tokens_BT[:, None, :, None]
    state = k_BKTf.transpose(-1, -2) @ v_BKTe
    B, H, T, f = q_BHTf.shape
    return (q_BHTf.reshape(B, state.shape[1], -1, f) @ state).view(B, H, T, -1), state


def causal_sums(
    q_BHTf: Tensor,
    k_BKTf: Tensor,
    v_BKTe: Tensor,
    state_BKfe: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Over the tokens up to each one's own, within its text.

    A chunk's tokens are multiplied with each other as in attention, and with the sum of all chunks before: T C + T f
    products for each channel instead of T².

    Args:
        state_BKfe: sums of earlier calls; None: zeros.
        starts_BT: where texts begin (see `Context`).
        chunk: C.
    """
    long = q_BHTf.shape[2] >= q_BHTf.shape[1]  # the kernel refuses fewer tokens than heads
    kernel = _FLA.get(q_BHTf) if long and starts_BT is None else None
    if kernel is not None:
        return kernel(q_BHTf, k_BKTf, v_BKTe, state_BKfe)
    return _chunked(q_BHTf, k_BKTf, v_BKTe, state_BKfe, starts_BT, chunk)


def naive_causal_sums(
    q_BHTf: Tensor,
    k_BKTf: Tensor,
    v_BKTe: Tensor,
    state_BKfe: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of ``causal_sums``: token by token."""
    R = q_BHTf.shape[1] // k_BKTf.shape[1]
    state = k_BKTf.new_zeros(()) if state_BKfe is None else state_BKfe
    found = []
    for t in range(q_BHTf.shape[2]):
        if starts_BT is not None:
            state = state * ~starts_BT[:, t, None, None, None]
        state = state + k_BKTf[:, :, t, :, None] * v_BKTe[:, :, t, None, :]
        found.append(torch.einsum("bhf,bhfe->bhe", q_BHTf[:, :, t], state.repeat_interleave(R, 1)))
    return torch.stack(found, 2), state


# ---- the chunks, opaque to the compiler because of the loop over them


class _Chunks:
    """How tensors of (B, heads, T, f) are cut into products: (N, R C, f) of queries and (N, C, f) of keys.

    The last chunk is filled up with zeros, which add nothing. Query heads that share keys are rows of one product.
    """

    def __init__(self, q_BHTf: Tensor, k_BKTf: Tensor, starts_BT: Tensor | None, chunk: int) -> None:
        B, H, self.T, _ = q_BHTf.shape
        K, C = k_BKTf.shape[1], min(chunk, self.T)
        n = -(-self.T // C)
        self.sizes, self.R, self.fill = (B, K, n, C), H // K, n * C - self.T
        self.same = self.early = self.late = self.passes = None
        if starts_BT is not None:
            text_BnC = self._texts(starts_BT).view(B, n, C)
            last_Bn1 = text_BnC[:, :, -1:]
            previous_Bn1 = F.pad(last_Bn1[:, :-1], (0, 0, 1, 0))  # the first text goes on from the state
            self.same = (text_BnC.unsqueeze(-1) == text_BnC.unsqueeze(-2))[:, None, :, None]
            self.early = (text_BnC == previous_Bn1)[:, None, :, None, :, None]
            self.late = (text_BnC == last_Bn1)[:, None, :, None, :, None]
            self.passes = (last_Bn1 == previous_Bn1)[:, None, :, :, None]

    def _texts(self, starts_BT: Tensor) -> Tensor:
        numbers_BT = starts_BT.cumsum(-1)
        return torch.cat((numbers_BT, numbers_BT[:, -1:].expand(-1, self.fill)), 1)

    def fold(self, x: Tensor) -> Tensor:
        B, K, n, C = self.sizes
        if self.fill:
            x = F.pad(x, (0, 0, 0, self.fill))
        return x.reshape(B, K, -1, n, C, x.shape[-1]).transpose(2, 3).reshape(B * K * n, -1, x.shape[-1])

    def unfold(self, x: Tensor) -> Tensor:
        B, K, n, C = self.sizes
        x = x.view(B, K, n, -1, C, x.shape[-1]).transpose(2, 3)
        return x.reshape(B, -1, n * C, x.shape[-1])[:, :, : self.T].contiguous()

    def visible_(self, scores: Tensor) -> Tensor:
        """Only those of a query and a key that is not after it, nor of another text."""
        B, K, n, C = self.sizes
        scores.view(-1, C, C).tril_()
        if self.same is not None:
            scores.view(B, K, n, -1, C, C).mul_(self.same)
        return scores

    def where(self, mask: Tensor | None, x: Tensor) -> Tensor:
        """Rows of queries or keys, zero where the mask is not: ``early`` still sees the state that a chunk begins
        with, ``late`` goes into the one that it leaves.
        """
        if mask is None:
            return x
        B, K, n, C = self.sizes
        return (x.view(B, K, n, -1, C, x.shape[-1]) * mask).view_as(x)

    def carry(self, sums: Tensor, state_BKfe: Tensor | None, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """From each chunk's own sums, (N, f, e), to those of all before it (or after it), and of all."""
        B, K, n, _ = self.sizes
        sums_BKnfe = sums.view(B, K, n, *sums.shape[1:])
        carried = torch.empty_like(sums_BKnfe)
        state = torch.zeros_like(sums_BKnfe[:, :, 0]) if state_BKfe is None else state_BKfe
        own, out = sums_BKnfe.unbind(2), carried.unbind(2)
        passes = None if self.passes is None else self.passes.unbind(2)
        for i in reversed(range(n)) if backwards else range(n):
            out[i].copy_(state)
            state = own[i] + (state if passes is None else state * passes[i])
        return carried.view_as(sums), state


@torch.library.custom_op("lightning_slm::linear_attention_sums", mutates_args=())
def _chunked(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        cut = _Chunks(q, k, starts, chunk)
        q, k, v = cut.fold(q), cut.fold(k), cut.fold(v)
        before, after = cut.carry(cut.where(cut.late, k).mT @ v, state)
        found = cut.visible_(q @ k.mT) @ v
        return cut.unfold(found.baddbmm_(cut.where(cut.early, q), before)), after


@_chunked.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Any, starts: Any, chunk: int) -> tuple[Tensor, Tensor]:
    e = v.shape[-1]
    return q.new_empty(*q.shape[:-1], e), q.new_empty(*k.shape[:2], q.shape[-1], e)


@torch.library.custom_op("lightning_slm::linear_attention_sums_backward", mutates_args=())
def _chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    grad: Tensor,
    grad_state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and states are computed anew: kept, they would be as large as the values."""
    with torch.autocast(q.device.type, enabled=False):
        cut = _Chunks(q, k, starts, chunk)
        q, k, v, grad = cut.fold(q), cut.fold(k), cut.fold(v), cut.fold(grad)
        q_early, k_late = cut.where(cut.early, q), cut.where(cut.late, k)
        before, _ = cut.carry(k_late.mT @ v, state)
        grad_after, grad_first = cut.carry(q_early.mT @ grad, grad_state, backwards=True)
        scores, grad_scores = cut.visible_(q @ k.mT), cut.visible_(grad @ v.mT)
        grad_v = (scores.mT @ grad).baddbmm_(k_late, grad_after)
        grad_q = (grad_scores @ k).baddbmm_(cut.where(cut.early, grad), before.mT)
        grad_k = (grad_scores.mT @ q).baddbmm_(cut.where(cut.late, v), grad_after.mT)
        return cut.unfold(grad_q), cut.unfold(grad_k), cut.unfold(grad_v), grad_first


@_chunked_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, state: Any, starts: Any, grad: Tensor, grad_state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same = [t.new_empty(t.shape) for t in (q, k, v)]
    return same[0], same[1], same[2], grad_state.new_empty(grad_state.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.chunk = inputs[5]


def _gradients(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, state, starts = ctx.saved_tensors
    grads = _chunked_backward(q, k, v, state, starts, grad, grad_state, ctx.chunk)
    return *grads[:3], None if state is None else grads[3], None, None


_chunked.register_autograd(_gradients, setup_context=_keep_inputs)


# ---- on NVIDIA GPUs, flash-linear-attention's kernel where it is installed


def _load_fla() -> Callable[..., Any]:
    from fla.ops.linear_attn import chunk_linear_attn

    def sums(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        R = q.shape[1] // k.shape[1]
        if R > 1:
            k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
            state = None if state is None else state.repeat_interleave(R, 1)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        found, after = chunk_linear_attn(
            q, k, v, scale=1.0, initial_state=state, output_final_state=True, normalize=False
        )
        return found.transpose(1, 2), after[:, ::R]

    return sums


def _example(device: torch.device) -> list[Tensor]:
    q, k = (torch.rand(1, heads, 96, 64, device=device).requires_grad_() for heads in (4, 2))
    v, state = (torch.randn(1, 2, rows, 65, device=device).requires_grad_() for rows in (96, 64))
    return [q, k, v, state]


_FLA = OptionalKernel("flash-linear-attention's chunk_linear_attn", _load_fla, naive_causal_sums, _example)
