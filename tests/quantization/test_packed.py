"""Packed layers: the bytes, and that they compute what the fake-quantised layer computed."""

import pytest
import torch
from torch import nn

from lightning_slm.quantization import (
    PackedEmbedding,
    PackedLinear,
    dequantize_weight,
    fake_quantize_weight,
    prepare_qat_,
    quantize_weight,
)
from lightning_slm.quantization.fake import code_range
from lightning_slm.quantization.packed import dequantize_packed, pack, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone_by_unpacking_for_every_code(bits):
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (6, 32)).to(torch.int8)
    codes[0] = torch.arange(32).remainder(high - low + 1).add(low).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_from_bytes_to_weights_is_the_long_one(bits, dtype):
    codes, scale = quantize_weight(torch.randn(6, 64), bits, 16)
    packed = pack(codes, bits)
    short = dequantize_packed(packed, scale, bits, dtype)
    assert torch.equal(short, dequantize_weight(unpack(packed, bits), scale, dtype))


def test_two_codes_of_four_bits_lie_in_a_byte_the_first_half_of_the_row_below_the_second():
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[(-8 + 8) | (0 + 8) << 4, (7 + 8) | (-1 + 8) << 4]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_layer_computes_what_the_fake_one_did(bits, dtype):
    plain = nn.Linear(64, 24, dtype=dtype)
    x = torch.randn(3, 5, 64, dtype=dtype)
    packed = PackedLinear(64, 24, True, bits, 16, int8_activations=False, dtype=dtype)
    codes, scale = quantize_weight(plain.weight, bits, 16)
    packed.weight.data, packed.weight_scale, packed.bias.data = pack(codes, bits), scale, plain.bias.data
    assert torch.equal(packed(x), nn.functional.linear(x, fake_quantize_weight(plain.weight, bits, 16), plain.bias))
    held = sum(t.numel() * t.element_size() for t in (packed.weight, packed.weight_scale))
    assert held == 64 * 24 * bits // 8 + 64 // 16 * 24 * 2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_embedding_answers_as_the_fake_one_did_and_follows_the_models_dtype(bits):
    table = nn.Embedding(50, 32)
    packed = PackedEmbedding(50, 32, bits, 16)
    codes, scale = quantize_weight(table.weight, bits, 16)
    packed.weight.data, packed.weight_scale = pack(codes, bits), scale
    prepare_qat_(nn.ModuleList([table, nn.Linear(16, 1)]), group=16, embedding=f"int{bits}")
    for ids in (torch.randint(50, (2, 7)), torch.randint(50, (200,)), torch.tensor(3)):
        assert torch.equal(packed(ids), table(ids))
    assert packed.to(torch.bfloat16)(ids).dtype == torch.bfloat16
