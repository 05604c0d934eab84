"""BitNet's layers against transformers', torchao's and the papers' formulas; and as a swap that nobody notices."""

import copy
import warnings

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn
from torch.nn import functional as F

from lightning_slm.errors import NoEffectWarning
from lightning_slm.quantization import prepare_qat_
from lightning_slm.quantization.bitnet import (
    BitLinear,
    BitNet,
    bit_layers,
    bitnet_,
    naive_bit_linear,
    quantize_bits,
    quantize_tokens,
    set_share_,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compiles functions when it is imported, and the compiler warns of itself
    from transformers.integrations.bitnet import AutoBitLinear

SHAPES = [(7, 64), (2, 3, 64), (64,)]


def bit_linear(bits="1.58", bias=True, sub_norm=False, inputs=64, outputs=48):
    return bitnet_of(nn.Linear(inputs, outputs, bias), bits, sub_norm)


def bitnet_of(linear, bits="1.58", sub_norm=False):
    bitnet_(nn.Sequential(linear), bits, sub_norm=sub_norm)
    return linear


def outputs_and_gradients(layer, x, towards):
    """Of any function of x with parameters: its output, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad((y * towards).sum(), [x, *parameters])]


def assert_near(ours, theirs, tolerance=1e-6):
    """Differences relative to the largest value of each tensor."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_a_ternary_layer_computes_and_learns_as_that_of_transformers(shape, bias, sub_norm):
    ours = bit_linear(bias=bias, sub_norm=sub_norm)
    theirs = AutoBitLinear(64, 48, bias, online_quant=True, use_rms_norm=sub_norm)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    if sub_norm:
        theirs.rms_norm.requires_grad_(False)  # ours has no gain
    x, towards = torch.randn(shape) * 3, torch.randn(*shape[:-1], 48)
    with torch.compiler.set_stance("force_eager"):  # theirs compile themselves
        expected = outputs_and_gradients(theirs, x, towards)
    assert_near(outputs_and_gradients(ours, x, towards), expected)


def test_the_ternary_formula_of_the_authors_written_out():
    layer, x = bit_linear(), torch.randn(5, 64)
    w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    s = 1.0 / w.abs().mean().clamp(min=1e-5)
    w_quant = (w * s).round().clamp(-1, 1) / s
    x_leaf = x.clone().requires_grad_()
    s_N1 = 127.0 / x_leaf.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    x_quant = (x_leaf * s_N1).round().clamp(-128, 127) / s_N1
    y = F.linear(x_leaf + (x_quant - x_leaf).detach(), w + (w_quant - w).detach(), b)
    towards = torch.randn(5, 48)
    expected = [y, *torch.autograd.grad((y * towards).sum(), [x_leaf, w, b])]
    assert_near(outputs_and_gradients(layer, x, towards), expected)


def test_the_binary_formula_of_the_paper_written_out():
    layer, x, towards = bit_linear("1"), torch.randn(5, 64), torch.randn(5, 48)
    w, b = layer.weight.detach(), layer.bias.detach()
    w_quant = torch.where(w - w.sum() / w.numel() > 0, 1.0, -1.0) * (w.abs().sum() / w.numel())
    gamma_N1 = x.abs().max(dim=1, keepdim=True).values
    x_quant = (x * 127 / gamma_N1).round() * gamma_N1 / 127
    expected = [x_quant @ w_quant.T + b, towards @ w_quant, towards.T @ x_quant, towards.sum(0)]
    assert_near(outputs_and_gradients(layer, x, towards), expected)


def test_weights_are_coded_as_torchao_does_and_outputs_differ_only_where_it_rounds_inputs_otherwise():
    from torchao.prototype.quantized_training.bitnet import (
        BitNetTrainingLinearWeight,
        get_bitnet_scale,
        quantize_bitnet_weight,
    )

    layer, x = bit_linear(bias=False), torch.randn(7, 64)
    codes, scale = quantize_bits(layer.weight, "1.58")
    theirs = get_bitnet_scale(layer.weight.detach())
    assert torch.equal(codes, quantize_bitnet_weight(layer.weight.detach(), theirs))
    torch.testing.assert_close(scale, theirs)
    with torch.no_grad():  # it divides by x / 127 where the authors multiply by 127 / x: a code may be off by one
        torchao = F.linear(x, BitNetTrainingLinearWeight(layer.weight.detach()))
        step = x.abs().amax(1, keepdim=True) / 127 * scale
        assert ((layer(x) - torchao).abs() < 2 * step).all()
        assert ((layer(x) - torchao).abs() < 1e-5).float().mean() > 0.9


def test_codes_and_scale_of_a_matrix_worked_out_by_hand():
    weight = torch.tensor([[0.9, -0.2, 0.3, -1.4], [0.1, 0.0, -0.3, 0.8]])  # magnitudes add up to 4.0, values to 0.2
    codes, scale = quantize_bits(weight, "1.58")
    assert codes.tolist() == [[1, 0, 1, -1], [0, 0, -1, 1]]
    assert scale == 0.5
    codes, scale = quantize_bits(weight, "1")
    assert codes.tolist() == [[1, -1, 1, -1], [1, -1, -1, 1]]  # against the mean, 0.025
    assert scale == 0.5
    codes, step = quantize_tokens(torch.tensor([[0.5, -1.0, 0.251], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0]]  # 63.5 rounds to even
    assert step[0] == pytest.approx(1 / 127)


@pytest.mark.parametrize("bits", ["1.58", "1"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layer_is_its_naive_twin(bits, dtype, tolerance, shape):
    layer = bit_linear(bits).to(dtype)
    twin = copy.deepcopy(layer)
    twin.forward = lambda x: naive_bit_linear(x, twin.weight, twin.bias, bits)
    x, towards = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 48, dtype=dtype)
    ours, theirs = outputs_and_gradients(layer, x, towards), outputs_and_gradients(twin, x, towards)
    assert_near([t.float() for t in ours], [t.float() for t in theirs], tolerance)


def test_the_rounding_grows_from_a_plain_layer_to_bitnets():
    layer, x, towards = bit_linear(), torch.randn(5, 64), torch.randn(5, 48)
    plain = nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    full = outputs_and_gradients(layer, x, towards)
    set_share_(layer, 0.0)
    assert all(map(torch.equal, outputs_and_gradients(layer, x, towards), outputs_and_gradients(plain, x, towards)))
    set_share_(layer, 0.25)
    (codes_x, step), (codes_w, scale) = quantize_tokens(x), quantize_bits(layer.weight, "1.58")
    x_mixed, w_mixed = 0.75 * x + 0.25 * codes_x * step, (0.75 * plain.weight + 0.25 * codes_w * scale).detach()
    by_hand = [x_mixed @ w_mixed.T + plain.bias, towards @ w_mixed, towards.T @ x_mixed, towards.sum(0)]
    assert_near(outputs_and_gradients(layer, x, towards), by_hand)
    set_share_(layer, 1.0)
    assert all(map(torch.equal, outputs_and_gradients(layer, x, towards), full))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_went_wrong_stays_wrong_and_harms_no_other(value):
    layer, x = bit_linear(), torch.randn(3, 64)
    clean = layer(x)
    x[1, 5] = value
    y = layer(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_zeros_of_pruning_stay_zeros_and_a_matrix_of_zeros_is_one():
    layer = bit_linear()
    with torch.no_grad():
        layer.weight[:, ::3] = 0
    assert (quantize_bits(layer.weight, "1.58")[0][:, ::3] == 0).all()
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(torch.randn(2, 64)), layer.bias.expand(2, -1))
    assert layer(torch.randn(0, 64)).shape == (0, 48), "no token, no output"


def test_codes_of_one_byte_are_saved_for_the_backward_pass():
    layer, saved = bit_linear(inputs=256, outputs=128), []
    x = torch.randn(64, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum()
    assert sum(t.numel() * t.element_size() for t in saved) < 1.1 * (64 * 256 + 128 * 256)


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    layer, x = bit_linear(), torch.randn(4, 64, requires_grad=True)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    codes, scale = quantize_bits(layer.weight, "1.58")
    assert_near([x.grad], [(codes * scale).sum(0).expand(4, -1)])
    assert layer.weight.grad is None


@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
@pytest.mark.parametrize("bits", ["1.58", "1"])
def test_compiled_it_computes_and_learns_the_same(bits):
    layer = bit_linear(bits)
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for shape in ((2, 5, 64), (1, 64)):
        x, towards = torch.randn(shape), torch.randn(*shape[:-1], 48)
        assert_near(outputs_and_gradients(compiled, x, towards), outputs_and_gradients(layer, x, towards))


def test_under_autocast_weights_are_rounded_from_full_precision_and_outputs_are_bfloat16():
    layer, x = bit_linear(bias=False), torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
        y.float().sum().backward()
    assert torch.equal(y, layer(x.float()).bfloat16()), "the same codes and sums, rounded once at the end"
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_slm, tiny_llama])
def test_the_swap_keeps_parameters_and_keys_and_leaves_embedding_and_head_alone(make):
    model = make()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    names = bitnet_(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert names == [name for name, _ in bit_layers(model)]
    assert bitnet_(model) == names, "twice is once"
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    again = copy.deepcopy(model)
    ids = torch.arange(10)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert make().load_state_dict(model.state_dict()).missing_keys == []


def test_layers_are_chosen_by_name_and_each_has_one_owner():
    model = tiny_slm()
    names = bitnet_(model, targets="*mixer*", skip="*down_proj")
    assert names
    assert not any(name.endswith("down_proj") for name in names)
    with pytest.raises(ValueError, match=r"computes with BitNet\(bits='1.58'.*each layer is rounded in one way"):
        bitnet_(model, "1")
    with pytest.raises(ValueError, match="computes as BitLinear already"):
        prepare_qat_(model)
    with pytest.raises(ValueError, match=r"bits='1.5' must be a string, '1.58' or '1'"):
        bitnet_(model, "1.5")


def test_rows_that_fill_no_whole_bytes_are_named_and_left():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))
    with pytest.warns(NoEffectWarning, match=r"0\.weight has rows of 12, and 8 codes go into a byte"):
        assert bitnet_(model, "1") == ["1"]
    assert isinstance(model[1], BitLinear)
    assert model[1].settings == BitNet("1")
