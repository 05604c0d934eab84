"""BitNet: linear layers whose weights are -1, 0 or +1 (or only -1 and +1) times one scale, on inputs of eight bits.

Ternary weights ("1.58" bits) are those of Ma et al. 2024 (https://arxiv.org/abs/2402.17764) with the formulas of the
authors' "Training Tips, Code and FAQ" (github.com/microsoft/unilm, folder bitnet); binary ones ("1" bit) those of Wang
et al. 2023 (https://arxiv.org/abs/2310.11453). Training moves full-precision weights behind the codes: the forward pass
multiplies codes, gradients pass straight through the rounding (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).

The products are sums of integers, scaled afterwards. So training, evaluation and the packed layer of an export have the
same sums to the last bit, whatever order they are added in; `naive_bit_linear` is the textbook form, on rounded floats.
"""

# Shape letters: N = tokens (any leading shape), O = outputs, I = inputs.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_slm.errors import near
from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.int8 import as_autocast, int8_product
from lightning_slm.quantization.layers import exchange_

Bits = Literal["1.58", "1"]

# The least absolute mean of weights and the least absolute maximum of a token: the authors'. Zeros stay zeros.
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class BitNet:
    """How one layer computes."""

    bits: Bits = "1.58"  # of a weight: ternary or binary
    sub_norm: bool = False  # whether each token is scaled to a root mean square of 1 before it is rounded

    @property
    def packed_bits(self) -> int:
        """What a weight takes when packed."""
        return 2 if self.bits == "1.58" else 1


class BitLinear(nn.Linear):
    """``nn.Linear`` that multiplies weights of one or 1.58 bits by inputs of eight, and trains the weights behind."""

    settings: BitNet
    share: Tensor | None  # of the rounding that is felt, from 0 to 1; None: all of it

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        if self.settings.sub_norm:
            x = unit_rms(x)
        if self.share is not None:
            return naive_bit_linear(x, self.weight, self.bias, self.settings.bits, self.share)
        y_NO = _BitLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.settings.bits)
        return y_NO.view(*x.shape[:-1], self.out_features)


def bitnet_(
    model: nn.Module, bits: Bits = "1.58", targets: Patterns = "*", skip: Patterns = (), sub_norm: bool = False
) -> list[str]:
    """Let the linear layers of ``model`` compute as BitNet's do, in place; doing it twice is fine.

    Args:
        bits: "1.58" for weights of -1, 0 and +1; "1" for -1 and +1.
        targets: fnmatch patterns of the linear layers; embeddings and output heads are none.
        skip: patterns to leave out again.
        sub_norm: scale each token to a root mean square of 1 before it is rounded, as inside the published layer. It
            has no parameters, so that checkpoints stay those of the plain model.

    Returns: the names of the layers that are BitNet's now.

    Raises:
        ValueError: unknown bits, a pattern that matches nothing, or a layer that another technique has exchanged
            already.
    """
    check_bits(bits)
    settings = BitNet(bits, sub_norm)
    to_a_byte = 8 // settings.packed_bits

    def misfit(layer: nn.Linear) -> str | None:
        if layer.in_features % to_a_byte:
            return f"has rows of {layer.in_features}, and {to_a_byte} codes go into a byte"
        return "has rows too long for exact sums (2**16)" if layer.in_features > 2**16 else None

    return exchange_(model, BitLinear, settings, targets, skip, misfit, prepare=lambda layer: {"share": None})


def check_bits(bits: str) -> None:
    """Raises: ValueError: unknown bits."""
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits!r} must be a string, '1.58' or '1'. {near(str(bits), get_args(Bits))}")


def bit_layers(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """The layers of ``model`` that `bitnet_` exchanged, and their names."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, BitLinear))


def set_share_(model: nn.Module, share: float) -> None:
    """Let a model that was trained without rounding get used to it: compute with ``w + share * (rounded - w)``.

    Inputs likewise. At 0 the layers are plain linear ones (but for ``sub_norm``), at 1 BitNet's.
    """
    # A tensor: a number would be compiled into the graph, anew at every step.
    felt = None if share >= 1 else torch.tensor(float(share))
    for _, layer in bit_layers(model):
        layer.share = felt


# The arithmetic.


def quantize_bits(weight_OI: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes, int8 (O, I), and their scale, float32 (): the mean magnitude of the matrix.

    Ternary: the nearest of -1, 0, +1 to weight / scale. Binary: the side of the mean that the weight is on.
    """
    weight_OI = weight_OI.detach().float()
    scale = weight_OI.abs().mean().clamp(min=_EPS)
    if bits == "1":
        return (weight_OI > weight_OI.mean()).to(torch.int8).mul_(2).sub_(1), scale
    return (weight_OI * (1 / scale)).round_().clamp_(-1, 1).to(torch.int8), scale


def quantize_tokens(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -127 to 127, int8 (N, I), and the step of each token, float32 (N, 1): its largest magnitude / 127.

    A token with a NaN or an infinity has such a step, and so passes it on.
    """
    x_NI = x_NI.detach().float()
    per_step_N1 = 127 / x_NI.abs().amax(-1, keepdim=True).clamp_(min=_EPS)
    return (x_NI * per_step_N1).round_().to(torch.int8), 1 / per_step_N1


def unit_rms(x_NI: Tensor) -> Tensor:
    """Each token divided by its root mean square: RMSNorm without a gain."""
    return F.rms_norm(x_NI, x_NI.shape[-1:], eps=1e-6)


def naive_bit_linear(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, bits: Bits, share: float | Tensor = 1.0
) -> Tensor:
    """The formula as the authors write it, on floats: slow, and the only way while part of the rounding is felt."""
    codes_OI, scale = quantize_bits(weight_OI, bits)
    codes_NI, step_N1 = quantize_tokens(x_NI)
    x_NI = x_NI + share * (codes_NI * step_N1 - x_NI).detach().to(x_NI.dtype)
    weight_OI = weight_OI + share * (codes_OI * scale - weight_OI).detach().to(weight_OI.dtype)
    return F.linear(x_NI, weight_OI.to(x_NI.dtype), None if bias_O is None else bias_O.to(x_NI.dtype))


class _BitLinear(torch.autograd.Function):
    """Saves codes, one byte for each input and weight, where a plain layer saves floats of two or four."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, bits: Bits) -> Tensor:
        codes_NI, step_N1 = quantize_tokens(x_NI)
        codes_OI, scale = quantize_bits(weight_OI, bits)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            codes_OI if wants_x else None, scale, codes_NI if wants_weight else None, step_N1 if wants_weight else None
        )
        ctx.weight_dtype, ctx.bias_dtype = weight_OI.dtype, None if bias_O is None else bias_O.dtype
        return scaled_product(codes_NI, step_N1, codes_OI, scale, bias_O, x_NI.dtype)

    @staticmethod
    @once_differentiable  # rounding has no second derivative
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes_OI, scale, codes_NI, step_N1 = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ codes_OI.to(grad_NO.dtype)).mul_(scale)
        if ctx.needs_input_grad[1]:
            stepped_NO = (grad_NO * step_N1).to(grad_NO.dtype)
            grad_weight = (stepped_NO.T @ codes_NI.to(grad_NO.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def scaled_product(
    codes_NI: Tensor, step_N1: Tensor, codes_OI: Tensor, scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(step x codes) @ (scale x codes).T + bias`` from exact sums of integers, rounded to ``dtype`` once. (N, O)."""
    return scaled_sums(int8_product(codes_NI, codes_OI), step_N1, scale, bias_O, dtype)


def scaled_sums(sums_NO: Tensor, step_N1: Tensor, scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What sums of products of codes stand for."""
    y_NO = (sums_NO * (step_N1 * scale)).to(dtype)
    return y_NO if bias_O is None else y_NO + bias_O.to(dtype)
