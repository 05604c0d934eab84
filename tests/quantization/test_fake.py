"""The arithmetic of fake quantisation, against torchao's and against formulas written out by hand."""

import pytest
import torch
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
from torchao.quantization.quant_primitives import _fake_quantize_affine, quantize_affine

from lightning_slm.quantization.fake import (
    code_range,
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
    weight_scales,
)

DTYPES = [torch.float32, torch.bfloat16]


def torchao_fake(weight, bits, group):
    """Torchao's chain of operations, slow and differentiable, at our scales."""
    scale = weight_scales(weight, bits, group)
    low, high = code_range(bits)
    return _fake_quantize_affine(weight.float(), (1, group), scale, torch.zeros_like(scale), torch.int32, low, high).to(
        weight.dtype
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_as_torchao_does_bit_for_bit(bits, group, dtype):
    weight = torch.randn(24, 64, dtype=dtype)
    assert torch.equal(fake_quantize_weight(weight, bits, group), torchao_fake(weight, bits, group))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_those_of_torchao_but_for_their_rounding_to_bfloat16(bits):
    weight = torch.randn(24, 64)
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=16)
    layer = FakeQuantizedLinear(64, 24, weight_config=config)
    layer.weight_fake_quantizer(weight)
    theirs = layer.weight_fake_quantizer.scale
    assert torch.equal(weight_scales(weight, bits, 16), theirs.bfloat16().float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_weight_is_torchaos_straight_through_estimate(bits):
    weight = torch.randn(24, 64)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    towards = torch.randn(24, 64)
    (fake_quantize_weight(ours, bits, 16) * towards).sum().backward()
    (torchao_fake(theirs, bits, 16) * towards).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)  # theirs multiplies by s and by 1 / s
    assert 0 < (ours.grad == 0).sum() < weight.numel() / 4, "the positive ends of the groups are clipped"


@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_compiler_changes_no_bit_of_a_rounded_weight(bits):
    weight = torch.randn(24, 64)
    compiled = torch.compile(lambda w: fake_quantize_weight(w, bits, 16), fullgraph=True)
    assert torch.equal(compiled(weight), fake_quantize_weight(weight, bits, 16))


def test_codes_are_the_formula_written_out_by_hand():
    weight = torch.tensor([[0.9375, -0.45, 0.05, 0.0, -3.75, 1.4, 0.3, -0.1]])
    codes, scale = quantize_weight(weight, bits=4, group=4)
    assert scale.tolist() == [[0.9375 / 7.5, 3.75 / 7.5]]
    # 0.9375 / 0.125 = 7.5 rounds to 8 and is clipped to 7; -3.75 / 0.5 = -7.5 rounds to -8.
    assert codes.tolist() == [[7, -4, 0, 0, -8, 3, 1, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_and_back_is_the_fake_weight_and_torchaos_codes(bits, dtype):
    weight = torch.randn(24, 64, dtype=dtype)
    codes, scale = quantize_weight(weight, bits, 16)
    assert torch.equal(dequantize_weight(codes, scale, dtype), fake_quantize_weight(weight, bits, 16))
    low, high = code_range(bits)
    theirs = quantize_affine(weight.float(), (1, 16), scale.float(), torch.zeros_like(scale), torch.int8, low, high)
    assert torch.equal(codes, theirs)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_stays_a_zero_whole_groups_of_them_included(bits):
    weight = torch.randn(8, 64)
    weight[:, ::2] = 0
    weight[:, :16] = 0
    assert (fake_quantize_weight(weight, bits, 16)[weight == 0] == 0).all()
    assert (quantize_weight(weight, bits, 16)[0][weight == 0] == 0).all()
    assert fake_quantize_weight(weight, bits, 16).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,)], ids=str)
def test_activations_are_rounded_as_torchao_does_bit_for_bit(dtype, shape):
    x = torch.randn(shape, dtype=dtype) * 3
    config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)
    theirs = FakeQuantizedLinear(64, 4, activation_config=config).activation_fake_quantizer
    assert torch.equal(fake_quantize_activation(x), theirs(x))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 8), torch.ones(2, 8), -torch.linspace(0.1, 1, 16).view(2, 8), torch.linspace(5, 6, 16).view(2, 8)],
    ids=["zeros", "ones", "negative", "above five"],
)
def test_zero_is_among_the_levels_of_every_token_and_none_is_far_off(x):
    rounded = fake_quantize_activation(x)
    step = x.abs().max() / 255
    assert (rounded - x).abs().max() <= step
    assert (fake_quantize_activation(torch.cat([x, torch.zeros(2, 1)], dim=1))[:, -1] == 0).all()


def test_the_gradient_of_an_activation_passes_straight_through():
    x = torch.randn(4, 64, requires_grad=True)
    towards = torch.randn(4, 64)
    (fake_quantize_activation(x) * towards).sum().backward()
    assert torch.equal(x.grad, towards)
