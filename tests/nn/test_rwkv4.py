"""RWKV-4's parts against their definitions: in float64 to rounding, in float32 within 1e-5 of the largest value."""

# Shape letters: B = batch, T = tokens, D = channels.

import math

import pytest
import torch
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.nn import wkv as module
from lightning_slm.nn.kernels import OptionalKernel
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rwkv4 import RWKV4
from lightning_slm.nn.targets import weight_targets
from lightning_slm.nn.token_shift import interpolate, naive_interpolate, previous_tokens
from lightning_slm.nn.wkv import naive_wkv, wkv

B, D = 2, 6


def inputs(T, size=3.0, dtype=torch.float32):
    decay, first = torch.empty(D, dtype=dtype).uniform_(-5, 3), torch.randn(D, dtype=dtype)
    k, v = size * torch.randn(B, T, D, dtype=dtype), torch.randn(B, T, D, dtype=dtype)
    return [t.requires_grad_() for t in (decay, first, k, v)]


def some_state(dtype=torch.float32):
    """Numerator, denominator, exponent."""
    state = torch.stack((torch.randn(B, D), torch.rand(B, D) + 0.5, 3 * torch.randn(B, D)), 1)
    return state.to(dtype)


def by_definition(decay, first, k, v):
    """All pairs of tokens at once, in float64."""
    decay, first, k, v = (t.double() for t in (decay, first, k, v))
    T = k.shape[1]
    distance = (torch.arange(T)[:, None] - torch.arange(T) - 1).double()
    exponents = k[:, None] - decay.exp() * distance[None, :, :, None]  # (B, reader, writer, D)
    exponents = torch.where((distance == -1)[None, :, :, None], k[:, None] + first, exponents)
    weights = exponents.masked_fill((distance < -1)[None, :, :, None], -torch.inf).softmax(2)
    return (weights * v[:, None]).sum(2)


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a - b).abs().max()


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 100])
def test_it_is_the_weighted_mean_of_the_paper(T):
    decay, first, k, v = inputs(T)
    close([wkv(decay, first, k, v)[0]], [by_definition(decay, first, k, v)], 1e-5)


def test_it_is_transformers_loop_with_its_state_as_well():
    decay, first, k, v = (t.detach() for t in inputs(37))
    state = some_state()
    y, after = wkv(decay, first, k, v, state)
    expected, expected_state = rwkv_linear_attention_cpu(decay, first, k, v, state.unbind(1), return_state=True)
    close([y, *after.unbind(1)], [expected, *expected_state], 1e-5)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("T", [1, 2, 16, 33, 100])
def test_outputs_states_and_gradients_are_the_twins(T, carried, reset):
    arguments = inputs(T)
    state = some_state() if carried else None
    starts = torch.rand(B, T) < 0.2 if reset else None
    results = []
    for function in (wkv, naive_wkv):
        y, after = function(*arguments, state, starts)
        torch.manual_seed(1)
        total = (y * torch.randn(y.shape)).sum() + (after[:, :2] * torch.randn(B, 2, D)).sum()
        results.append((y, after, *torch.autograd.grad(total, arguments)))
    close(*results, 2e-5)


@pytest.mark.parametrize("T", [1, 5, 18])
@pytest.mark.parametrize("reset", [False, True])
def test_gradients_are_those_of_finite_differences_with_first_and_last_state(T, reset):
    arguments = inputs(T, 1.0, torch.float64)
    sums = some_state(torch.float64)[:, :2].requires_grad_()
    exponent = torch.randn(B, 1, D, dtype=torch.float64)
    starts = (torch.arange(T) % 7 == 3).expand(B, -1) if reset else None

    def function(decay, first, k, v, sums):
        y, after = wkv(decay, first, k, v, torch.cat((sums, exponent), 1), starts)
        return y, after[:, :2] * after[:, 2:].detach().exp()  # the scale, a constant to autograd, multiplied out

    assert torch.autograd.gradcheck(function, (*arguments, sums))


def test_the_last_state_has_the_gradients_of_a_text_that_goes_on():
    decay, first, k, v = inputs(40, dtype=torch.float64)
    whole = wkv(decay, first, k, v)[0]
    y, state = wkv(decay, first, k[:, :21], v[:, :21])
    parts = torch.cat((y, wkv(decay, first, k[:, 21:], v[:, 21:], state)[0]), 1)
    weights = torch.randn_like(whole)
    one, two = (torch.autograd.grad((y * weights).sum(), (decay, first, k, v)) for y in (whole, parts))
    close([whole, *one], [parts, *two], 1e-12)


@pytest.mark.parametrize("size", [60.0, 1000.0])
def test_keys_of_any_size_stay_finite_and_exact(size):
    decay, first, k, v = inputs(50)
    k = (size * (2 * torch.rand(B, 50, D) - 1)).requires_grad_()
    y, state = wkv(decay, first, k, v)
    close([y], [by_definition(decay, first, k, v)], 1e-4)
    gradients = torch.autograd.grad(y.square().sum(), (decay, first, k, v))
    assert all(t.isfinite().all() for t in (state, *gradients))


def test_the_operators_are_what_pytorch_asks_of_them():
    decay, first, k, v = inputs(20)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for starts in (None, torch.rand(B, 20) < 0.2):
        arguments = (decay, first, k, v, module.empty_state(k), starts)
        torch.library.opcheck(module._wkv, arguments, test_utils=tests)


def test_bfloat16_keys_and_values_are_summed_in_float32():
    decay, first, k, v = (t.detach() for t in inputs(64))
    y, state = wkv(decay, first, k.bfloat16(), v.bfloat16())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    close([y], [by_definition(decay, first, k.bfloat16(), v.bfloat16())], 2**-8)


def test_interpolation_has_the_gradients_of_its_twin():
    shapes = ((B, 5, D), (B, 5, D), (D,), (D,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    close(interpolate(*tensors), naive_interpolate(*tensors), 0)
    assert torch.autograd.gradcheck(interpolate, tensors)


def test_the_token_before_is_zero_where_a_text_starts():
    x = torch.arange(1.0, 7).view(1, 6, 1)
    starts = torch.tensor([[False, False, True, False, False, True]])
    assert previous_tokens(x).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert previous_tokens(x, torch.full((1, 1, 1), 9.0), starts).flatten().tolist() == [9, 1, 0, 3, 4, 0]


def test_first_values_spread_over_the_channels_and_the_bonus_is_the_authors():
    layer = SLMForCausalLM(config()).model.layers[0].token_mixer
    assert (layer.time_decay[0], layer.time_decay[-1]) == (-5, 3)
    assert (layer.time_decay.diff() > 0).all()
    torch.testing.assert_close(layer.time_first[:3], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5]))
    assert not {name for name, p in layer.named_parameters() if p.ndim == 1 and not hasattr(p, "_no_weight_decay")}
    names = {target.name.rpartition(".")[0] for target in weight_targets(layer)}
    assert names == {"key", "value", "receptance", "output"}


def config(**values):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    common = {"pattern": "rwkv4/rwkv4_ffn*2", "norm": "layer", "embedding_norm": True, "positions": "none"}
    return SLMConfig(**{**sizes, **common, **values})


def test_its_arithmetic_is_counted():
    channels = 24
    model = SLMForCausalLM(config(mixers={"rwkv4": {"attention_hidden_size": channels}}))
    token, channel = 4 * 32 * channels, 2 * 32 * 48 + 32 * 32
    expected = 2 * (2 * (token + channel) + 9 * channels) + 2 * 32 * 61
    assert flops_per_token(model, 10) == flops_per_token(model, 1000) == expected


def test_the_state_has_the_same_size_after_any_number_of_tokens():
    layer, sizes = RWKV4(32, 24), set()
    torch.nn.init.normal_(layer.time_decay)

    class Cache(dict):
        def state(self, _):
            return self

        def keep(self, _, state):
            self.update(state)

    cache = Cache()
    for T in (1, 3, 20, 1):
        layer(torch.randn(2, T, 32), Context(cache=cache), 0)
        sizes.add(tuple((name, t.shape) for name, t in cache.items()))
    assert sizes == {(("rwkv_shift", (2, 1, 32)), ("wkv", (2, 3, 24)))}


def test_a_faster_kernel_is_used_where_there_is_one_but_not_over_starts(monkeypatch):
    calls = []

    def fast(*arguments):
        calls.append(arguments)
        return module._reference(*arguments)

    def example(device):
        return [*inputs(20), module.empty_state(torch.empty(B, 1, D))]

    kernel = OptionalKernel("fake", lambda: fast, module._reference, example, devices=("cpu",))
    monkeypatch.setattr(module, "FLA_WKV", kernel)
    arguments = inputs(20)
    y, _ = wkv(*arguments)
    assert len(calls) == 2  # one of them the comparison
    close([y], [naive_wkv(*arguments)[0]], 0)
    wkv(*arguments, starts_BT=torch.rand(B, 20) < 0.2)
    assert len(calls) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and flash-linear-attention")
def test_on_a_gpu_the_kernel_of_flash_linear_attention_agrees():
    pytest.importorskip("fla")
    arguments = [t.detach().cuda().requires_grad_() for t in inputs(100)]
    assert module.FLA_WKV.get(arguments[2]) is not None
    ours, twins = wkv(*arguments)[0], naive_wkv(*arguments)[0]
    close([ours], [twins], 1e-3)
