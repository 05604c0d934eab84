"""Each layer against its slow twin, on outputs and gradients."""

# Shape letters: B = batch, T = tokens, S = tokens looked at, D = model width, H = query heads, K = key-value heads,
# d = head width.

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.nn.attention import Attention, SlidingWindowAttention, naive_attention
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rms_norm import RMSNorm, naive_rms_norm, rms_norm
from lightning_slm.nn.rope import naive_rotate, rope_angles, rotate
from lightning_slm.nn.swiglu import SwiGLU

B, T, D = 2, 11, 24


def same_with_gradients(fast, slow, *inputs, tolerance=1e-5):
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def naive_layer(layer, x_BTD, rope, window=None):
    """The attention layer with separate projections, rotation by complex numbers and written-out attention."""
    weights = layer.qkv_proj.weight.split(layer.fused_rows()["qkv_proj"])
    q, k, v = ((x_BTD @ w.T).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for w in weights)
    y_BHTd = naive_attention(naive_rotate(q, *rope), naive_rotate(k, *rope), v, window)
    return y_BHTd.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
def test_attention_is_the_naive_twin_with_any_grouping_of_heads(H, K):
    layer, x_BTD = Attention(D, H, K, 6), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], 6, 100.0)
    same_with_gradients(layer(x_BTD, Context(rope), 0), naive_layer(layer, x_BTD, rope), x_BTD, *layer.parameters())


@pytest.mark.parametrize("window", [1, 3, 4, 11, 20])
def test_a_sliding_window_sees_its_own_and_the_tokens_just_before(window):
    layer, x_BTD = SlidingWindowAttention(D, 4, 2, 6, window), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], 6, 100.0)
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)
    mask = ((distance_TT >= 0) & (distance_TT < window))[None, None]
    naive = naive_layer(layer, x_BTD, rope, window)
    same_with_gradients(layer(x_BTD, Context(rope), 0), naive, x_BTD, *layer.parameters())
    masked = layer(x_BTD, Context(rope, {"sliding_attention": mask}), 0)
    torch.testing.assert_close(masked, naive, rtol=1e-5, atol=1e-5)


def test_one_new_token_attends_to_all_that_the_cache_returns():
    class Memory:
        def update(self, k_BKTd, v_BKTd, layer_idx):
            self.k, self.v = (
                torch.cat((getattr(self, n, t[:, :, :0]), t), 2) for n, t in (("k", k_BKTd), ("v", v_BKTd))
            )
            return self.k, self.v

    layer, x_BTD, memory = Attention(D, 4, 2, 6), torch.randn(B, T, D), Memory()
    cos, sin = rope_angles(torch.arange(T)[None], 6, 100.0)
    steps = [
        layer(x_BTD[:, t : t + 1], Context((cos[:, :, t : t + 1], sin[:, :, t : t + 1]), {}, memory), 0)
        for t in range(T)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x_BTD, Context((cos, sin)), 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_complex_multiplication(dtype):
    x = torch.randn(B, 3, T, 8, dtype=dtype, requires_grad=True)
    angles = rope_angles(torch.arange(T)[None] * 50, 8, 10000.0)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # bfloat16 keeps eight bits
    same_with_gradients(rotate(x, *angles), naive_rotate(x, *angles), x, tolerance=tolerance)


def test_rotated_products_depend_on_distance_only():
    q, k = torch.randn(8), torch.randn(8)

    def score(i, j):
        cos, sin = rope_angles(torch.tensor([[i, j]]), 8, 10000.0)
        turned = rotate(torch.stack((q, k))[None, None], cos, sin)[0, 0]
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(3, 1), score(3, 2), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(D,), (B, T, D), (3, 400, D)])
def test_the_norm_is_its_definition_and_torchs(dtype, shape):
    norm, x = RMSNorm(D, 1e-5), torch.randn(shape, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    # Sums over up to 1200 rows; in bfloat16, of normalised values rounded to eight bits.
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    same_with_gradients(norm(x), naive_rms_norm(x, norm.weight, 1e-5), x, norm.weight, tolerance=tolerance)
    torchs = F.rms_norm(x.float(), (D,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x).float(), torchs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(norm(x).float(), torchs, rtol=tolerance, atol=tolerance)


def test_the_norm_has_first_and_second_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def second(norm):
        (first,) = torch.autograd.grad(norm(x, weight, 1e-5).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, weight))

    # The norm itself is of float32.
    for a, b in zip(second(rms_norm), second(naive_rms_norm)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_swiglu_gates_the_one_half_with_the_other():
    layer, x_BTD = SwiGLU(D, 40), torch.randn(B, T, D, requires_grad=True)
    gate, up = layer.gate_up_proj.weight.split(layer.fused_rows()["gate_up_proj"])
    slow = (F.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ layer.down_proj.weight.T
    same_with_gradients(
        layer(x_BTD, Context(rope_angles(torch.zeros(1, 1), 2, 1.0)), 0), slow, x_BTD, *layer.parameters()
    )
