"""Layers whose weights stay packed: two 4-bit codes, four 2-bit codes or eight signs to a byte, in memory and on disk.

One token at a time, which is how text is written, the time of a layer is the time to read its weights: few bits are
fast if they are not written out again as floats on the way. BitNet's layers multiply the bytes themselves (`bit_sums`).
Layers with scales in groups do so where they are compiled, in one loop over the bytes (`row_product`); else they unpack
blocks of rows, which is exact to the bit and slower than a dense layer. The fast way without compiling is
`lightning_slm.quantization.int4_kernel`.
"""

# Shape letters: O = outputs (or vocabulary), I = inputs, G = groups of a row, P = packed bytes of a row, N = tokens.

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_slm.quantization.bitnet import BitNet, quantize_tokens, scaled_sums, unit_rms
from lightning_slm.quantization.fake import code_range, fake_quantize_activation
from lightning_slm.quantization.int8 import as_autocast, int8_product

# So many weights at most are floats at a time: more do not fit the caches, and are slow to get from the system.
_UNPACKED = 2**20


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 (O, I), as bytes: uint8 (O, I * bits / 8).

    The row is cut into 8 / bits stretches of equal length and byte p holds the p-th code of each, the first stretch in
    the lowest bits: unpacking then writes contiguous stretches.

    >>> pack(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8), 4).tolist()   # 8 + (-8), 8 + 0 << 4; ...
    [[128, 159]]
    """
    parts = (codes_OI - code_range(bits)[0]).to(torch.uint8).chunk(8 // bits, dim=-1)
    packed_OP = parts[0].clone()
    for k, part_OP in enumerate(parts[1:], 1):
        packed_OP |= part_OP << (bits * k)
    return packed_OP


def unpack(packed_OP: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: int8 (O, I)."""
    parts = [(packed_OP >> (bits * k)) & (2**bits - 1) for k in range(8 // bits)]
    return (torch.cat(parts, dim=-1).to(torch.int16) + code_range(bits)[0]).to(torch.int8)


def dequantize_packed(packed_OP: Tensor, scale_OG: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``dequantize_weight(unpack(packed), scale)`` with fewer passes over memory: what a packed layer computes with.

    (O may be any leading shape.)
    """
    columns = packed_OP.shape[-1] * 8 // bits
    weight_OI = torch.empty(*packed_OP.shape[:-1], columns, dtype=torch.float32, device=packed_OP.device)
    for k, stretch in enumerate(weight_OI.chunk(8 // bits, dim=-1)):
        # Signed while it is a byte: below zero uint8 wraps around, which is what int8 is.
        stretch.copy_((field(packed_OP, k, bits) + code_range(bits)[0]).view(torch.int8))
    weight_OI.unflatten(-1, (scale_OG.shape[-1], -1)).mul_(scale_OG.float().unsqueeze(-1))
    return weight_OI.to(dtype)


def row_product(packed_OP: Tensor, scale_OG: Tensor, x_I: Tensor, bits: int) -> Tensor:
    """``dequantized @ x`` for one token, float32 (O,): one loop over the bytes where it is compiled.

    The groups must not cross the stretches that `pack` cuts a row into.
    """
    stretches = 8 // bits
    total_O = torch.zeros(len(packed_OP), device=packed_OP.device)
    for k, (x_P, scale_Og) in enumerate(zip(x_I.float().chunk(stretches), scale_OG.float().chunk(stretches, dim=-1))):
        codes_OP = field(packed_OP, k, bits).float() + code_range(bits)[0]
        weight_OgS = codes_OP.unflatten(-1, (scale_Og.shape[-1], -1)) * scale_Og.unsqueeze(-1)
        total_O = total_O + (weight_OgS.flatten(-2) * x_P).sum(-1)
    return total_O


def field(packed_OP: Tensor, k: int, bits: int) -> Tensor:
    """The k-th code of every byte, from 0 up."""
    if k == 0 and bits == 8:
        return packed_OP
    high_OP = packed_OP >> (bits * k) if k else packed_OP
    return high_OP if (k + 1) * bits == 8 else high_OP & (2**bits - 1)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts in a row; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Packed(nn.Module):
    """Codes are the parameter ``weight``, without gradient, so that transformers ties the layers that were tied.

    Scales are a buffer: as a parameter, their bfloat16 would pass for the dtype of the model.
    """

    weight_scale: Tensor
    like: Tensor

    def __init__(self, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        codes_OP = torch.zeros(rows, columns * bits // 8, dtype=torch.uint8)
        scale_OG = torch.ones(rows, columns // group, dtype=torch.bfloat16)
        self.weight = nn.Parameter(codes_OP, requires_grad=False)
        self.register_buffer("weight_scale", scale_OG)
        # Empty; follows `.to(dtype)` and so says in which dtype an embedding answers.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight matrix in ``dtype``, (O, I)."""
        return dequantize_packed(self.weight, self.weight_scale, self.bits, dtype or self.like.dtype)


class PackedLinear(_Packed):
    """``nn.Linear`` on packed weights: equal, bit for bit, to the fake-quantised layer it was exported from.

    Weights are unpacked for every call, large matrices block by block: memory stays small, and a call costs some passes
    over the weights more. Compiled and for a single token it is one loop, which adds up in another order, in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        group: int,
        int8_activations: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group, dtype)
        self.in_features, self.out_features, self.int8_activations = in_features, out_features, int8_activations
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.int8_activations:
            x = fake_quantize_activation(x)
        whole_groups = not self.weight.shape[1] % self.group  # in each stretch of a row
        if torch.compiler.is_compiling() and x.numel() == self.in_features and whole_groups:
            y_O = row_product(self.weight, self.weight_scale, x.flatten(), self.bits).to(x.dtype)
            return (y_O if self.bias is None else y_O + self.bias).view(*x.shape[:-1], -1)
        rows = max(16, _UNPACKED // self.in_features)
        blocks = zip(
            self.weight.split(rows),
            self.weight_scale.split(rows),
            [None] * self.out_features if self.bias is None else self.bias.split(rows),
        )
        parts = [
            F.linear(x, dequantize_packed(codes_OP, scale_OG, self.bits, self.like.dtype), bias_O)
            for codes_OP, scale_OG, bias_O in blocks
        ]
        return joined(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


class PackedEmbedding(_Packed):
    """``nn.Embedding`` on packed weights: only the rows that are looked up are unpacked."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize_packed(self.weight[ids], self.weight_scale[ids], self.bits, self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group={self.group}"


# BitNet: one scale for the whole matrix, and inputs that are integers too.


def pack_bits(codes_OI: Tensor, settings: BitNet) -> Tensor:
    """BitNet's codes as bytes, uint8 (O, I / 4) or (O, I / 8), in the order of `pack`.

    Ternary codes lie there as 1, 2, 3 for -1, 0, +1; binary ones as 0 and 1 for -1 and +1. The highest bit of the byte
    is turned over: its last code is then signed, as the byte is.

    >>> pack_bits(torch.tensor([[-1, 0, 1, 0]], dtype=torch.int8), BitNet("1.58")).tolist()  # 1 + 2 * 4 + 3 * 16
    [[57]]
    >>> pack_bits(torch.tensor([[1, 1, -1, 1, -1, -1, -1, -1]]).to(torch.int8), BitNet("1")).tolist()  # 1 + 2 + 8 + 128
    [[139]]
    """
    return pack(codes_OI if settings.bits == "1.58" else (codes_OI - 1) >> 1, settings.packed_bits) ^ 0x80


def unpack_bits(packed_OP: Tensor, settings: BitNet) -> Tensor:
    """The inverse of ``pack_bits``: int8 (O, I)."""
    codes_OI = unpack(packed_OP ^ 0x80, settings.packed_bits)
    return codes_OI if settings.bits == "1.58" else codes_OI * 2 + 1


def bit_sums(packed_OP: Tensor, codes_NI: Tensor, settings: BitNet) -> Tensor:
    """``codes @ unpack_bits(packed).T``, exact, without writing the weights out: int32 (N, O).

    The codes of a byte are masked and multiplied where they lie, the k-th 2**(bits * k) times too large; the others are
    brought up to the last, and the sum down again.
    """
    bits = settings.packed_bits
    masks = tuple((2**bits - 1) << (bits * k) for k in range(8 // bits))
    parts_kOP: Any
    if torch.compiler.is_compiling():
        parts_kOP = [(packed_OP & mask).view(torch.int8) for mask in masks]
    else:  # at once: small operations take as long as what they do
        parts_kOP = (packed_OP & _column(masks, packed_OP.device)).view(torch.int8)
    *stretches, last_NP = codes_NI.chunk(8 // bits, dim=1)
    sums_NO = int8_product(last_NP, parts_kOP[-1])
    for k, x_NP in enumerate(stretches):
        sums_NO.add_(int8_product(x_NP, parts_kOP[k]), alpha=1 << (8 - bits - bits * k))
    sums_NO >>= 8 - bits
    lowered_N1 = codes_NI[:, : -last_NP.shape[1]].sum(1, keepdim=True, dtype=torch.int32)  # all but the last: unsigned
    sums_NO -= lowered_N1 << (bits - 1)
    return sums_NO if settings.bits == "1.58" else 2 * sums_NO + codes_NI.sum(1, keepdim=True, dtype=torch.int32)


@cache
def _column(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Bytes as (k, 1, 1)."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.uint8, device=device)[:, None, None]


class PackedBitLinear(nn.Module):
    """BitNet's layer on packed weights: the same integers, and so the same outputs, as the layer it was exported from.

    The scale is a float32 kept as the int32 of the same bits, so that casting the model leaves it alone.
    """

    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, settings: BitNet, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.settings = in_features, out_features, settings
        codes_OP = torch.zeros(out_features, in_features * settings.packed_bits // 8, dtype=torch.uint8)
        self.weight = nn.Parameter(codes_OP, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_buffer("weight_scale", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        if self.settings.sub_norm:
            x = unit_rms(x)
        codes_NI, step_N1 = quantize_tokens(x.reshape(-1, self.in_features))
        sums_NO = bit_sums(self.weight, codes_NI, self.settings)
        y_NO = scaled_sums(sums_NO, step_N1, self.weight_scale.view(torch.float32), self.bias, x.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.settings.bits}"
