"""INT4 products: the Hadamard quantiser by hand, gradients that are right on average, and the layer around them."""

import copy
from functools import partial

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn

from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.quantization.int4 import (
    hadamard,
    hadamard_block,
    int4_,
    keep_probabilities,
    quantize_int4,
    split_gradient,
    whole_weights,
)
from lightning_slm.quantization.int8 import int8_

SAMPLED = [True, False]


def linear(outputs=24, inputs=64, bias=True, sampled=True):
    plain = nn.Linear(inputs, outputs, bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    assert int4_(model, sampled=sampled) == ["0"]
    return model[0], plain


def gradients(layer, x, towards):
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(towards)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def error(a, b):
    """Relative to the size of ``b``."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


# The paper's forward, and the gradients it means, written out in float64.


def sylvester(size):
    """Plus or minus one: a minus for every pair of ones that row and column number have in common, base two."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double()


def by_hand(a):
    """Turned, cut off at 7 steps and rounded; and where nothing was cut off."""
    block = next(b for b in (32, 16, 8, 4, 2, 1) if a.shape[1] % b == 0)
    turn = torch.block_diag(*[sylvester(block) / block**0.5] * (a.shape[1] // block))
    turned = a.double() @ turn
    step = 0.3534 * turned.square().mean().sqrt()
    return (turned / step).round().clamp(-7, 7) * step, (turned / step).abs() <= 7, turn


def naive(plain, x, towards):
    x, towards = x.reshape(-1, x.shape[-1]), towards.reshape(-1, towards.shape[-1]).double()
    rounded_x, inside_x, turn = by_hand(x)
    rounded_weight, inside_weight, _ = by_hand(plain.weight.detach())
    grad_x = (inside_x * (towards @ rounded_weight)) @ turn.T
    grad_weight = (inside_weight * (towards.T @ rounded_x)) @ turn.T
    return rounded_x @ rounded_weight.T, grad_x, grad_weight


# Forward.


@pytest.mark.parametrize("inputs", [64, 48, 40, 33])
def test_the_transform_is_its_own_inverse_and_keeps_products(inputs):
    x, weight = torch.randn(10, inputs), torch.randn(7, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = hadamard(x)
    torch.testing.assert_close(hadamard(turned), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(turned @ hadamard(weight).T, x @ weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.double(), x.double() @ by_hand(x)[2], rtol=1e-5, atol=1e-6)
    assert inputs % hadamard_block(inputs) == 0


def test_the_transform_saves_the_rest_of_a_block_from_its_outlier():
    x = torch.randn(256, 64)
    x[:, 3] *= 30

    def after(a):
        codes, step = quantize_int4(a)
        return codes.clamp(-7, 7) * step

    assert error(hadamard(after(hadamard(x))), x) < 0.6 * error(after(x), x)


def test_the_step_is_the_best_for_what_is_normally_distributed():
    x = torch.randn(200_000)
    codes, step = quantize_int4(x)
    lost = (codes.clamp(-7, 7) * step - x).square().mean()
    for other in (0.9 * step, 1.1 * step, x.abs().max() / 7):
        assert ((x / other).round().clamp(-7, 7) * other - x).square().mean() > lost


@pytest.mark.parametrize("tokens", [(40,), (2, 3, 7), (1,)], ids=str)
@pytest.mark.parametrize("size", [(24, 64), (7, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_the_formula_by_hand(tokens, size, bias):
    layer, plain = linear(*size, bias=bias)
    x = torch.randn(*tokens, size[1])
    expected = naive(plain, x, torch.zeros(*tokens, size[0]))[0] + (plain.bias.detach() if bias else 0)
    torch.testing.assert_close(layer(x).detach().double(), expected.view(*tokens, -1), rtol=1e-5, atol=1e-5)


# Backward.


def test_a_gradient_splits_into_two_times_four_bits_and_back_on_average():
    grad = torch.randn(40, 24)
    draws = []
    for _ in range(400):
        high, low, scale = split_gradient(grad)
        assert high.dtype == low.dtype == torch.int8
        assert min(high.min(), low.min()) >= -8
        assert max(high.max(), low.max()) <= 7
        draws.append(scale * (16 * high.float() + low.float()))
    step = grad.abs().max() / 119
    assert ((torch.stack(draws) - grad).abs() < 1.001 * step).all()
    assert (torch.stack(draws).mean(0) - grad).abs().max() < 5 * 0.5 * step / 400**0.5  # five standard errors


def test_probabilities_follow_the_scores_and_fill_the_budget():
    score = torch.rand(80) ** 4
    score[:3] = torch.tensor([50.0, 70.0, 0.0])
    probability = keep_probabilities(score, 40)
    assert probability.sum() == pytest.approx(40, rel=1e-4)
    assert probability[:3].tolist() == [1, 1, 0]
    rest = probability < 1
    ratio = (probability / score)[rest & (score > 0)]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    assert (probability[~rest] >= 0).all()
    assert (score[~rest].min() * ratio[0]) >= 0.999, "none is certain that need not be"


@pytest.mark.parametrize("nonzero", [0, 1, 5, 10])
def test_rows_that_fit_the_budget_are_all_kept(nonzero):
    score = torch.cat([torch.rand(nonzero) + 1e-6, torch.zeros(20 - nonzero)])
    torch.testing.assert_close(keep_probabilities(score, 10), (score > 0).float(), rtol=1e-6, atol=0)


def test_whole_weights_cost_little_of_the_budget_and_of_the_variance():
    score = torch.rand(4000) ** 2
    exact = keep_probabilities(score, 2000)
    weights = whole_weights(exact)
    assert set(weights.unique().tolist()) <= {0, 1, 2, 4, 8, 16}
    assert (1 / weights).sum() < 1.1 * 2000
    variance = ((weights - 1) * score**2).sum(), ((1 / exact - 1) * score**2).sum()
    assert variance[0] < 1.15 * variance[1]


def many(layer, x, towards, draws=1500):
    """Gradients of the input and of the weight, drawn again and again: (draws, ...) each."""
    results = [gradients(layer, x, towards)[1:3] for _ in range(draws)]
    return [torch.stack(r).double() for r in zip(*results)]


@pytest.mark.parametrize("sampled", SAMPLED)
def test_gradients_are_on_average_those_of_the_rounded_product(sampled):
    layer, plain = linear(24, 64, sampled=sampled)
    x, towards = torch.randn(40, 64), torch.randn(40, 24) * torch.logspace(-3, 0, 40)[:, None]
    expected = naive(plain, x, towards)[1:]
    assert (~by_hand(x)[1]).any(), "some inputs are cut off, and get no gradient"
    for drawn, exact in zip(many(layer, x, towards), expected):
        z = (drawn.mean(0) - exact) / (drawn.std(0) / len(drawn) ** 0.5 + 1e-9)
        assert z.square().mean() == pytest.approx(1, abs=0.35), "as far off as chance has it, and no farther"
        assert error(drawn.mean(0), exact) < 0.05


def test_leverage_scores_lose_less_than_uniform_sampling_of_as_many_rows():
    """A few tokens bear most of the gradient, as in a network that has learned."""
    x, towards = torch.randn(64, 64), torch.randn(64, 24)
    towards[8:] *= 0.02
    layer, plain = linear(24, 64)
    exact_x, exact_weight = naive(plain, x, towards)[1:]
    x_rounded, inside, turn = by_hand(x)
    weight_rounded, inside_weight, _ = by_hand(plain.weight.detach())
    uniform_x, uniform_weight = [], []
    for _ in range(300):
        high, low, scale = split_gradient(towards)
        rows = torch.cat([16 * high.double(), low.double()]) * scale * 2
        kept = [rows * (torch.rand(128, 1) < 0.5) for _ in range(2)]
        uniform_x.append((inside * ((kept[0][:64] + kept[0][64:]) @ weight_rounded)) @ turn.T)
        weight = (kept[1][:64] + kept[1][64:]).T @ x_rounded
        uniform_weight.append((inside_weight * weight) @ turn.T)
    drawn = many(layer, x, towards, draws=300)
    for ours, uniform, exact in zip(drawn, (uniform_x, uniform_weight), (exact_x, exact_weight)):
        lost, lost_uniformly = ((torch.stack(list(d)) - exact).square().mean() for d in (ours, uniform))
        assert lost < 0.1 * lost_uniformly


def test_a_seed_makes_the_draws_again():
    layer, _ = linear()
    x, towards = torch.randn(40, 64), torch.randn(40, 24)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(gradients(layer, x, towards))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert torch.equal(seen[0][0], seen[2][0]), "no chance in the forward pass"
    assert not torch.equal(seen[0][2], seen[2][2])


def test_the_gradient_of_the_bias_is_exact():
    layer, plain = linear()
    x, towards = torch.randn(40, 64), torch.randn(40, 24)
    assert torch.equal(gradients(layer, x, towards)[3], gradients(plain, x, towards)[3])


def test_the_inputs_are_saved_in_a_byte_each_and_no_copy_of_the_weight():
    layer, _ = linear()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(128, 64, requires_grad=True))
    own = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own) == 128 * 64 + 4


# The layer.


@pytest.mark.parametrize("make", [tiny_slm, tiny_llama], ids=lambda make: make.__name__)
def test_exchanging_changes_classes_and_nothing_else(make):
    model = make()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    names = int4_(model)
    assert names == [t.module_name for t in weight_targets(model)]
    assert int4_(model) == names, "twice is once"
    assert list(model.state_dict()) == keys
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    ids = torch.randint(96, (2, 12))
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_layers_that_no_block_divides_are_named_once_and_left():
    model = nn.Sequential(nn.Linear(64, 36), nn.Linear(36, 33), nn.Linear(33, 8), nn.Linear(8, 8))
    with pytest.warns(NoEffectWarning, match="1.weight of .33, 36. has 36 inputs, which no Hadamard block") as seen:
        assert int4_(model) == ["0", "3"]
    assert len(seen) == 1
    assert "2.weight of (8, 33) has 33 inputs" in str(seen[0].message)
    assert model(torch.randn(2, 64)).shape == (2, 8)


@pytest.mark.parametrize("sampled", SAMPLED)
def test_under_autocast_dtypes_are_those_of_a_plain_layer(sampled):
    layer, plain = linear(sampled=sampled)
    x = torch.randn(2, 20, 64)
    for module in (layer, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    assert error(layer.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16())) < 0.25


@pytest.mark.parametrize("sampled", SAMPLED)
def test_only_what_wants_a_gradient_gets_one(sampled):
    layer, _ = linear(sampled=sampled)
    layer.weight.requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    layer, _ = linear(sampled=sampled)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("sampled", SAMPLED)
def test_zeros_and_no_tokens_at_all_are_no_trouble(sampled):
    layer, _ = linear(bias=False, sampled=sampled)
    for x in (torch.zeros(3, 64), torch.zeros(0, 64), torch.zeros(2, 0, 64)):
        y, grad_x, grad_weight = gradients(layer, x, torch.zeros(*x.shape[:-1], 24))
        assert y.shape == (*x.shape[:-1], 24)
        assert not y.any()
        assert not grad_x.any()
        assert not grad_weight.any()
    assert layer(torch.randn(64)).shape == (24,)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("sampled", SAMPLED)
def test_a_compiled_block_gives_the_same(sampled):
    layer, _ = linear(sampled=sampled)
    block = nn.Sequential(nn.LayerNorm(64), layer, nn.GELU())
    compiled = copy.deepcopy(block)
    compiled.compile(backend="aot_eager", fullgraph=True)
    x, towards = torch.randn(2, 20, 64), torch.randn(2, 20, 24)
    torch.manual_seed(1)
    expected = gradients(block, x, towards)
    torch.manual_seed(1)
    for a, b in zip(gradients(compiled, x, towards), expected):
        assert error(a, b) < 1e-5


def test_a_layer_has_one_owner():
    model = nn.Sequential(nn.Linear(64, 64))
    int8_(model)
    with pytest.raises(ValueError, match="'0' computes as Int8Linear already, so it cannot become Int4Linear"):
        int4_(model)


@pytest.mark.parametrize("sampled", SAMPLED)
def test_twenty_steps_learn_within_fifteen_percent_of_bfloat16(sampled):
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

    plain, low = losses(lambda model: None), losses(partial(int4_, sampled=sampled))
    assert plain[-1] < 0.8 * plain[0]
    assert low[-1] == pytest.approx(plain[-1], rel=0.15)
