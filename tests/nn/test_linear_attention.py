"""Linear attention against attention's own form, O(T²), and against the recurrence."""

# Shape letters: B = batch, T = tokens, D = model width, H = query heads, K = key-value heads, d = head width,
# f = features, e = width of a value, C = tokens of a chunk.

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM, SLMModel
from lightning_slm.nn.linear_attention import (
    _FLA,
    FEATURE_MAPS,
    LinearAttention,
    _chunked,
    causal_sums,
    divided,
    naive_causal_sums,
    two_sided_sums,
)
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import rope_angles

B, D, d = 2, 24, 6
LENGTHS = [1, 2, 5, 13, 32]


def same_with_gradients(fast, slow, *inputs, tolerance=1e-5):
    fast, slow = (out if isinstance(out, tuple) else (out,) for out in (fast, slow))
    pulls = [torch.randn_like(a) for a in slow]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    grads = (torch.autograd.grad(out, inputs, pulls) for out in (fast, slow))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random_sums(T, H=4, K=2, f=6, e=5, dtype=torch.float64):
    q, k = (torch.rand(B, heads, T, f, dtype=dtype, requires_grad=True) for heads in (H, K))
    v, state = (torch.randn(B, K, rows, e, dtype=dtype, requires_grad=True) for rows in (T, f))
    return q, k, v, state


def starts(T, at=(3, 4, 9)):
    starts_BT = torch.zeros(B, T, dtype=torch.bool)
    starts_BT[0, [t for t in at if t < T]] = True
    starts_BT[1, T // 2] = True
    return starts_BT


def plain_phi(x):
    """The default feature map as the paper writes it."""
    return torch.where(x > 0, x + 1, x.exp())


def quadratic(layer, x_BTD, visible_BTT, rope=None):
    """The layer with every weight of every pair of tokens written out."""
    q, k, v = (
        (x_BTD @ w.T).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for w in layer.qkv_proj.weight.split(layer.fused_rows()["qkv_proj"])
    )
    k, v = (t.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for t in (k, v))
    q, k = plain_phi(q), plain_phi(k)
    below = ((q @ k.mT) * visible_BTT[:, None]).sum(-1, keepdim=True) + 1e-6
    if rope is not None:

        def turn(x):  # complex numbers, as RoFormer has it
            cos, sin = rope
            z = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
            return torch.cat((z.real, z.imag), -1)

        q, k = turn(q), turn(k)
    y_BHTd = ((q @ k.mT) * visible_BTT[:, None]) @ v / below
    return y_BHTd.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


@pytest.mark.parametrize("begins", [False, True], ids=["one_text", "texts"])
@pytest.mark.parametrize("C", [1, 4, 64])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_are_the_recurrence_with_its_gradients_and_states(T, C, begins):
    inputs = random_sums(T)
    where = starts(T) if begins else None
    fast, slow = causal_sums(*inputs, where, C), naive_causal_sums(*inputs, where)
    same_with_gradients(fast, slow, *inputs, tolerance=1e-10)


@pytest.mark.parametrize("begins", [False, True], ids=["one_text", "texts"])
def test_the_gradients_of_the_chunks_are_numerically_right(begins):
    inputs = random_sums(7, 4, 2, 2, 3)
    where = starts(7) if begins else None
    assert torch.autograd.gradcheck(lambda *a: causal_sums(*a, where, 3), inputs)


def test_the_operator_keeps_the_rules_of_custom_operators():
    inputs = random_sums(7, 4, 2, 2, 3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_chunked, (*inputs, starts(7), 3), test_utils=checks)


@pytest.mark.parametrize("turned", [False, True], ids=["none", "rope"])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", LENGTHS)
def test_in_a_decoder_it_is_attention_with_features_for_scores(T, H, K, turned):
    layer, x_BTD = LinearAttention(D, H, K, d, chunk=4), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0) if turned else None
    slow = quadratic(layer, x_BTD, torch.ones(B, T, T).tril(), rope)
    same_with_gradients(layer(x_BTD, Context(rope), 0), slow, x_BTD, *layer.parameters())


@pytest.mark.parametrize("turned", [False, True], ids=["none", "rope"])
def test_in_an_encoder_every_token_but_padding_is_seen(turned):
    T = 13
    layer, x_BTD = LinearAttention(D, 4, 2, d), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0) if turned else None
    tokens_BT = torch.rand(B, T) < 0.7
    slow = quadratic(layer, x_BTD, tokens_BT[:, None, :].expand(B, T, T), rope)
    fast = layer(x_BTD, Context(rope, tokens_BS=tokens_BT, causal=False), 0)
    same_with_gradients(fast, slow, x_BTD, *layer.parameters())


def test_packed_texts_of_an_encoder_see_themselves_only():
    T = 13
    layer, x_BTD = LinearAttention(D, 4, 2, d), torch.randn(B, T, D, requires_grad=True)
    context = Context(starts_BT=starts(T), causal=False)
    text_BT = context.segments_BT
    slow = quadratic(layer, x_BTD, text_BT[:, :, None] == text_BT[:, None, :])
    same_with_gradients(layer(x_BTD, context, 0), slow, x_BTD, *layer.parameters())


def test_one_text_on_both_sides_is_the_sum_over_all():
    q, k, v, _ = random_sums(9)
    unmarked, _ = two_sided_sums(q, k, v, None, None)
    torch.testing.assert_close(two_sided_sums(q, k, v, None, torch.zeros(B, 9, dtype=torch.bool))[0], unmarked)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_never_negative_and_finite_for_any_input(name):
    phi, times = FEATURE_MAPS[name]
    x = (torch.randn(B, 3, 5, d) * 100).requires_grad_()
    y = phi(x)
    assert y.shape == (B, 3, 5, times * d)
    assert (y >= 0).all()
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


def test_the_features_of_the_paper_have_the_slope_of_their_definition():
    x = torch.randn(2, 5, 3, d, requires_grad=True).transpose(1, 2)
    same_with_gradients(FEATURE_MAPS["elu1"][0](x), plain_phi(x), x, tolerance=1e-6)
    exact = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FEATURE_MAPS["elu1"][0], exact)


def test_the_other_features_are_their_papers():
    x = torch.randn(4, d)
    torch.testing.assert_close(FEATURE_MAPS["relu"][0](x), x.clamp(min=0) + 1e-3)
    e = x.exp()
    hedgehog = torch.cat((e / e.sum(-1, keepdim=True), 1 / e / (1 / e).sum(-1, keepdim=True)), -1)
    torch.testing.assert_close(FEATURE_MAPS["softmax"][0](x), hedgehog)
    signed = torch.cat((x, -x), -1).clamp(min=0)
    neighbours = torch.stack([signed[:, i] * signed[:, i - 1] for i in range(2 * d)], -1)
    torch.testing.assert_close(FEATURE_MAPS["dpfp"][0](x), neighbours)


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_with_any_features_reading_in_pieces_equals_reading_at_once(name, positions):
    mixers = {"linear_attention": {"feature_map": name, "chunk": 4}}
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    pattern = "linear_attention/mlp*2"
    config = SLMConfig(**sizes, pattern=pattern, mixers=mixers, positions=positions, initializer_range=0.2)
    model, ids_BT = SLMForCausalLM(config).eval(), torch.randint(31, (B, 17))
    with torch.no_grad():
        cache = SLMCache(config)
        pieces = [model(part, past_key_values=cache).logits for part in ids_BT.split([6, 1, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids_BT).logits, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_sums_stay_in_float32():
    layer, x_BTD = LinearAttention(D, 4, 2, d), torch.randn(B, 40, D)
    seen = []

    class Memory:
        def state(self, layer_idx):
            return {}

        def keep(self, layer_idx, state):
            seen.append(state["linear_state"])

    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = layer.project(x_BTD, Context())
        y_BTD = layer(x_BTD, Context(cache=Memory()), 0)
    exact = k.transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0)
    torch.testing.assert_close(seen[0], exact, rtol=1e-6, atol=1e-5)
    assert q.dtype == torch.float32
    assert y_BTD.dtype == torch.bfloat16


def test_no_gradient_is_needed_and_none_is_given():
    q, k, v, state = (t.detach() for t in random_sums(9))
    found, after = causal_sums(q, k, v, state)
    assert not found.requires_grad
    assert after.data_ptr() not in {t.data_ptr() for t in (q, k, v, state)}


def test_flops_are_those_of_the_recurrence():
    config = SLMConfig(vocab_size=10, hidden_size=64, intermediate_size=8, num_key_value_heads=2)
    layer = LinearAttention.from_config(config)
    H, K, width = 4, 2, 16
    matrices = 2 * 64 * (H + 2 * K) * width + 2 * H * width * 64
    states = 2 * K * width * (width + 1) + 2 * H * width * (width + 1)
    assert layer.flops_per_token(7) == matrices + states == layer.flops_per_token(7000)
    assert LinearAttention(64, 4, 2, 16, "dpfp").flops_per_token(7) == matrices + 2 * states
    pattern = {"pattern": "linear_attention/mlp", "num_key_value_heads": 2}
    model = SLMForCausalLM(SLMConfig(vocab_size=10, hidden_size=64, intermediate_size=8, **pattern))
    assert flops_per_token(model, 100) == matrices + states + 3 * 2 * 64 * 8 + 2 * 10 * 64


@pytest.mark.parametrize(
    ("options", "message"), [({"feature_map": "cosine"}, "'elu1'.*'dpfp'"), ({"chunk": 0}, "chunk=0")], ids=str
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    config = SLMConfig(pattern="linear_attention/mlp", mixers={"linear_attention": options})
    with pytest.raises(ValueError, match=message):
        SLMModel(config)


def test_the_kernel_of_another_package_is_called_by_its_own_conventions(monkeypatch):
    asked = []

    def chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize):
        assert (scale, output_final_state, normalize) == (1.0, True, False)
        asked.append(q.shape)
        found, state = naive_causal_sums(*(t.transpose(1, 2) for t in (q, k, v)), initial_state)
        return found.transpose(1, 2), state

    packages = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.linear_attn")}
    packages["fla.ops.linear_attn"].chunk_linear_attn = chunk_linear_attn
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(_FLA, "devices", ("cpu",))
    monkeypatch.setattr(_FLA, "_found", {})
    inputs = random_sums(9)
    same_with_gradients(causal_sums(*inputs), naive_causal_sums(*inputs), *inputs, tolerance=1e-10)
    assert asked[-1] == (B, 9, 4, 6)
    asked.clear()
    causal_sums(*inputs, starts(9))  # texts of several beginnings, and fewer tokens than heads, are left to ours
    causal_sums(*random_sums(2))
    assert asked == []


def test_the_quotient_has_the_gradient_of_a_quotient():
    above, below = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 1, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(divided, (above.requires_grad_(), below.requires_grad_()))
    torch.testing.assert_close(divided(above, below), above / (below + 1e-6))
