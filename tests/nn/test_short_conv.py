"""The short convolution and its silu against PyTorch's convolution, outputs and all derivatives."""

# Shape letters: B = batch, T = tokens, C = channels, W = taps.

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.nn.short_conv import ShortConv, _ConvSiLU, naive_short_conv


def conv_of(taps=4, bias=True):
    return ShortConv(6, taps, bias).double()


def half(wide_BTC):
    """The middle of what one projection makes, as in the mixers: not contiguous."""
    return wide_BTC[..., 3:9]


def wide_of(*sizes):
    return torch.randn(*sizes, 11, dtype=torch.float64, requires_grad=True)


def naive(conv, x_BTC):
    return F.silu(naive_short_conv(x_BTC, conv.weight, conv.bias))


def last_of(x_BTC, taps):
    return F.pad(x_BTC, (0, 0, taps - 1, 0))[:, x_BTC.shape[1] :]


def same_with_gradients(a, b, inputs, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(b)
    found, expected = (torch.autograd.grad(t, inputs, pull) for t in (a, b))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_and_gradients_are_the_definitions(taps, length, bias, batch):
    conv, wide = conv_of(taps, bias), wide_of(batch, length)
    inputs, x_BTC = [wide, *conv.parameters()], half(wide)
    (y, last), (sums, last_of_sums) = conv.silu(x_BTC), conv(x_BTC)
    same_with_gradients(y, naive(conv, x_BTC), inputs)
    same_with_gradients(sums, naive_short_conv(x_BTC, conv.weight, conv.bias), inputs)
    for found in (last, last_of_sums):
        assert torch.equal(found, last_of(x_BTC, taps))
        assert not found.requires_grad


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_a_text_in_pieces_is_the_whole(taps, first):
    conv, wide = conv_of(taps), wide_of(2, 9)
    pieces, before = [], None
    for part in half(wide).split([first, 1, 1, 7 - first], 1) if first else half(wide).split([3, 6], 1):
        y, before = conv.silu(part, before)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), naive(conv, half(wide)), rtol=1e-10, atol=1e-10)
    assert torch.equal(before, last_of(half(wide), taps))


def test_what_came_before_has_the_gradients_of_a_longer_text():
    conv, wide = conv_of(), wide_of(2, 8)
    x_BTC = half(wide)
    y, _ = conv.silu(x_BTC[:, 3:], x_BTC[:, :3])
    same_with_gradients(y, naive(conv, x_BTC)[:, 3:], [wide, *conv.parameters()])


def test_segments_are_texts_of_their_own():
    conv, wide = conv_of(), wide_of(2, 12)
    x_BTC, sizes = half(wide), [[2, 7, 1, 2], [5, 1, 6]]
    starts_BT = torch.zeros(2, 12, dtype=torch.bool)
    for row, lengths in enumerate(sizes):
        starts_BT[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    y, last = conv.silu(x_BTC, segments_BT=starts_BT.cumsum(-1))
    texts = [torch.cat([naive(conv, t) for t in x[None].split(n, 1)], 1) for x, n in zip(x_BTC, sizes)]
    same_with_gradients(y, torch.cat(texts), [wide, *conv.parameters()])
    assert torch.equal(last, x_BTC[:, -3:])


def test_only_the_first_segment_goes_on_from_what_came_before():
    conv, wide = conv_of(), wide_of(1, 9)
    x_BTC = half(wide)
    _, before = conv.silu(x_BTC[:, :4])
    y, _ = conv.silu(x_BTC[:, 4:], before, torch.tensor([[0, 0, 1, 1, 1]]))
    expected = torch.cat((naive(conv, x_BTC[:, :6])[:, 4:], naive(conv, x_BTC[:, 6:])), 1)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives_are_right(taps, length, bias):
    x_BTC, *weights = wide_of(2, length), *conv_of(taps, bias).parameters()
    inputs = (x_BTC, *weights, *[None] * (2 - len(weights)))
    assert torch.autograd.gradcheck(lambda x, *w: _ConvSiLU.apply(half(x), *w), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *w: _ConvSiLU.apply(half(x), *w), inputs)


def test_a_convolution_used_twice_has_the_same_gradients_when_they_are_differentiated():
    conv, wide = conv_of(), wide_of(2, 5)
    inputs = (wide, *conv.parameters())
    y, _ = conv.silu(conv.silu(half(wide))[0])
    plain, differentiable = (torch.autograd.grad(y.sum(), inputs, create_graph=g, retain_graph=True) for g in (0, 1))
    torch.testing.assert_close(differentiable, plain, rtol=1e-10, atol=1e-10)
    twin = torch.autograd.grad(naive(conv, naive(conv, half(wide))).sum(), inputs, create_graph=True)
    second, expected = (torch.autograd.grad(sum(g.square().sum() for g in t), inputs) for t in (differentiable, twin))
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-9)


def test_second_derivatives_with_frozen_weights_are_right():
    conv = conv_of().requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: conv.silu(half(x))[0], (wide_of(2, 5),))


@pytest.mark.parametrize("length", [2, 9])
def test_half_precision_is_its_twin_within_its_rounding(length):
    conv, wide = conv_of().float(), wide_of(2, length)
    x_BTC, precise_BTC = (
        half(wide).detach().bfloat16().to(t).requires_grad_() for t in (torch.bfloat16, torch.float32)
    )
    y, expected = conv.silu(x_BTC)[0], naive(conv, precise_BTC)
    assert y.dtype == torch.bfloat16
    pull = torch.randn_like(y)
    found = torch.autograd.grad(y, (x_BTC, *conv.parameters()), pull)
    wanted = torch.autograd.grad(expected, (precise_BTC, *conv.parameters()), pull.float())
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=5e-2)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("length", [2, 9])
def test_it_is_the_same_compiled_and_without_gradients(length):
    conv, wide = conv_of(), wide_of(2, length)
    compiled = torch.compile(lambda wide_BTC: conv.silu(half(wide_BTC)), backend="aot_eager", fullgraph=True)
    (y, last), expected = compiled(wide), naive(conv, half(wide))
    same_with_gradients(y, expected, [wide, *conv.parameters()])
    assert torch.equal(last, last_of(half(wide), 4))
    with torch.no_grad():
        torch.testing.assert_close(conv.silu(half(wide))[0], expected, rtol=1e-10, atol=1e-10)
