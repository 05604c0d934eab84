"""Training with INT4 products (Xi et al. 2023, https://arxiv.org/abs/2306.11987).

Forward, a Hadamard transform spreads outliers over blocks of inputs before both operands are rounded to 4 bits.
Backward, the gradient of the output is split into its high and its low 4 bits, and of these twice as many rows half are
kept, drawn with probabilities that follow their weight in the product (leverage scores), so that its mean is exact.

The arithmetic is emulated with int8 codes in [-8, 7]: PyTorch has no 4-bit product, nor have GPUs since Hopper. What is
learned is what INT4 hardware would learn; time is not saved.
"""

# Shape letters: M = tokens, K = inputs, O = outputs, N = rows of the split gradient (2 M), B = inputs of a Hadamard
# block.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.int8 import as_autocast, int8_product
from lightning_slm.quantization.layers import exchange_

# The step of the 15 levels that lose least of a normal distribution, over its standard deviation (Max 1960,
# https://doi.org/10.1109/TIT.1960.1057548); what a Hadamard transform leaves is near to normal.
_NORMAL_STEP = 0.3534
_LARGEST_BLOCK, _SMALLEST_BLOCK = 32, 8
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Int4:
    """How one layer multiplies."""

    sampled: bool


class Int4Linear(nn.Linear):
    """``nn.Linear`` whose three products (output, gradient of the input, of the weight) are made of 4-bit codes."""

    only_in_training = True
    settings: Int4

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        if x.numel() == 0:  # an expert without a token has no step
            return F.linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))
        y_MO = _Int4.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.settings.sampled)
        return y_MO.view(*x.shape[:-1], -1)


def int4_(model: nn.Module, targets: Patterns = "*", skip: Patterns = (), sampled: bool = True) -> list[str]:
    """Let the linear layers of ``model`` train with INT4 products, in place; doing it twice is fine.

    Layers whose inputs no block of 8, 16 or 32 divides stay in full precision and are named in a warning.

    Args:
        targets: fnmatch patterns of the linear layers; embeddings and output heads are none.
        skip: patterns to leave out again.
        sampled: drop half of the rows of the split gradient at random, as the paper does; False multiplies all of
            them, with less noise and, where 4 bits are emulated, in less time.

    Returns: the names of the layers that multiply in INT4 now.

    Raises:
        ValueError: a pattern that matches nothing, or a layer that another technique has exchanged already.
    """
    return exchange_(model, Int4Linear, Int4(sampled), targets, skip, misfit=_misfit)


# Forward: Hadamard quantiser.


def hadamard_block(inputs: int) -> int:
    """The largest power of two that divides the inputs, 32 at most.

    >>> hadamard_block(768), hadamard_block(40), hadamard_block(33)
    (32, 8, 1)
    """
    return min(inputs & -inputs, _LARGEST_BLOCK)


def hadamard(x_MK: Tensor) -> Tensor:
    """Every block of inputs turned by a Hadamard matrix, orthonormal and its own inverse. float32 (M, K)."""
    block = hadamard_block(x_MK.shape[-1])
    matrix_BB = torch.ones(1, 1, dtype=torch.float32, device=x_MK.device)
    while len(matrix_BB) < block:
        matrix_BB = torch.cat([torch.cat([matrix_BB, matrix_BB]), torch.cat([matrix_BB, -matrix_BB])], dim=1)
    with torch.autocast(x_MK.device.type, enabled=False):
        return (x_MK.float().unflatten(-1, (-1, block)) @ (matrix_BB * block**-0.5)).flatten(-2)


def quantize_int4(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in [-7, 7] and one step for all, float32. A code of 8 or -8 is a 7 that its number lies beyond."""
    step = (x_MK.square().mean().sqrt() * _NORMAL_STEP).clamp(min=_TINY)
    scaled_MK = x_MK / step
    codes_MK = torch.where(scaled_MK.abs() > 7, scaled_MK.sign() * 8, scaled_MK.round())
    return codes_MK.to(torch.int8), step


# Backward: bit splitting, and leverage score sampling.


def split_gradient(grad_MO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """High and low 4 bits, int8 codes in [-8, 7], and their scale, float32.

    ``scale * (16 * high + low)`` is the gradient on average: rounded up with the probability of the part cut off (the
    device's global generator).
    """
    scale = (grad_MO.abs().amax().float() / 119).clamp(min=_TINY)  # 119 = 16 * 7 + 7
    codes_MO = grad_MO.float() / scale
    codes_MO = codes_MO.add_(torch.rand_like(codes_MO)).floor_().clamp_(-119, 119)
    high_MO = ((codes_MO + 8) / 16).floor_()
    return high_MO.to(torch.int8), (codes_MO - 16 * high_MO).to(torch.int8), scale


def keep_probabilities(score_N: Tensor, budget: int) -> Tensor:
    """Probabilities to keep rows: proportional to their scores, 1 at most, and ``budget`` rows on average.

    With these the variance of a sum of rows, each over its probability, is the least (float32, (N,)).
    """
    score_N = score_N.float() / score_N.amax().clamp(min=_TINY)
    sorted_N = score_N.sort(descending=True).values
    rest_N = sorted_N.flip(0).cumsum(0).flip(0).clamp(min=1e-30)  # what remains once the largest are certain
    rate_N = (budget - torch.arange(len(score_N), device=score_N.device)) / rest_N
    first_1 = (rate_N * sorted_N <= 1).int().argmax(0, keepdim=True)
    return (score_N * rate_N.gather(0, first_1)).clamp(max=1)


def whole_weights(probability_N: Tensor) -> Tensor:
    """One over a probability near the given one, such that it is a whole number: 1, 2, 4, 8 or 16; 0 for 0.

    Whole, for the weights of an integer sum must be. float32 (N,).
    """
    weight_N = torch.exp2(-probability_N.clamp(min=1 / 16).log2().round())
    return torch.where(probability_N > 0, weight_N, 0)


def _drawn(weight_N: Tensor) -> Tensor:
    """Each weight with a probability of one over it, else 0."""
    return torch.where(torch.rand_like(weight_N) * weight_N < 1, weight_N, 0)


class _Int4(torch.autograd.Function):
    """Saves the inputs as codes, one byte each; the weight's codes are found again."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None, sampled: bool) -> Tensor:
        x, x_step = quantize_int4(hadamard(x_MK))
        weight, weight_step = quantize_int4(hadamard(weight_OK))
        ctx.save_for_backward(x, x_step, weight_OK)
        ctx.sampled = sampled
        y_MO = int8_product(x.clamp(-7, 7), weight.clamp(-7, 7)).float().mul_(x_step * weight_step).to(x_MK.dtype)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)

    @staticmethod
    @once_differentiable  # rounding has no second derivative
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_step, weight_OK = ctx.saved_tensors
        weight, weight_step = quantize_int4(hadamard(weight_OK))
        high, low, scale = split_gradient(grad_MO)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            product_MK = _input_product(high, low, weight.clamp(-7, 7), ctx.sampled)
            product_MK = torch.where(x.abs() < 8, product_MK, 0)  # no gradient where a number was cut off
            grad_x = hadamard(product_MK * (scale * weight_step)).to(grad_MO.dtype)
        if ctx.needs_input_grad[1]:
            product_OK = _weight_product(high, low, x.clamp(-7, 7), ctx.sampled)
            product_OK = torch.where(weight.abs() < 8, product_OK, 0)
            grad_weight = hadamard(product_OK * (scale * x_step)).to(weight_OK.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _input_product(high_MO: Tensor, low_MO: Tensor, weight_OK: Tensor, sampled: bool) -> Tensor:
    """The gradient times the weight, in codes: on average, if sampled. float32 (M, K)."""
    if not sampled:
        return int8_product(16 * high_MO + low_MO, weight_OK.T).float()
    score_N = torch.cat([16 * _norm(high_MO), _norm(low_MO)])
    probability_N = keep_probabilities(score_N, len(high_MO))
    drawn_N = _drawn(torch.where(probability_N > 0, 1 / probability_N.clamp(min=_TINY), 0)).unsqueeze(1)
    high_M1, low_M1 = drawn_N.chunk(2)
    return (
        int8_product(high_MO, weight_OK.T).float() * (16 * high_M1) + int8_product(low_MO, weight_OK.T).float() * low_M1
    )


def _weight_product(high_MO: Tensor, low_MO: Tensor, x_MK: Tensor, sampled: bool) -> Tensor:
    """The gradient, turned, times the inputs, in codes: on average, if sampled. float32 (O, K)."""
    if not sampled:
        return int8_product((16 * high_MO + low_MO).T, x_MK.T).float()
    x_M = _norm(x_MK)
    score_N = torch.cat([16 * _norm(high_MO) * x_M, _norm(low_MO) * x_M])
    drawn_N = _drawn(whole_weights(keep_probabilities(score_N, len(high_MO)))).to(torch.int8).unsqueeze(1)
    high_M1, low_M1 = drawn_N.chunk(2)  # codes times weights are 16 * 8 at most: they fit int8
    return int8_product((high_MO * high_M1).T, x_MK.T).float() * 16 + int8_product((low_MO * low_M1).T, x_MK.T).float()


def _norm(codes_MK: Tensor) -> Tensor:
    return codes_MK.float().square_().sum(1).sqrt_()


def _misfit(layer: nn.Linear) -> str | None:
    if hadamard_block(layer.in_features) >= _SMALLEST_BLOCK:
        return None
    sizes = f"of ({layer.out_features}, {layer.in_features})"
    return f"{sizes} has {layer.in_features} inputs, which no Hadamard block of 8, 16 or 32 divides"
