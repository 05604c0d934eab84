"""Layers whose weights stay packed: two 4-bit codes or four 2-bit codes to a byte, in memory and on disk."""

# Shape letters: O = outputs (or vocabulary), I = inputs, G = groups of a row, P = packed bytes of a row.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_slm.quantization.fake import code_range, fake_quantize_activation


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
        stretch.copy_((packed_OP >> (bits * k)) & (2**bits - 1) if bits < 8 else packed_OP)
    weight_OI.add_(code_range(bits)[0])
    weight_OI.unflatten(-1, (scale_OG.shape[-1], -1)).mul_(scale_OG.float().unsqueeze(-1))
    return weight_OI.to(dtype)


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

    Weights are unpacked for every call: memory stays small, and a call costs one pass over the weights more.
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
        return F.linear(x, self.dequantized(), self.bias)

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
