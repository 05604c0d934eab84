"""The arithmetic: weights as low-bit codes with one scale per group, activations as 8-bit codes per token.

The numbers are torchao's (symmetric groups for weights, asymmetric tokens for activations), so that a model trained
here converts into torchao's tensors without a difference in a single bit. Two things are ours: the scales are rounded
to bfloat16 *while training*, so that a file may hold them in two bytes and still be exact; and the passes over memory
are fewer (torchao's chain of operations is the slow twin in the tests).
"""

# Shape letters: O = outputs, I = inputs, G = groups of a row (I / group), S = inputs of one group, N = tokens.

from typing import Any

import torch
from torch import Tensor

# The smallest scale: keeps a group of zeros at zero (0 * 2**126 = 0) where a scale of 0 would make it NaN.
_TINY = torch.finfo(torch.bfloat16).smallest_normal


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code.

    >>> code_range(4), code_range(2)
    ((-8, 7), (-2, 1))
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_scales(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """One scale per group: the largest magnitude over half the code range. float32 of bfloat16 precision, (O, G)."""
    weight_OGS = weight_OI.detach().unflatten(-1, (-1, group))
    largest_OG = torch.maximum(weight_OGS.amax(-1), -weight_OGS.amin(-1)).float()
    scale_OG = (largest_OG / ((2**bits - 1) / 2)).clamp_(min=_TINY)
    # To bfloat16's sixteen bits by integers: the compiler drops a cast there and back as pointless.
    return ((scale_OG.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)


def quantize_weight(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """The codes, int8 (O, I), and their scales, bfloat16 (O, G). A zero becomes code 0: pruned weights stay pruned."""
    scale_OG = weight_scales(weight_OI, bits, group)
    codes_OGS = _round_to_codes(weight_OI.detach(), scale_OG).clamp_(*code_range(bits))
    return codes_OGS.flatten(-2).to(torch.int8), scale_OG.bfloat16()


def dequantize_weight(codes_OI: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for: code x scale, multiplied in float32, then rounded to ``dtype``."""
    codes_OGS = codes_OI.unflatten(-1, (scale_OG.shape[-1], -1))
    return codes_OGS.float().mul_(scale_OG.float().unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize_weight(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """``dequantize(quantize(weight))`` in one go, in the weight's dtype, with the straight-through gradient.

    As in torchao, no gradient reaches a weight that its code cannot follow (the positive end of a symmetric range).
    """
    return _FakeQuantizeWeight.apply(weight_OI, bits, group)


def fake_quantize_activation(x_NI: Tensor) -> Tensor:
    """Round every token to 256 levels between its own minimum and maximum (zero included), in the tensor's dtype.

    The gradient passes straight through. (N may be any leading shape.)
    """
    return _FakeQuantizeActivation.apply(x_NI)


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bits: int, group: int) -> Tensor:
        low, high = code_range(bits)
        scale_OG = weight_scales(weight_OI, bits, group)
        codes_OGS = _round_to_codes(weight_OI, scale_OG)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes_OGS <= high).flatten(-2))  # never below `low`: the range is longer there
        return codes_OGS.clamp_(low, high).mul_(scale_OG.unsqueeze(-1)).flatten(-2).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inside_OI,) = ctx.saved_tensors
        return torch.where(inside_OI, grad_OI, 0), None, None


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor) -> Tensor:
        # amin and amax: aminmax, which does both, is thirty times slower along the last axis on CPU.
        low_N1 = x_NI.amin(-1, keepdim=True).clamp_(max=0)
        high_N1 = x_NI.amax(-1, keepdim=True).clamp_(min=0)
        scale_N1 = ((high_N1 - low_N1) / 255.0).clamp_(min=torch.finfo(x_NI.dtype).smallest_normal)
        zero_N1 = (-128 - (low_N1 / scale_N1).round_()).clamp_(-128, 127)
        codes_NI = (x_NI * (1.0 / scale_N1)).round_().add_(zero_N1).clamp_(-128, 127)
        return codes_NI.sub_(zero_N1).mul_(scale_N1)

    @staticmethod
    def backward(ctx: Any, grad_NI: Tensor) -> Tensor:  # type: ignore[override]
        return grad_NI


def _round_to_codes(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Codes as float32 (O, G, S), not yet clamped to their range."""
    weight_OGS = weight_OI.unflatten(-1, (scale_OG.shape[-1], -1)).float()
    return (weight_OGS * (1.0 / scale_OG).unsqueeze(-1)).round_()
