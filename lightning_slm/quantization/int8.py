"""Training with INT8 products: all three matrix products of a linear layer multiply int8 codes into int32 sums.

Two ways to choose the scales. ``rowwise``: one scale per row of the left and per column of the right operand, as in
torchao's INT8 mixed-precision training (https://github.com/pytorch/ao, ``torchao.prototype.quantized_training``).
``blockwise``: one scale per square block, Jetfire (Xi et al. 2024, https://arxiv.org/abs/2403.12422), where the codes
of the forward pass also serve the backward. The weights stay in full precision, for the optimizer.
"""

# Shape letters: M = tokens, K = inputs, O = outputs, N = columns of a product; m, k, o, n = blocks of these;
# B = side of a block.

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_slm.errors import near
from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.layers import exchange_

Recipe = Literal["rowwise", "blockwise"]
_CACHED = 2**20  # float32 sums that a CPU keeps at hand between two passes; measured on an EPYC with 1 MB of L2


@dataclass(frozen=True, slots=True)
class Int8:
    """How one layer multiplies."""

    recipe: Recipe
    block: int | None  # side of the squares that share a scale; None with "rowwise"


class Int8Linear(nn.Linear):
    """``nn.Linear`` whose three products (output, gradient of the input, of the weight) are made of int8 codes."""

    only_in_training = True
    settings: Int8

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        if x.numel() == 0:  # an expert without a token has no largest value
            return F.linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))
        x_MK = x.reshape(-1, x.shape[-1])
        if self.settings.block is None:
            y_MO = _Rowwise.apply(x_MK, self.weight, self.bias)
        else:
            y_MO = _Blockwise.apply(x_MK, self.weight, self.bias, self.settings.block)
        return y_MO.view(*x.shape[:-1], -1)


def int8_(
    model: nn.Module,
    recipe: Recipe = "rowwise",
    block: int = 32,
    targets: Patterns = "*",
    skip: Patterns = (),
) -> list[str]:
    """Let the linear layers of ``model`` train with INT8 products, in place; doing it twice is fine.

    Args:
        recipe: "rowwise" (a scale per token and per output, torchao's) or "blockwise" (a scale per square, Jetfire's).
        block: side of the squares of "blockwise"; the paper's is 32. Sizes it does not divide are padded with zeros.
        targets: fnmatch patterns of the linear layers; embeddings and output heads are none.
        skip: patterns to leave out again.

    Returns: the names of the layers that multiply in INT8 now.

    Raises:
        ValueError: an unknown recipe, a block below 2, a pattern that matches nothing, or a layer that another
            technique has exchanged already.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipe={recipe!r} is unknown. {near(recipe, get_args(Recipe))}")
    if block < 2:
        raise ValueError(f"block={block} must be the side of a square of at least 2 x 2 numbers; the paper's is 32.")
    return exchange_(model, Int8Linear, Int8(recipe, block if recipe == "blockwise" else None), targets, skip)


def as_autocast(x: Tensor) -> Tensor:
    """The input as ``F.linear`` would take it: cast where autocast is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


# Rows.


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 (M, K), and one scale per row, (M,) in the tensor's dtype: the largest magnitude over 127."""
    scale_M = x_MK.abs().amax(1) / 127
    codes_MK = (x_MK.float() * (1 / scale_M.float().clamp(min=1e-12)).unsqueeze(1)).round_()
    return codes_MK.clamp_(-128, 127).to(torch.int8), scale_M  # -128: a bfloat16 scale may be rounded down


def rowwise_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ b.T`` by int8 codes of the rows of both. float32 (M, N)."""
    (a, a_scale), (b, b_scale) = quantize_rows(a_MK), quantize_rows(b_NK)
    return (int8_product(a, b) * b_scale.float()).mul_(a_scale.float().unsqueeze(1))


class _Rowwise(torch.autograd.Function):
    """Saves what ``F.linear`` saves: in the backward pass the scales run along the other axis, over fresh codes."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_MK if wants_weight else None, weight_OK if wants_x else None)
        ctx.weight_dtype = weight_OK.dtype
        y_MO = rowwise_product(x_MK, weight_OK.to(x_MK.dtype)).to(x_MK.dtype)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)

    @staticmethod
    @once_differentiable  # rounding has no second derivative
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_MK, weight_OK = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = rowwise_product(grad_MO, weight_OK.to(grad_MO.dtype).T).to(grad_MO.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = rowwise_product(grad_MO.T, x_MK.T).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0)
        return grad_x, grad_weight, grad_bias


# Blocks.


def quantize_blocks(x_MK: Tensor, block: int, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """Codes, int8, zeros added up to whole blocks (m B, k B), and a float32 scale per block, (m, k).

    A scale is the largest magnitude of its block over 127.

    Args:
        stochastic: round up with the probability of the part cut off (the device's global generator), so that codes
            times scales are ``x`` on average; else to the nearest.
    """
    rows, columns = x_MK.shape
    if rows % block or columns % block:
        x_MK = F.pad(x_MK, (0, -columns % block, 0, -rows % block))
    x_mBkB = x_MK.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale_mk = (x_mBkB.abs().amax((1, 3)) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    codes_mBkB = x_mBkB / scale_mk[:, None, :, None]
    codes_mBkB = codes_mBkB.add_(torch.rand_like(codes_mBkB)).floor_() if stochastic else codes_mBkB.round_()
    return codes_mBkB.clamp_(-127, 127).to(torch.int8).flatten(2).flatten(0, 1), scale_mk


def blockwise_product(a_MK: Tensor, a_mk: Tensor, b_NK: Tensor, b_nk: Tensor) -> Tensor:
    """``a @ b.T`` of codes in blocks and their scales. float32 (M, N).

    Sums within a block are integers; those of the blocks of a row are scaled and added in float32.
    """
    m, n, block = len(a_mk), len(b_nk), len(a_MK) // len(a_mk)
    if torch.compiler.is_compiling() or not (a_MK.device.type == "cpu" and _cpu_multiplies_int8()):
        # The same numbers up to float32's rounding. One kernel per column of blocks would be slow on a GPU, and a long
        # graph to compile.
        with torch.autocast(a_MK.device.type, enabled=False):
            return _dequantize_blocks(a_MK, a_mk) @ _dequantize_blocks(b_NK, b_nk).T
    total_mBnB = torch.zeros(m, block, n, block, dtype=torch.float32)  # not the default dtype, which may be half
    a_kMB, b_kNB = (codes.unflatten(1, (-1, block)).transpose(0, 1).contiguous() for codes in (a_MK, b_NK))
    tall = max(1, _CACHED // (n * block**2))  # so many rows of blocks that their sums stay in the cache
    for i in range(0, m, tall):
        part_iBnB = total_mBnB[i : i + tall]
        for k in range(len(a_kMB)):
            sum_iBnB = int8_product(a_kMB[k, i * block : (i + tall) * block], b_kNB[k]).float().view_as(part_iBnB)
            part_iBnB.addcmul_(sum_iBnB, (a_mk[i : i + tall, k, None] * b_nk[:, k])[:, None, :, None])
    return total_mBnB.view(m * block, n * block)


def _dequantize_blocks(codes_MK: Tensor, scale_mk: Tensor) -> Tensor:
    codes_mBkB = codes_MK.unflatten(1, (scale_mk.shape[1], -1)).unflatten(0, (len(scale_mk), -1))
    return (codes_mBkB * scale_mk[:, None, :, None]).flatten(2).flatten(0, 1)


class _Blockwise(torch.autograd.Function):
    """Saves the inputs as codes, one byte each. A square has the same scale along both axes: its codes serve twice."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None, block: int) -> Tensor:
        x, x_mk = quantize_blocks(x_MK, block)
        weight, weight_ok = quantize_blocks(weight_OK, block)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        saved = (x, x_mk) if wants_weight else (None, None)
        ctx.save_for_backward(*saved, weight_OK if wants_x else None)  # its codes would be a second copy
        ctx.block, ctx.weight_dtype, ctx.shape = block, weight_OK.dtype, weight_OK.shape
        y_MO = blockwise_product(x, x_mk, weight, weight_ok)[: len(x_MK), : len(weight_OK)].to(x_MK.dtype)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_mk, weight_OK = ctx.saved_tensors
        outputs, inputs = ctx.shape
        grad, grad_mo = quantize_blocks(grad_MO, ctx.block, stochastic=True)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight, weight_ok = quantize_blocks(weight_OK, ctx.block)
            grad_x = blockwise_product(grad, grad_mo, weight.T, weight_ok.T)
            grad_x = grad_x[: len(grad_MO), :inputs].to(grad_MO.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = blockwise_product(grad.T, grad_mo.T, x.T, x_mk.T)
            grad_weight = grad_weight[:outputs, :inputs].to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0)
        return grad_x, grad_weight, grad_bias, None


# Integers.


def int8_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ b.T`` of int8 codes, exact. int32 (M, N)."""
    kind = a_MK.device.type
    if kind == "cuda" or (kind == "cpu" and _cpu_multiplies_int8()):
        return _int_mm(a_MK, b_NK)
    with torch.autocast(kind, enabled=False):  # 1024 products of at most 2**14 each: float32 holds every sum exactly
        parts = [a.float() @ b.float().T for a, b in zip(a_MK.split(1024, 1), b_NK.split(1024, 1))]
    return torch.stack([part.to(torch.int32) for part in parts]).sum(0, dtype=torch.int32)


def _int_mm(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``torch._int_mm`` for any sizes: zeros are added where they are too small or odd for it, and taken off again."""
    (rows, inputs), columns = a_MK.shape, len(b_NK)
    more = -inputs % 8  # cuBLAS wants eights; on a CPU a single column is multiplied wrongly (torch 2.13)
    more_a, more_b = (max(17 - rows, 0), -columns % 8) if a_MK.is_cuda else (0, 0)
    if more or more_a or more_b:
        a_MK, b_NK = F.pad(a_MK, (0, more, 0, more_a)), F.pad(b_NK, (0, more, 0, more_b))
    return torch._int_mm(a_MK.contiguous(), b_NK.contiguous().T)[:rows, :columns]


@torch.compiler.assume_constant_result
def _cpu_multiplies_int8() -> bool:
    """Whether this CPU has instructions for sums of int8 products, and PyTorch gets them right."""
    return _int_mm_is_exact()


@cache
def _int_mm_is_exact() -> bool:
    if not torch.cpu._is_vnni_supported():  # without them oneDNN cuts sums of two products off at sixteen bits
        return False
    ones = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(ones, ones.T) == 64 * 127**2).all())  # oneDNN can be told to use older instructions
