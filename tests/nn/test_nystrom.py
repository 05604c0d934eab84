"""Nyström attention against Hugging Face's where that is right, and against attention itself."""

# Shape letters: B = batch, T = tokens, M = landmarks, D = model width, H = query heads, K = key-value heads,
# d = head width.

import pytest
import torch
import torch.nn.functional as F
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMModel
from lightning_slm.nn.attention import naive_attention
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.nystrom import (
    Nystrom,
    approximated,
    naive_text_conv,
    nystrom_attention,
    pseudo_inverse,
    segment_means,
    text_conv,
)

B, D, d = 3, 24, 6


def same_with_gradients(fast, slow, *inputs, tolerance=1e-5):
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(slow)
    fast_grads = torch.autograd.grad(fast, inputs, pull, retain_graph=True)
    for a, b in zip(fast_grads, torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def heads(T, H=4, K=2, dtype=torch.float32):
    return [torch.randn(B, n, T, d, dtype=dtype, requires_grad=True) for n in (H, K, K)]


def theirs(layer, T):
    """Hugging Face's layer with the same weights, for texts of just this length. Its Z0 divides by the largest norm of
    all heads; the other choice, each matrix by its own, can only be set from outside.
    """
    config = NystromformerConfig(
        hidden_size=D,
        num_attention_heads=layer.num_heads,
        num_landmarks=layer.landmarks,
        segment_means_seq_len=T,
        conv_kernel_size=1 if layer.conv_weight is None else layer.conv_weight.shape[1],
        attention_probs_dropout_prob=0.0,
    )
    other = NystromformerSelfAttention(config)
    other.init_option = "exact"
    if layer.conv_weight is None:
        other.conv_kernel_size = None  # the configuration refuses it
    with torch.no_grad():
        parts = zip(layer.qkv_proj.weight.chunk(3), layer.qkv_proj.bias.chunk(3))
        for linear, (weight, bias) in zip((other.query, other.key, other.value), parts):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        if layer.conv_weight is not None:
            other.conv.weight.copy_(layer.conv_weight[:, None, :, None])
    return other


@pytest.mark.parametrize("conv_size", [5, None])
@pytest.mark.parametrize(("T", "M"), [(32, 4), (24, 8), (8, 8)], ids=str)
def test_where_hugging_face_is_right_it_is_the_same(T, M, conv_size):
    layer, x_BTD = Nystrom(D, 4, 4, d, M, conv_size), torch.randn(B, T, D, requires_grad=True)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    other = theirs(layer, T)
    slow = F.linear(other(x_BTD)[0], layer.o_proj.weight, layer.o_proj.bias)
    fast = layer(x_BTD, Context(causal=False), 0)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    pull = torch.randn_like(slow)
    fast.backward(pull)
    gradient = x_BTD.grad.clone()
    x_BTD.grad = None
    slow.backward(pull)
    pairs = [(gradient, x_BTD.grad)]
    for kind in ("weight", "bias"):
        stacked = torch.cat([getattr(linear, kind).grad for linear in (other.query, other.key, other.value)])
        pairs.append((getattr(layer.qkv_proj, kind).grad, stacked))
    if conv_size:
        pairs.append((layer.conv_weight.grad, other.conv.weight.grad[:, 0, :, 0]))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 5, 8])
def test_a_text_no_longer_than_the_landmarks_is_attended_to_exactly(T):
    q, k, v = heads(T)
    everything = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    same_with_gradients(nystrom_attention(q, k, v, 8), everything, q, k, v)


def test_with_a_landmark_for_every_token_the_approximation_is_near_attention():
    q, k, v = heads(12, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    far = (approximated(q, k, v, 3) - exact).abs().max()
    near = (approximated(q, k, v, 12) - exact).abs().max()
    assert near < 0.1 * far
    assert near < 0.05


def test_more_iterations_make_the_pseudo_inverse_exact():
    a = torch.randn(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    errors = [(a @ pseudo_inverse(a, n) @ a - a).abs().max() for n in (1, 6, 40)]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(pseudo_inverse(a, 40), torch.linalg.pinv(a), rtol=1e-6, atol=1e-6)


def test_the_pseudo_inverse_of_one_matrix_does_not_depend_on_the_others():
    a = torch.randn(5, 2, 6, 6).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(a)[3:4], pseudo_inverse(a[3:4]))


@pytest.mark.parametrize("lengths", [None, (13, 4, 9)], ids=["all", "lengths"])
@pytest.mark.parametrize("M", [1, 4])
def test_segments_are_equally_long_up_to_one_and_begin_with_the_text(M, lengths):
    x = torch.randn(B, 2, 13, d, requires_grad=True)
    given = None if lengths is None else torch.tensor(lengths)
    rows = []
    for row, length in zip(x, lengths or (13,) * B):
        parts = [[t for t in range(length) if t * M // length == s] for s in range(M)]
        assert {len(p) for p in parts} <= {length // M, -(-length // M)}
        rows.append(torch.stack([row[:, p].mean(1) for p in parts], 1))
    same_with_gradients(segment_means(x, M, given), torch.stack(rows), x)


def test_equal_segments_are_means_of_neighbours():
    x = torch.randn(B, 2, 12, d)
    torch.testing.assert_close(segment_means(x, 4), segment_means(x, 4, torch.tensor([12, 12, 12])))


@pytest.mark.parametrize("M", [1, 3, 8])
def test_rows_of_different_lengths_are_what_each_is_alone(M):
    lengths = torch.tensor([17, 3, 9])
    q, k, v = heads(17)
    together = nystrom_attention(q, k, v, M, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = nystrom_attention(*(t[row : row + 1, :, :n] for t in (q, k, v)), M)
        same_with_gradients(together[row : row + 1, :, :n], alone, q, k, v)


def test_a_row_of_nothing_but_padding_is_finite_and_hurts_no_other():
    q, k, v = heads(9)
    y = nystrom_attention(q, k, v, 4, torch.tensor([9, 0, 5]))
    y.sum().backward()
    assert all(torch.isfinite(t).all() for t in (y, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_anywhere_changes_nothing(side):
    T, length = 19, 11
    layer, x_1TD = Nystrom(D, 4, 2, d, 4, 5).double(), torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    begin = {"left": T - length, "right": 0, "both": 4}[side]
    tokens = torch.zeros(1, T, dtype=torch.bool)
    tokens[:, begin : begin + length] = True
    starts = None if side == "right" else F.pad(tokens[:, 1:] & ~tokens[:, :-1], (1, 0))
    padded = layer(x_1TD, Context(tokens_BS=tokens, starts_BT=starts, causal=False), 0)
    alone = layer(x_1TD[:, begin : begin + length], Context(causal=False), 0)
    same_with_gradients(padded[:, begin : begin + length], alone, x_1TD, *layer.parameters(), tolerance=1e-9)


@pytest.mark.parametrize("W", [1, 5, 65])
@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_banded_products_are_the_convolution(T, W):
    # In double precision: in float32, the gradient that oneDNN gives such a long filter is wrong (torch 2.13.0).
    v = torch.randn(B, 2, T, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, W, dtype=torch.float64, requires_grad=True)
    same_with_gradients(text_conv(v, weight), naive_text_conv(v, weight), v, weight, tolerance=1e-9)
    v, weight = (t.detach().float().requires_grad_() for t in (v, weight))
    single = text_conv(v, weight)
    torch.testing.assert_close(single, naive_text_conv(v, weight), rtol=1e-4, atol=1e-4)


def test_grouped_heads_are_repeated_heads():
    q, k, v = heads(20)
    repeated = approximated(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 5)
    same_with_gradients(approximated(q, k, v, 5), repeated, q, k, v)


def test_the_iteration_stays_in_float32_under_autocast():
    q, k, v = (t * 3 for t in heads(64))
    exact = approximated(q, k, v, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = approximated(*(t.bfloat16() for t in (q, k, v)), 16)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_flops_are_of_both_kernels_and_a_share_of_what_is_paid_once_a_text():
    layer = Nystrom(64, 4, 2, 16, 8, 5)
    matrices = 2 * 64 * (4 + 2 * 2) * 16 + 2 * 4 * 16 * 64
    conv = 2 * 5 * 2 * 16
    assert layer.flops_per_token(6) == matrices + conv + 4 * 4 * 16 * 6
    once = 4 * (2 * 8 * 8 * 16 + 2 * 8 * 8 * 16 + 6 * 4 * 2 * 8**3)
    assert layer.flops_per_token(100) == matrices + conv + 2 * (4 * 4 * 16 * 8) + once // 100
    sizes = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 8, "num_key_value_heads": 2, "causal": False}
    options = {"mixers": {"nystrom": {"landmarks": 8, "conv_size": 5}}}
    model = SLMModel(SLMConfig(**sizes, **options, pattern="nystrom/mlp"))
    assert flops_per_token(model, 100) == layer.flops_per_token(100) + 3 * 2 * 64 * 8


def test_it_is_attention_of_the_naive_twin_for_the_last_token_of_a_short_text():
    q, k, v = heads(5)
    torch.testing.assert_close(nystrom_attention(q, k, v, 8)[:, :, -1], naive_attention(q, k, v)[:, :, -1])


def test_packed_documents_are_refused_with_a_way_out():
    layer, starts_BT = Nystrom(D, 4, 2, d, 4, 5), torch.zeros(B, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="document_mask=False"):
        layer(torch.randn(B, 9, D), Context(starts_BT=starts_BT, causal=False), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"landmarks": 0}, "landmarks=0"), ({"conv_size": 64}, "conv_size=64 must be odd")],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    config = SLMConfig(pattern="nystrom/mlp", causal=False, mixers={"nystrom": options})
    with pytest.raises(ValueError, match=message):
        SLMModel(config)


def test_the_published_projections_have_a_bias_and_need_not():
    assert Nystrom(D, 4, 2, d).qkv_proj.bias is not None
    assert Nystrom(D, 4, 2, d, bias=False).o_proj.bias is None
