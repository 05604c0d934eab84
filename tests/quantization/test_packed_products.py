"""The short ways of packed layers: BitNet's bytes, one loop when compiled, blocks of rows, and the 4-bit kernel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_slm.quantization.int4_kernel as int4_kernel
import lightning_slm.quantization.packed as packed_module
from lightning_slm.quantization import PackedLinear, fake_quantize_activation, quantize_weight
from lightning_slm.quantization.bitnet import BitNet, bitnet_, quantize_bits
from lightning_slm.quantization.int4_kernel import Int4KernelBitLinear, Int4KernelLinear, use_int4_kernel_
from lightning_slm.quantization.packed import PackedBitLinear, bit_sums, pack, pack_bits, row_product, unpack_bits

BITS = ["1.58", "1"]


def codes_of(bits, *shape):
    return (
        torch.randint(-1, 2, shape, dtype=torch.int8)
        if bits == "1.58"
        else torch.randint(2, shape).mul(2).sub(1).char()
    )


def trained_and_packed(bits, inputs=64, outputs=48, bias=True, sub_norm=False, dtype=torch.float32):
    """BitNet's layer, and the same on packed codes."""
    layer = nn.Linear(inputs, outputs, bias, dtype=dtype)
    bitnet_(nn.Sequential(layer), bits, sub_norm=sub_norm)
    packed = PackedBitLinear(inputs, outputs, bias, layer.settings, dtype)
    codes, scale = quantize_bits(layer.weight, bits)
    state = {"weight": pack_bits(codes, layer.settings), "weight_scale": scale.reshape(1).view(torch.int32)}
    packed.load_state_dict({**layer.state_dict(), **state})
    return layer, packed


def group_layer(bits, group=32, inputs=128, outputs=48, int8_activations=False, dtype=torch.float32):
    layer = PackedLinear(inputs, outputs, True, bits, group, int8_activations, dtype)
    codes, layer.weight_scale = quantize_weight(torch.randn(outputs, inputs), bits, group)
    layer.weight.data, layer.bias.data = pack(codes, bits), torch.randn(outputs, dtype=dtype)
    return layer


def compiled(module):
    module = copy.deepcopy(module)
    module.compile(backend="aot_eager", fullgraph=True)
    return module


# BitNet.


@pytest.mark.parametrize("bits", BITS)
def test_bitnets_codes_fill_their_bytes_and_come_back(bits):
    settings = BitNet(bits)
    codes = codes_of(bits, 6, 32)
    packed = pack_bits(codes, settings)
    assert packed.numel() * 8 == codes.numel() * settings.packed_bits
    assert torch.equal(unpack_bits(packed, settings), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 64, 48), (9, 64, 48), (1, 200, 1), (3, 8, 5), (0, 64, 16)], ids=str)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_sums_over_the_bytes_are_those_of_the_unpacked_codes_exactly(bits, shape, how):
    tokens, inputs, outputs = shape
    settings, x = BitNet(bits), torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    x[:1] = 127  # the largest sums there are
    codes = codes_of(bits, outputs, inputs)
    codes[:1] = 1
    work = bit_sums if how == "eager" else torch.compile(bit_sums, backend="aot_eager", dynamic=False)
    sums = work(pack_bits(codes, settings), x, settings)
    assert torch.equal(sums.long(), x.long() @ codes.long().T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 64), (64,), (0, 64)], ids=str)
@pytest.mark.parametrize(("bias", "sub_norm"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_bitnet_layer_answers_as_the_trained_one_bit_for_bit(bits, shape, bias, sub_norm, dtype):
    layer, packed = trained_and_packed(bits, bias=bias, sub_norm=sub_norm, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(packed(x), layer(x))
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), layer(x))


@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
@pytest.mark.parametrize("bits", BITS)
def test_compiled_a_packed_bitnet_layer_answers_the_same_to_float32s_rounding(bits):
    layer, packed = trained_and_packed(bits)
    for x in (torch.randn(1, 1, 64), torch.randn(2, 5, 64)):
        torch.testing.assert_close(compiled(packed)(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "bytes_"), [("1.58", 64 * 48 // 4), ("1", 64 * 48 // 8)])
def test_it_holds_so_many_bytes_and_four_for_the_scale_which_no_cast_touches(bits, bytes_):
    _, packed = trained_and_packed(bits, bias=False)
    held = {name: t.numel() * t.element_size() for name, t in packed.state_dict().items()}
    assert held == {"weight": bytes_, "weight_scale": 4}
    scale = packed.weight_scale.view(torch.float32).clone()
    assert torch.equal(packed.to(torch.bfloat16).weight_scale.view(torch.float32), scale)


# Groups.


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 128), (128,)], ids=str)
def test_one_loop_over_the_bytes_is_the_product_to_float32s_rounding(bits, shape):
    layer, x = group_layer(bits), torch.randn(shape)
    want = layer(x)
    torch.testing.assert_close(
        row_product(layer.weight, layer.weight_scale, x.flatten(), bits) + layer.bias, want.flatten()
    )
    torch.testing.assert_close(compiled(layer)(x), want)


def test_compiled_rows_whose_groups_cross_the_stretches_and_several_tokens_are_unpacked():
    crossing = group_layer(4, group=32, inputs=96)  # stretches of 48
    for layer, x in ((crossing, torch.randn(1, 96)), (group_layer(4), torch.randn(3, 128))):
        torch.testing.assert_close(compiled(layer)(x), layer(x))


@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (128,)], ids=str)
def test_large_matrices_are_unpacked_in_blocks_with_the_same_result(shape, monkeypatch):
    layer, x = group_layer(4, outputs=100), torch.randn(shape)
    want = layer(x)
    monkeypatch.setattr(packed_module, "_UNPACKED", 16 * 128)  # seven blocks, the last one smaller
    torch.testing.assert_close(layer(x), want)


# The 4-bit kernel.


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (2, 50, 128), (128,)], ids=str)
@pytest.mark.parametrize("block", [16 * 128, 2**22])
def test_the_kernel_computes_the_packed_layer_but_for_bfloat16s_rounding_of_the_sums(
    bits, int8_activations, shape, block, monkeypatch
):
    monkeypatch.setattr(int4_kernel, "_BLOCK", block)
    layer = group_layer(bits, int8_activations=int8_activations, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    rounded = fake_quantize_activation(x) if int8_activations else x
    exact = F.linear(rounded.float(), layer.dequantized(torch.float32))
    model = nn.Sequential(layer)
    assert use_int4_kernel_(model) == use_int4_kernel_(model) == ["0"], "twice is once"
    assert isinstance(model[0], Int4KernelLinear)
    # Half a step of bfloat16 for the sum, and for sum and bias together.
    off = (model(x).float() - (exact + layer.bias.float())).abs()
    assert (off <= 2**-8 * (exact.abs() + model(x).float().abs()) + 1e-3).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sub_norm", [False, True])
def test_the_kernel_computes_bitnets_layer_but_for_one_more_rounding_of_the_sums(bits, sub_norm):
    _, packed = trained_and_packed(bits, inputs=96, bias=False, sub_norm=sub_norm, dtype=torch.bfloat16)
    x = torch.randn(2, 50, 96, dtype=torch.bfloat16)
    want, model = packed(x).float(), nn.Sequential(packed)
    use_int4_kernel_(model)
    assert isinstance(model[0], Int4KernelBitLinear)
    assert ((model(x).float() - want).abs() <= 2**-7 * want.abs()).all()


def test_the_kernel_holds_four_bits_a_weight_and_the_scales():
    model = nn.Sequential(
        group_layer(4, dtype=torch.bfloat16), trained_and_packed("1.58", 48, 32, dtype=torch.bfloat16)[1]
    )
    with pytest.raises(ValueError, match=r"'1' has rows of 48, and 32 must divide them"):
        use_int4_kernel_(model)
    assert isinstance(model[0], PackedLinear), "nothing was changed"
    del model[1]
    use_int4_kernel_(model)
    held = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if "bias" not in name)
    assert held == 48 * 128 // 2 + 48 * 4 * 2 * 2


def test_what_the_kernel_cannot_do_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"no packed linear layers; load a folder"):
        use_int4_kernel_(nn.Sequential(nn.Linear(32, 16)))
    with pytest.raises(ValueError, match=r"parameters of torch.float32: load it with dtype=torch.bfloat16"):
        use_int4_kernel_(nn.Sequential(group_layer(4)))
    with pytest.raises(ValueError, match=r"'0' has groups of 16, and the kernel knows \(32, 64"):
        use_int4_kernel_(nn.Sequential(group_layer(4, group=16, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match=r"'0' has 40 outputs, and the kernel wants a multiple of 16"):
        use_int4_kernel_(nn.Sequential(group_layer(4, outputs=40, dtype=torch.bfloat16)))
