"""INT8 products: exact as integers, torchao's numbers by rows, Jetfire's by blocks; and the layer around them."""

import copy

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn
from torch.nn import functional as F
from torchao.prototype.quantized_training import int8_mixed_precision as torchao

from lightning_slm.nn.targets import weight_targets
from lightning_slm.quantization import int8 as ours
from lightning_slm.quantization.int8 import Int8Linear, int8_, int8_product, quantize_blocks, quantize_rows
from lightning_slm.quantization.qat import prepare_qat_

RECIPES = ["rowwise", "blockwise"]
SHAPES = [(40,), (2, 3, 7), (3,)]  # of the tokens
SIZES = [(64, 96), (37, 33), (5, 130)]  # of a weight


@pytest.fixture(params=["integers", "integers in tiles", "floats"])
def way(request, monkeypatch):
    """As this CPU multiplies, as it multiplies what is large, and as one without INT8 instructions would."""
    if request.param == "integers in tiles":
        monkeypatch.setattr(ours, "_CACHED", 1)
    if request.param == "floats":
        monkeypatch.setattr(ours, "_cpu_multiplies_int8", lambda: False)
    elif not ours._cpu_multiplies_int8():
        pytest.skip("this CPU has no exact INT8 instructions")


def linear(outputs=64, inputs=96, recipe="rowwise", bias=True, dtype=torch.float32, **kwargs):
    plain = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    assert int8_(model, recipe, **kwargs) == ["0"]
    return model[0], plain


def gradients(layer, x, towards):
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(towards)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def error(a, b):
    """Relative to the size of ``b``."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


# Integers.


@pytest.mark.parametrize("rows", [1, 17, 32])
@pytest.mark.parametrize("inputs", [1, 7, 64, 1025, 3000])
@pytest.mark.parametrize("columns", [1, 5, 16])
def test_a_product_of_codes_is_exact_whatever_the_sizes(way, rows, inputs, columns):
    for low, high in [(-128, 128), (127, 128), (-128, -127)]:
        a, b = (torch.randint(low, high, (n, inputs), dtype=torch.int8) for n in (rows, columns))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = int8_product(a.T.contiguous().T, b)
        assert product.dtype == torch.int32
        assert torch.equal(product.long(), a.long() @ b.long().T)


# Rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_become_the_codes_and_scales_of_torchao_bit_for_bit(dtype):
    x = torch.randn(40, 96, dtype=dtype) * torch.logspace(-6, 3, 40, dtype=dtype)[:, None]
    x[3] = 0
    for mine, theirs in zip(quantize_rows(x), torchao.quantize_int8_rowwise(x)):
        assert torch.equal(mine, theirs)


def of_torchao(plain):
    layer = copy.deepcopy(plain)
    layer.__class__ = torchao.Int8MixedPrecisionTrainingLinear
    layer.config = torchao.Int8MixedPrecisionTrainingConfig(module_swap=True)
    return layer


@pytest.mark.parametrize("tokens", SHAPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_rowwise_outputs_and_gradients_are_those_of_torchao(tokens, size, bias):
    mine, plain = linear(*size, bias=bias)
    x, towards = torch.randn(*tokens, size[1]), torch.randn(*tokens, size[0])
    for a, b in zip(gradients(mine, x, towards), gradients(of_torchao(plain), x, towards)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", SHAPES, ids=str)
def test_in_bfloat16_a_sum_is_rounded_once_as_by_the_gpu_kernel_of_torchao(tokens, monkeypatch):
    def rounded_once(a, b, row_scale, column_scale):
        product = torch._int_mm(a, b).float() * column_scale.float() * row_scale.float()[:, None]
        return product.to(row_scale.dtype)

    mine, plain = linear(64, 96, dtype=torch.bfloat16)
    x, towards = torch.randn(*tokens, 96).bfloat16(), torch.randn(*tokens, 64).bfloat16()
    results = gradients(mine, x, towards)
    for a, b in zip(results, gradients(of_torchao(plain), x, towards)):  # on CPU it rounds after each of three steps
        assert error(a, b) < 2**-7
    monkeypatch.setattr(torchao, "scaled_int8_mm", rounded_once)
    for a, b in zip(results, gradients(of_torchao(plain), x, towards)):
        assert error(a, b) < 1e-5  # the last bit of a few
    assert torch.equal(results[0], of_torchao(plain)(x))


def test_one_token_is_the_formula_by_hand():
    """Not torchao's: with one token its weight gradient is a product over one column, where torch._int_mm is wrong."""
    mine, plain = linear(64, 96, bias=False)
    x, towards = torch.randn(1, 96), torch.randn(1, 64)
    y, grad_x, grad_weight = gradients(mine, x, towards)

    def rounded(a):  # each row to 255 levels
        scale = a.abs().amax(1, keepdim=True).double() / 127
        return (a / scale).round() * scale

    weight = plain.weight.detach()
    torch.testing.assert_close(y.double(), rounded(x) @ rounded(weight).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_x.double(), rounded(towards) @ rounded(weight.T).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight, towards.T @ x, rtol=1e-6, atol=0)  # alone in its row, a number is exact


# Blocks.


def naive_codes(x, block, noise=None):
    """Jetfire's quantiser in a loop over squares, float64. Returns the numbers that the codes stand for."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for top in range(0, x.shape[0], block):
        for left in range(0, x.shape[1], block):
            square = slice(top, top + block), slice(left, left + block)
            scale = x[square].abs().max() / 127
            codes = x[square] / scale
            codes = codes.round() if noise is None else (codes + noise[square]).floor()
            out[square] = codes.double() * scale.double()
    return out


def naive_jetfire(plain, x, towards, block):
    """Output and gradients by the paper's formula: squares of all three operands rounded, the gradient at random."""
    x, towards = x.reshape(-1, x.shape[-1]), towards.reshape(-1, towards.shape[-1])
    whole = [-(-n // block) * block for n in towards.shape]
    noise = torch.rand(whole[0] // block, block, whole[1] // block, block).reshape(whole)
    rounded_x, rounded_weight = naive_codes(x, block), naive_codes(plain.weight.detach(), block)
    rounded_grad = naive_codes(towards, block, noise[: towards.shape[0], : towards.shape[1]])
    return [rounded_x @ rounded_weight.T, rounded_grad @ rounded_weight, rounded_grad.T @ rounded_x]


@pytest.mark.parametrize("tokens", SHAPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("block", [32, 10])
def test_blockwise_outputs_and_gradients_are_the_loop_over_squares(way, tokens, size, block):
    mine, plain = linear(*size, "blockwise", bias=False, block=block)
    x, towards = torch.randn(*tokens, size[1]), torch.randn(*tokens, size[0])
    torch.manual_seed(1)
    results = gradients(mine, x, towards)
    torch.manual_seed(1)
    for a, b in zip(results, naive_jetfire(plain, x, towards, block)):
        torch.testing.assert_close(a.double(), b.view(a.shape), rtol=1e-5, atol=1e-5)


def test_an_outlier_costs_its_block_the_small_numbers_and_no_other():
    x = torch.randn(64, 64)
    x[5, 7] = 1e4
    codes, scales = quantize_blocks(x, 32)
    off = (codes.view(2, 32, 2, 32) * scales[:, None, :, None]).view(64, 64) - x
    assert off[:32, :32].abs().max() > 1
    assert off[32:].abs().max() < 0.05
    assert off[:, 32:].abs().max() < 0.05


def test_a_block_rounded_at_random_is_right_on_average():
    x = torch.randn(64, 48)
    draws = torch.stack([codes * scales.repeat_interleave(32, 0).repeat_interleave(32, 1) for codes, scales in
                         (quantize_blocks(x, 32, stochastic=True) for _ in range(400))])[..., :48]  # fmt: skip
    step = x.abs().max() / 127
    assert (draws.mean(0) - x).abs().max() < 5 * 0.5 * step / 400**0.5  # five standard errors of a coin of one step
    assert ((draws - x).abs() < 1.001 * step).all()


def test_blockwise_saves_the_inputs_in_a_byte_each_and_no_copy_of_the_weight():
    layer, _ = linear(64, 96, "blockwise")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(128, 96, requires_grad=True))
    own = {p.data_ptr() for p in layer.parameters()}
    new = [t for t in saved if t.data_ptr() not in own]
    assert sorted((t.dtype, t.numel()) for t in new if t.dtype == torch.int8) == [(torch.int8, 128 * 96)]
    assert sum(t.numel() * t.element_size() for t in new) == 128 * 96 * (1 + 4 / 32**2)


# The layer.


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [tiny_slm, tiny_llama], ids=lambda make: make.__name__)
def test_exchanging_changes_classes_and_nothing_else(recipe, make):
    model = make()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    names = int8_(model, recipe)
    assert names == [t.module_name for t in weight_targets(model)]
    assert int8_(model, recipe) == names, "twice is once"
    assert list(model.state_dict()) == keys
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    plain = make()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(96, (2, 12))
    assert error(model(input_ids=ids).logits, plain(input_ids=ids).logits) < 0.05
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_dtypes_are_those_of_a_plain_layer(recipe, bias):
    mine, plain = linear(64, 96, recipe, bias=bias)
    x = torch.randn(2, 20, 96)
    for layer in (mine, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert error(mine.weight.grad, plain.weight.grad) < 0.03


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_wants_a_gradient_gets_one(recipe):
    layer, _ = linear(64, 96, recipe)
    layer.weight.requires_grad_(False)
    x = torch.randn(8, 96, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None
    layer, _ = linear(64, 96, recipe)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_and_no_tokens_at_all_are_no_trouble(recipe):
    layer, _ = linear(64, 96, recipe, bias=False)
    for x in (torch.zeros(3, 96), torch.zeros(0, 96), torch.zeros(2, 0, 96)):
        y, grad_x, grad_weight = gradients(layer, x, torch.zeros(*x.shape[:-1], 64))
        assert y.shape == (*x.shape[:-1], 64)
        assert not y.any()
        assert not grad_x.any()
        assert not grad_weight.any()
        layer.weight.grad = None
    assert layer(torch.randn(96)).shape == (64,)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_block_gives_the_same(recipe):
    mine, _ = linear(64, 96, recipe)
    block = nn.Sequential(nn.LayerNorm(96), mine, nn.GELU())
    compiled = copy.deepcopy(block)
    compiled.compile(backend="aot_eager", fullgraph=True)
    x, towards = torch.randn(2, 20, 96), torch.randn(2, 20, 64)
    torch.manual_seed(1)
    expected = gradients(block, x, towards)
    torch.manual_seed(1)
    for a, b in zip(gradients(compiled, x, towards), expected):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_derivative_is_refused(recipe):
    layer, _ = linear(64, 96, recipe)
    x = torch.randn(4, 96, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_cannot_be_asked_for_is_said():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"recipe='rowise' is unknown. Near names: 'rowwise'"):
        int8_(model, "rowise")
    with pytest.raises(ValueError, match="block=1 must be the side of a square of at least 2 x 2"):
        int8_(model, "blockwise", block=1)
    int8_(model)
    assert int8_(model, block=64) == ["0"], "rows have no blocks"
    with pytest.raises(ValueError, match=r"'0' computes with Int8\(recipe='rowwise'.* already"):
        int8_(model, "blockwise")
    prepared = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(prepared)
    with pytest.raises(ValueError, match="'0' computes as FakeQuantLinear already"):
        int8_(prepared)
    assert type(model[0]) is Int8Linear


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_learn_within_five_percent_of_bfloat16(recipe):
    def losses(convert):
        torch.manual_seed(0)
        model = tiny_slm().train()
        convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(12, (8, 32), generator=torch.Generator().manual_seed(3))
        seen = []
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        return seen

    plain, low = losses(lambda model: None), losses(lambda model: int8_(model, recipe))
    assert plain[-1] < 0.8 * plain[0]
    assert low[-1] == pytest.approx(plain[-1], rel=0.05)
    assert F.l1_loss(torch.tensor(low), torch.tensor(plain)) < 0.05 * plain[0]
