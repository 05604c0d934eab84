"""RWKV-7's parts against their definitions: in float64 to rounding, in float32 within 1e-5 of the largest value."""

# Shape letters: B = batch, T = tokens, H = heads, d = width of a head, D = model width.

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.nn import delta_scan as module
from lightning_slm.nn.delta_scan import delta_scan, naive_delta_scan
from lightning_slm.nn.kernels import OptionalKernel
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rwkv7 import RWKV7, RWKV7First
from lightning_slm.nn.targets import weight_targets

B, H, d = 2, 2, 8
FASTEST = -math.exp(-0.5)


def inputs(T, dtype=torch.float32):
    r, k, v, direction, rate = (torch.randn(B, T, H, d, dtype=dtype) for _ in range(5))
    log_w = FASTEST * torch.rand(B, T, H, d, dtype=dtype)
    direction = F.normalize(direction, dim=-1)
    state = torch.randn(B, H, d, d, dtype=dtype)
    return [t.requires_grad_() for t in (r, log_w, k, v, -direction, direction * rate.sigmoid(), state)]


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a - b).abs().max()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("chunk", [4, 16, 32, 64])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 100])
def test_outputs_states_and_gradients_are_the_twins(T, chunk, reset):
    arguments = inputs(T)
    starts = torch.rand(B, T) < 0.15 if reset else None
    results = []
    for function, how in ((delta_scan, {"chunk": chunk}), (naive_delta_scan, {})):
        y, after = function(*arguments, starts, **how)
        torch.manual_seed(1)
        total = (y * torch.randn(y.shape)).sum() + (after * torch.randn(after.shape)).sum()
        results.append((y, after, *torch.autograd.grad(total, arguments)))
    close(*results, 2e-5)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("T", [1, 3, 10])
def test_gradients_are_those_of_finite_differences_with_first_and_last_state(T, reset):
    starts = (torch.arange(T) % 4 == 2).expand(B, -1) if reset else None
    assert torch.autograd.gradcheck(lambda *a: delta_scan(*a, starts, 4), inputs(T, torch.float64), atol=1e-6)


@pytest.mark.parametrize("case", ["fastest decay", "one key, hardly any decay"])
def test_the_extremes_of_the_layer_stay_exact(case):
    """Dividing by the decay, and solving where a text repeats the same key: both in float32, against float64."""
    r, log_w, k, v, minus, _, state = (t.detach() for t in inputs(200))
    if case == "fastest decay":
        log_w, b = torch.full_like(log_w, FASTEST), -minus * 0.9
    else:
        minus = minus[:, :1].expand_as(minus)
        log_w, b = log_w * 1e-3, -minus * 0.999
    arguments = [t.clone().requires_grad_() for t in (r, log_w, k, v, minus, b, state)]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    results = []
    for function, given in ((delta_scan, arguments), (naive_delta_scan, exact)):
        y, after = function(*given)
        results.append((y, after, *torch.autograd.grad(y.square().sum() + after.square().sum(), given)))
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_without_removal_it_is_decaying_linear_attention():
    r, log_w, k, v, _, _, _ = inputs(20)
    y, _ = delta_scan(r, log_w, k, v, torch.zeros_like(k), torch.zeros_like(k))
    decay = log_w.cumsum(1)
    weights = torch.einsum("bthd,bshd,btshd->btsh", r, k, (decay[:, :, None] - decay[:, None]).exp())
    expected = torch.einsum("btsh,bshv->bthv", weights * torch.ones(20, 20).tril()[..., None], v)
    close([y], [expected], 1e-5)


def test_bfloat16_inputs_are_computed_in_float32():
    arguments = [t.detach().bfloat16() for t in inputs(40)[:-1]]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = delta_scan(*arguments)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    zeros = torch.zeros(B, H, d, d)
    close([y, state], naive_delta_scan(*(t.float() for t in arguments), zeros), 1e-5)


def config(**values):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    common = {"norm": "layer", "embedding_norm": True, "positions": "none"}
    pattern = "rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn*2"
    return SLMConfig(**{**sizes, **common, "initializer_range": 0.3, "pattern": pattern, **values})


def naive_rwkv7(layer, x_BTD, first_BTD=None):
    """The paper's equations, one line each, token by token."""
    H, D = layer.num_heads, x_BTD.shape[-1]
    state, before, outputs, values = torch.zeros(len(x_BTD), H, D // H, D // H), torch.zeros_like(x_BTD[:, 0]), [], []

    def low_rank(pair, x, between=lambda x: x):
        return between(x @ pair.down.weight.T) @ pair.up.weight.T

    for t, x in enumerate(x_BTD.unbind(1)):
        x_r, x_w, x_k, x_v, x_a, x_g = (
            x + (before - x) * mix for mix in (layer.x_r, layer.x_w, layer.x_k, layer.x_v, layer.x_a, layer.x_g)
        )
        r, k, v = x_r @ layer.receptance.weight.T, x_k @ layer.key.weight.T, x_v @ layer.value.weight.T
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(layer.w0 + low_rank(layer.decay, x_w, torch.tanh)))
        a = torch.sigmoid(layer.a0 + low_rank(layer.rate, x_a))
        g = low_rank(layer.gate, x_g, torch.sigmoid)
        if first_BTD is not None:
            v = v + (first_BTD[:, t] - v) * torch.sigmoid(layer.v0 + low_rank(layer.value_share, x_v))
        values.append(v)
        kappa = (k * layer.k_k).unflatten(-1, (H, -1))
        kappa = (kappa / kappa.norm(dim=-1, keepdim=True)).unsqueeze(-2)
        k = k * (1 + (a - 1) * layer.k_a)
        r, w, k, v, a = (z.unflatten(-1, (H, -1)).unsqueeze(-2) for z in (r, w, k, v, a))  # rows of each head
        state = state * w - state @ kappa.mT @ (a * kappa) + v.mT @ k  # here of shape (value, key), as in the paper
        y = (state @ r.mT).flatten(1)
        y = F.group_norm(y, H, layer.norm.weight, layer.norm.bias, 64e-5)
        y = y + ((r * k * layer.r_k.view(H, 1, -1)).sum(-1, keepdim=True) * v).flatten(1)
        outputs.append((y * g) @ layer.output.weight.T)
        before = x
    return torch.stack(outputs, 1), torch.stack(values, 1)


def randomised(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def test_the_layers_are_the_papers_equations_with_values_of_the_first():
    first, later = randomised(RWKV7First.from_config(config())), randomised(RWKV7.from_config(config()))
    x, z = (torch.randn(2, 11, 32, requires_grad=True) for _ in range(2))
    context, parameters = Context(), [*first.parameters(), *later.parameters()]
    ours = first(x, context, 0), later(z, context, 1)
    y, values = naive_rwkv7(first, x)
    twins = y, naive_rwkv7(later, z, values)[0]
    weights = torch.randn(2, 11, 32)
    gradients = [torch.autograd.grad(((a + b) * weights).sum(), [x, z, *parameters]) for a, b in (ours, twins)]
    close((*ours, *gradients[0]), (*twins, *gradients[1]), 2e-5)


def test_a_model_without_a_first_layer_is_refused():
    with pytest.raises(ValueError, match="'rwkv7_first/rwkv7_ffn rwkv7/rwkv7_ffn"):
        SLMForCausalLM(config(pattern="rwkv7/rwkv7_ffn*2"))


def test_reversible_residuals_are_refused():
    model = SLMForCausalLM(config(reversible=True)).train()
    ids_BT = torch.randint(61, (1, 5))
    with pytest.raises(ValueError, match="reversible=True"):
        model(ids_BT, labels=ids_BT)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="hidden_size=32 must be a multiple of num_attention_heads=5"):
        SLMForCausalLM(config(num_attention_heads=5, num_key_value_heads=5, head_dim=8))


def test_first_values_are_the_authors_and_what_they_do_not_decay_is_marked():
    model = SLMForCausalLM(
        config(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.02)
    )
    layer = model.model.layers[1].token_mixer
    zigzag = 2.5 * torch.ones(2)
    torch.testing.assert_close(layer.w0[[0, -1]], torch.tensor([-5.5, 0.5]) + zigzag * torch.tensor([-1.0, 1.0]))
    assert (layer.x_r[0], layer.k_a[0]) == (1, 1.02)
    decays = [n for n, p in layer.named_parameters() if p.ndim == 1 and not hasattr(p, "_no_weight_decay")]
    assert decays == ["norm.weight", "norm.bias"]  # norms are known to optimizers anyway
    assert layer.decay.up.weight.T.matmul(layer.decay.up.weight).diagonal().allclose(torch.tensor(0.01 * 4))
    names = {target.name.rpartition(".")[0] for target in weight_targets(layer)}
    assert names == {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}


def test_ranks_are_the_authors_unless_given():
    layer = RWKV7.from_config(config(hidden_size=768, num_attention_heads=12, num_key_value_heads=12), gate_rank=40)
    ranks = [pair.down.out_features for pair in (layer.decay, layer.rate, layer.value_share, layer.gate)]
    assert ranks == [64, 64, 32 * round(1.7 * 768**0.5 / 32), 40]


def test_its_arithmetic_is_counted():
    model = SLMForCausalLM(config())
    first = 4 * 32 * 32 + 3 * 2 * 32 * 32
    expected = 2 * (3 * first + 2 * 2 * 32 * 32) + 3 * 9 * 4 * 8 * 8 + 3 * 2 * 2 * 32 * 48 + 2 * 32 * 61
    assert flops_per_token(model, 10) == flops_per_token(model, 1000) == expected


def test_a_faster_kernel_is_used_where_there_is_one_but_not_over_starts(monkeypatch):
    calls = []

    def fast(*arguments):
        calls.append(arguments)
        return naive_delta_scan(*arguments)

    kernel = OptionalKernel("fake", lambda: fast, naive_delta_scan, lambda device: inputs(20), devices=("cpu",))
    monkeypatch.setattr(module, "FLA_DELTA", kernel)
    arguments = inputs(20)
    y, _ = delta_scan(*arguments)
    assert len(calls) == 2  # one of them the comparison
    close([y], [naive_delta_scan(*arguments)[0]], 0)
    delta_scan(*arguments, starts_BT=torch.rand(B, 20) < 0.2)
    assert len(calls) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and flash-linear-attention")
def test_on_a_gpu_the_kernel_of_flash_linear_attention_agrees():
    pytest.importorskip("fla")
    arguments = [t.detach().cuda().requires_grad_() for t in module._example(torch.device("cuda"))]
    assert module.FLA_DELTA.get(arguments[0]) is not None
    close(delta_scan(*arguments), naive_delta_scan(*arguments), 1e-2)
