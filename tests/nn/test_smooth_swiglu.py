"""Smooth-SwiGLU: SwiGLU where nothing is rounded, and less harm by outliers where the down projection is FP8."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.smooth_swiglu import SmoothSwiGLU, smoothed
from lightning_slm.nn.swiglu import SwiGLU
from lightning_slm.quantization import prepare_qat_
from lightning_slm.quantization.float8 import Float8Linear, float8_

# Shape letters: B = batch, T = tokens, D = model width, N = tokens of a batch, I = channels, O = outputs.

B, T, D, I = 2, 8, 32, 64
CONTEXT = Context(rope=(torch.empty(0), torch.empty(0)))


class HighPrecision(nn.Linear):
    """A down projection that asks for smooth operands and rounds nothing."""

    smooths = True

    def forward(self, x, smooth=False):
        assert smooth
        return F.linear(*smoothed(x, self.weight))


def naive_smoothed(x_NI, weight_OI):
    """Channel by channel; the exponents by hand."""
    x_NI, weight_OI = x_NI.clone(), weight_OI.clone()
    for i in range(x_NI.shape[-1]):
        a, b = x_NI[..., i].abs().max().double(), weight_OI[:, i].abs().max().double()
        if a > 0 and b > 0:
            power = 2.0 ** min(max(round(float(((b / a) ** 0.5).log2())), -14), 14)
            x_NI[..., i] *= power
            weight_OI[:, i] /= power
    return x_NI, weight_OI


def pair(seed=0):
    """SwiGLU, and Smooth-SwiGLU with its weights."""
    torch.manual_seed(seed)
    plain, smooth = SwiGLU(D, I), SmoothSwiGLU(D, I)
    smooth.load_state_dict(plain.state_dict())
    return plain, smooth


def passes(layer, x_BTD, grad_BTD):
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = layer(x_BTD, CONTEXT, 0)
    y_BTD.backward(grad_BTD)
    return [y_BTD.detach(), x_BTD.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(24, I), (B, T, I)], ids=str)
def test_the_factors_are_the_naive_ones_and_change_no_product(shape, dtype):
    spread_I = torch.randn(I).mul(4).exp2()
    x_NI, weight_OI = (torch.randn(shape) * spread_I).to(dtype), (torch.randn(D, I) / spread_I.sqrt()).to(dtype)
    x_NI[..., 3], weight_OI[:, 5] = 0, 0
    smooth = smoothed(x_NI, weight_OI)
    for mine, naive, original in zip(smooth, naive_smoothed(x_NI, weight_OI), (x_NI, weight_OI), strict=True):
        assert mine.dtype == original.dtype
        assert torch.equal(mine, naive)
    assert torch.equal(F.linear(*smooth), F.linear(x_NI, weight_OI))
    largest_x_I, largest_w_I = (t.flatten(0, -2).abs().amax(0).float() for t in smooth)
    some = (largest_x_I > 0) & (largest_w_I > 0)
    assert ((largest_x_I / largest_w_I)[some].log2().abs() <= 1).all()  # level, up to a power of two


@pytest.mark.parametrize("kind", [nn.Linear, HighPrecision])
def test_in_high_precision_it_is_swiglu(kind):
    """Outputs and all gradients: bit for bit, since powers of two round nothing."""
    plain, smooth = pair()
    smooth.down_proj.__class__ = kind
    x_BTD, grad_BTD = torch.randn(B, T, D) * 20, torch.randn(B, T, D)
    for a, b in zip(passes(plain, x_BTD, grad_BTD), passes(smooth, x_BTD, grad_BTD), strict=True):
        assert torch.equal(a, b)


def test_a_down_projection_that_is_to_be_exported_rounded_is_not_smoothed():
    """QuantizationAwareTraining promises that what was trained is what is exported."""
    plain, smooth = pair()
    for layer in (plain, smooth):
        prepare_qat_(layer, group=32, embedding=None)
    x_BTD, grad_BTD = torch.randn(B, T, D), torch.randn(B, T, D)
    for a, b in zip(passes(plain, x_BTD, grad_BTD), passes(smooth, x_BTD, grad_BTD), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_with_fp8_it_is_the_fp8_layer_on_smooth_operands(recipe):
    """By hand: scale, run the plain FP8 layer with a scaled weight, scale the gradients back."""
    _, smooth = pair()
    float8_(smooth, recipe, emulate=True)
    product_NI, grad_NO = torch.randn(16, I) * torch.randn(I).mul(3).exp2(), torch.randn(16, D)
    down, x_NI = smooth.down_proj, product_NI.clone().requires_grad_()
    y_NO = down(x_NI, smooth=True)
    y_NO.backward(grad_NO)

    by_hand = copy.deepcopy(down)
    scaled_NI, scaled_OI = naive_smoothed(product_NI, down.weight.detach())
    factor_I = scaled_NI[0] / product_NI[0]
    by_hand.weight = nn.Parameter(scaled_OI)
    scaled_NI.requires_grad_()
    expected_NO = by_hand(scaled_NI)
    expected_NO.backward(grad_NO)
    assert torch.equal(y_NO, expected_NO)
    assert torch.equal(x_NI.grad, scaled_NI.grad * factor_I)
    assert torch.equal(down.weight.grad, by_hand.weight.grad / factor_I)


def error(y, exact):
    return float((y.detach() - exact).norm() / exact.norm())


def down_projection(spoil, N=256):
    """FP8 (tensorwise) plain and smooth, exact, for a SwiGLU product that ``spoil`` has planted an outlier in."""
    gate_NI, up_NI = torch.randn(N, I), torch.randn(N, I)
    x_NI, layer = F.silu(gate_NI) * up_NI, nn.ModuleList([nn.Linear(I, D, bias=False)])
    with torch.no_grad():
        spoil(x_NI, layer[0].weight)
    exact_NO = F.linear(x_NI.double(), layer[0].weight.detach().double())
    float8_(layer, emulate=True)
    return layer[0](x_NI), layer[0](x_NI, smooth=True), exact_NO


def test_an_outlying_channel_breaks_fp8_and_not_smooth_fp8():
    """One channel grew 2^18-fold, and its column of the weight shrank as far: all channels matter alike."""

    def spoil(x_NI, weight_OI):
        x_NI[:, 5] *= 2**18
        weight_OI[:, 5] /= 2**18

    plain_NO, smooth_NO, exact_NO = down_projection(spoil)
    assert error(plain_NO, exact_NO) > 0.5  # useless
    assert error(smooth_NO, exact_NO) < 0.06  # as without the outlier: three bits of mantissa
    assert error(plain_NO, exact_NO) > 8 * error(smooth_NO, exact_NO)


def test_a_spike_of_one_token_spoils_the_other_tokens_of_fp8_and_not_of_smooth_fp8():
    def spoil(x_NI, weight_OI):
        x_NI[3, 5] = 2.0**18

    plain_NO, smooth_NO, exact_NO = down_projection(spoil)
    others = torch.arange(len(exact_NO)) != 3
    errors = [error(y_NO[others], exact_NO[others]) for y_NO in (plain_NO, smooth_NO)]
    assert errors[0] > 0.25
    assert errors[1] < 0.08
    assert errors[0] > 4 * errors[1]


def test_without_outliers_it_is_no_worse():
    plain_NO, smooth_NO, exact_NO = down_projection(lambda x_NI, weight_OI: None)
    assert error(smooth_NO, exact_NO) < 1.1 * error(plain_NO, exact_NO)


def test_the_reciprocal_of_the_activations_alone_would_move_the_outlier_into_the_weight():
    """Why the factors look at both: s = 1 / max|x|, as the paper has it, leaves all of the spread to W / s."""
    x_NI, weight_OI = F.silu(torch.randn(256, I)) * torch.randn(256, I), torch.randn(D, I) / I**0.5
    x_NI[3, 5] = 2.0**18
    exact_NO, others = F.linear(x_NI.double(), weight_OI.double()), torch.arange(256) != 3
    layer = nn.ModuleList([nn.Linear(I, D, bias=False)])
    float8_(layer, emulate=True)
    power_I = 2.0 ** -x_NI.abs().amax(0).log2().round()
    errors = []
    for x, weight in ((x_NI * power_I, weight_OI / power_I), smoothed(x_NI, weight_OI)):
        layer[0].weight.data = weight
        errors.append(error(layer[0](x)[others], exact_NO[others]))
    assert errors[0] > 2 * errors[1]


def config(channel):
    sizes = {"vocab_size": 96, "hidden_size": D, "intermediate_size": I, "num_attention_heads": 2}
    return SLMConfig(**sizes, pattern=f"attn/{channel}*2")


def test_a_model_of_the_pattern_loads_the_weights_of_one_with_mlp_and_has_its_logits(tmp_path):
    model = SLMForCausalLM(config("mlp")).eval()
    smooth = SLMForCausalLM(config("smooth_mlp")).eval()
    assert smooth.load_state_dict(model.state_dict()).missing_keys == []
    assert type(smooth.model.layers[0].channel_mixer) is SmoothSwiGLU
    ids = torch.randint(96, (2, 12))
    assert torch.equal(smooth(input_ids=ids).logits, model(input_ids=ids).logits)
    smooth.save_pretrained(tmp_path)
    again = SLMForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.pattern == "attn/smooth_mlp*2"
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look,
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions")  # and its own call
def test_in_a_model_fp8_smooths_and_a_compiled_block_does_the_same():
    model = SLMForCausalLM(config("smooth_mlp")).train()
    plain = SLMForCausalLM(config("mlp")).train()
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        float8_(m, emulate=True)
    down = model.model.layers[0].channel_mixer.down_proj
    assert type(down) is Float8Linear
    asked = []
    down.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    ids = torch.randint(96, (2, 8))

    def step(m):
        m.zero_grad()
        loss = m(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in m.parameters())]

    eager = step(model)
    assert asked == [{"smooth": True}]
    assert not torch.equal(eager[0], step(plain)[0])
    model.model.layers[1].compile(backend="aot_eager")
    for a, b in zip(step(model), eager):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
