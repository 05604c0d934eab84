"""Longformer against its slow twin, transformers' LongformerSelfAttention and plain attention."""

# Shape letters: B = batch, T = tokens, D = model width, H = query heads, K = key-value heads, d = head width,
# W = window, G = global tokens.

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lightning_slm.measure import flops_per_token
from lightning_slm.measure.flops import ForwardFlops
from lightning_slm.models import SLMConfig, SLMModel
from lightning_slm.nn.attention import Attention
from lightning_slm.nn.longformer import Longformer, naive_longformer
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import rope_angles

B, D, H, d = 2, 24, 4, 6


def layer_of(window=4, global_tokens=1, kv_heads=H):
    return Longformer(D, H, kv_heads, d, window, global_tokens)


def encoder_context(**values):
    return Context(causal=False, **values)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_with_gradients(fast, slow, *inputs):
    close(fast, slow)
    pull = torch.randn_like(fast)
    ours, theirs = (
        torch.autograd.grad(out, inputs, pull, allow_unused=True, materialize_grads=True) for out in (fast, slow)
    )
    for a, b in zip(ours, theirs):
        close(a, b)


@pytest.mark.parametrize("turned", [False, True], ids=["no positions", "rope"])
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize(("W", "G"), [(2, 1), (4, 3), (6, 0), (40, 1)])
@pytest.mark.parametrize("T", [1, 2, 7, 24, 29])
def test_outputs_and_gradients_are_the_naive_twins(T, W, G, K, turned):
    layer, x_BTD = layer_of(W, G, K), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0) if turned else None
    rows = None if rope is None else tuple(angles[0, 0] for angles in rope)
    naive = torch.stack([naive_longformer(layer, x_TD, rows) for x_TD in x_BTD])
    same_with_gradients(layer(x_BTD, encoder_context(rope=rope), 0), naive, x_BTD, *layer.parameters())


def theirs(layer, x_BTD, real_BT):
    """Transformers' layer with the same weights, told that the first tokens of each row are global."""
    config = LongformerConfig(
        hidden_size=D, num_attention_heads=H, attention_window=[layer.window], attention_probs_dropout_prob=0.0
    )
    weights = {}
    for p in ("weight", "bias"):
        names = ["query", "key", "value"]
        weights.update({f"{name}.{p}": part for name, part in zip(names, getattr(layer.qkv_proj, p).split(D))})
        if layer.global_tokens:
            parts = (getattr(layer.q_global_proj, p), *getattr(layer.kv_global_proj, p).split(D))
            weights.update({f"{name}_global.{p}": part for name, part in zip(names, parts)})
    mask_BT = torch.where(real_BT, 0.0, -10000.0)
    mask_BT[:, : layer.global_tokens] = 10000.0
    other = LongformerSelfAttention(config, 0).eval()
    how = (x_BTD, mask_BT, mask_BT < 0, mask_BT > 0, layer.global_tokens > 0)
    return layer.o_proj(torch.func.functional_call(other, weights, how)[0])


@pytest.mark.parametrize("G", [0, 1, 3])
@pytest.mark.parametrize(("T", "W"), [(16, 4), (16, 8), (16, 16), (24, 4), (13, 4), (21, 8)])
def test_outputs_and_gradients_are_those_of_transformers(T, W, G):
    layer, x_BTD = layer_of(W, G), torch.randn(B, T, D, requires_grad=True)
    real_BT = torch.arange(T) < torch.tensor([T, T - 3])[:, None]
    whole = -(-T // W) * W  # what theirs wants: padded to a multiple of the window
    padded, real = torch.zeros(B, whole, D), torch.zeros(B, whole, dtype=torch.bool)
    padded[:, :T], real[:, :T] = x_BTD, real_BT
    ours = layer(x_BTD, encoder_context(tokens_BS=real_BT), 0)
    same_with_gradients(ours[real_BT], theirs(layer, padded, real)[:, :T][real_BT], x_BTD, *layer.parameters())


@pytest.mark.parametrize("padded", [0, 2], ids=["whole", "left padding"])
@pytest.mark.parametrize("lengths", [(5, 1, 7), (2, 20, 9)], ids=str)
def test_packed_texts_keep_apart_and_each_has_global_tokens_of_its_own(lengths, padded):
    layer, x_1TD = layer_of(4, 3), torch.randn(1, padded + sum(lengths), D)
    starts = torch.zeros(1, padded + sum(lengths), dtype=torch.bool)
    starts[0, torch.tensor((padded, *lengths[:-1])).cumsum(0)] = True
    real = torch.arange(starts.shape[1])[None] >= padded if padded else None
    packed = layer(x_1TD, encoder_context(starts_BT=starts, tokens_BS=real), 0)[:, padded:]
    alone = [layer(part, encoder_context(), 0) for part in x_1TD[:, padded:].split(lengths, 1)]
    close(packed, torch.cat(alone, 1))


def test_with_a_band_over_everything_and_no_global_tokens_it_is_plain_attention():
    layer, plain, x_BTD = Longformer(D, H, 2, d, 22, 0, bias=False), Attention(D, H, 2, d), torch.randn(B, 11, D)
    plain.load_state_dict(layer.state_dict())
    close(layer(x_BTD, encoder_context(), 0), plain(x_BTD, encoder_context(), 0))


@pytest.mark.parametrize(("option", "value"), [("window", 3), ("window", 0), ("global_tokens", -1)])
def test_options_that_do_not_fit_are_refused_by_name(option, value):
    config = SLMConfig(pattern="longformer/mlp", causal=False, mixers={"longformer": {option: value}})
    with pytest.raises(ValueError, match=f"{option}={value}"):
        SLMModel(config)


def test_the_formula_counts_what_runs():
    T, W, G = 64, 64, 1
    layer = layer_of(W, G)
    counter = ForwardFlops([layer])
    layer(torch.randn(1, T, D), encoder_context(), 0)
    counter.remove()  # as one block, so that every token meets all others and the global one
    assert abs(layer.flops_per_token(T) * T - counter.flops) <= 0.02 * counter.flops
    model = SLMModel(SLMConfig(pattern="longformer/mlp*2", causal=False, mixers={"longformer": {"window": 16}}))
    near, far = flops_per_token(model, 100), flops_per_token(model, 10000)
    assert abs(far - near) < 0.01 * near
