"""State-space duality against its recurrence, token by token, and against transformers' scan of Mamba-2."""

# Shape letters: B = batch, T = tokens, H = heads, P = width of a head, G = groups, N = width of B and C.

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from lightning_slm.nn import ssd as module
from lightning_slm.nn.kernels import OptionalKernel
from lightning_slm.nn.ssd import _SSD, naive_ssd, plain_ssd, ssd, ssd_step

SHAPES = {  # B, T, H, P, G, N, chunk
    "rest": (2, 13, 4, 3, 2, 5, 4),
    "one token": (1, 1, 2, 3, 1, 4, 8),
    "whole chunks": (2, 8, 2, 3, 1, 4, 4),
    "one short chunk": (1, 9, 4, 2, 4, 3, 64),
    "chunks of one": (1, 5, 2, 1, 1, 1, 1),
    "long": (2, 150, 4, 8, 2, 16, 64),
}
WAYS = {"chunk by chunk": _SSD.apply, "plain": plain_ssd}


def inputs(B, T, H, P, G, N, dtype=torch.float64):
    def random(*shape):
        return torch.randn(shape, dtype=dtype)

    values = [random(B, T, H, P), F.softplus(random(B, T, H)), -3 * torch.rand(H, dtype=dtype)]
    values += [random(B, T, G, N), random(B, T, G, N), random(H), random(B, H, P, N)]
    return [v.requires_grad_() for v in values]


def some_starts(B, T):
    starts_BT = torch.rand(B, T) < 0.15
    starts_BT[:, T // 2] = True
    return starts_BT


def outputs_and_gradients(outputs, wanted):
    torch.manual_seed(1)
    pulls = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, pulls)]


@pytest.mark.parametrize("starts", [False, True], ids=["one text", "several texts"])
@pytest.mark.parametrize("state", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_outputs_last_state_and_gradients_are_those_of_the_recurrence(way, shape, state, starts):
    *sizes, chunk = shape
    values = inputs(*sizes)
    starts_BT = some_starts(*sizes[:2]) if starts else None
    if not state:
        values[-1] = None
    wanted = [v for v in values if v is not None]
    fast = outputs_and_gradients(way(*values, starts_BT, chunk, True), wanted)
    slow = outputs_and_gradients(naive_ssd(*values, starts_BT), wanted)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_float32_too_within_1e_4(shape):
    *sizes, chunk = shape
    values = inputs(*sizes, dtype=torch.float32)
    fast = ssd(*values[:6], h0=values[6], chunk=chunk)
    for a, b in zip(outputs_and_gradients(fast, values), outputs_and_gradients(naive_ssd(*values), values)):
        assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max())


@pytest.mark.parametrize("starts", [False, True], ids=["one text", "several texts"])
def test_first_and_second_derivatives_are_right(starts):
    values = inputs(1, 5, 2, 2, 1, 2)
    starts_BT = torch.tensor([[False, False, False, True, False]]) if starts else None

    def function(*values):
        return _SSD.apply(*values, starts_BT, 2, True)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_scan_of_transformers(groups):
    values = inputs(2, 50, 4, 8, groups, 16, torch.float32)
    x, dt, A, key, query, D, h0 = values
    how = {"chunk_size": 16, "D": D, "initial_states": h0, "return_final_states": True}
    theirs = outputs_and_gradients(mamba2_chunk_scan(x, dt, A, key, query, **how), values)
    ours = outputs_and_gradients(ssd(x, dt, A, key, query, D, h0=h0, chunk=16), values)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


def test_a_token_sees_nothing_later_and_nothing_of_other_texts():
    x, dt, A, key, query, D, h0 = inputs(1, 20, 4, 3, 2, 5, torch.float32)
    starts_BT = torch.zeros(1, 20, dtype=torch.bool)
    starts_BT[:, 11] = True
    y, _ = ssd(x, dt, A, key, query, D, h0=h0, starts_BT=starts_BT, chunk=8)
    *seen, of_dt, of_state = torch.autograd.grad(y[:, 14].sum(), (x, key, dt, h0))
    for grad in seen:
        assert not grad[:, :11].any()
        assert not grad[:, 15:].any()
        assert grad[:, 11:15].any()
    assert of_dt[:, :11].abs().max() < 1e-5 * of_dt.abs().max()  # running sums: equal numbers of both signs
    assert not of_dt[:, 15:].any()
    assert not of_state.any()


def test_pieces_continue_from_a_state():
    x, dt, A, key, query, D, h0 = inputs(2, 30, 4, 3, 2, 5)
    whole, last = ssd(x, dt, A, key, query, D, h0=h0, chunk=8)
    h, parts = h0, []
    for at in (slice(0, 11), slice(11, 12), slice(12, 30)):
        y, h = ssd(x[:, at], dt[:, at], A, key[:, at], query[:, at], D, h0=h, chunk=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(h, last)


def test_a_step_is_one_token_of_it():
    x, dt, A, key, query, D, h0 = inputs(2, 1, 4, 3, 2, 5)
    y, h = ssd_step(x[:, 0], dt[:, 0], A, key[:, 0], query[:, 0], D, h0)
    expected_y, expected_h = naive_ssd(x, dt, A, key, query, D, h0)
    torch.testing.assert_close(y, expected_y[:, 0])
    torch.testing.assert_close(h, expected_h)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rate", [0.0, -1.0, -500.0])
def test_decays_of_nothing_and_of_everything_are_finite(way, rate):
    values = inputs(1, 40, 2, 3, 1, 4)[:6]
    values[2] = torch.full((2,), rate, dtype=torch.float64, requires_grad=True)
    y, _ = way(*values, None, None, 16, False)
    expected, _ = naive_ssd(*values)
    for a, b in zip(outputs_and_gradients([y], values), outputs_and_gradients([expected], values)):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_without_decay_it_is_linear_attention():
    x, _, _, key, query, _, _ = inputs(1, 20, 2, 3, 2, 5)
    ones, zeros = torch.ones(1, 20, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    y, _ = ssd(x, ones, zeros, key, query, chunk=8)
    scores = torch.einsum("bthn,bshn->bhts", query, key).tril()
    torch.testing.assert_close(y, torch.einsum("bhts,bshp->bthp", scores, x))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("fastest", [0.1, 2.0])
def test_in_bfloat16_every_gradient_is_near_even_of_heads_that_forget_fast(way, fastest):
    B, T, H, P, N = 2, 256, 8, 32, 32
    names = ("y", "x", "dt", "A", "B", "C", "D")

    def run(values, low, precise, way):
        given = [v.to(low if i in (0, 3, 4) else precise).requires_grad_() for i, v in enumerate(values)]
        y, _ = way(*given, None, None, 64, False)
        return [t.detach().double() for t in outputs_and_gradients([y], given)]

    wrong, right = {name: [] for name in names}, {name: [] for name in names}
    for _ in range(8):  # a head's sum over all tokens may be near nothing in one of them
        x, key, query = (F.silu(torch.randn(s)) for s in ((B, T, H, P), (B, T, 1, N), (B, T, 1, N)))
        dt = torch.exp(torch.empty(B, T, H).uniform_(-6.9, 0)) * fastest
        values = [x, dt, -torch.linspace(0.1, 16, H), key, query, torch.ones(H)]
        exact = run(values, torch.float64, torch.float64, plain_ssd)
        for name, a, b in zip(names, run(values, torch.bfloat16, torch.float32, way), exact):
            wrong[name].append((a - b).square().flatten(0, -2).sum(0) if name == "dt" else (a - b).square())
            right[name].append(b.square().flatten(0, -2).sum(0) if name == "dt" else b.square())
    for name in names:
        a, b = (torch.stack(each[name]).sum(0) for each in (wrong, right))
        a, b = (a, b) if name in ("dt", "A", "D") else (a.sum(), b.sum())
        assert (a < (0.1 if name == "A" else 0.02) ** 2 * b).all(), name


def test_under_autocast_decays_and_states_stay_in_float32():
    x, dt, A, key, query, D, h0 = inputs(1, 20, 4, 3, 2, 5, torch.float32)
    expected = ssd(x, dt, A, key, query, D, h0=h0)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = ssd(x, dt, A, key, query, D, h0=h0)
        low, h_low = ssd(x.bfloat16(), dt, A, key, query, D, h0=h0)
    assert torch.equal(y, expected[0])
    assert torch.equal(h, expected[1])
    assert (low.dtype, h_low.dtype) == (torch.bfloat16, torch.float32)


def test_nothing_of_all_pairs_is_kept_for_the_backward_pass():
    B, T, H, P, G, N, Q = 1, 256, 4, 8, 1, 8, 64
    values, kept = inputs(B, T, H, P, G, N, torch.float32)[:6], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        ssd(*values, chunk=Q, state=False)
    inside, states = sum(v.numel() for v in values), (T // Q - 1) * H * P * N
    assert sum(kept) == inside + B * T * H * P + states


def test_it_compiles_as_plain_code():
    values = inputs(1, 21, 4, 3, 2, 5, torch.float32)[:6]

    def run(*values):
        return ssd(*values, chunk=8)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(outputs_and_gradients([compiled(*values)], values), outputs_and_gradients([run(*values)], values)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_kernel_is_used_where_it_agrees_and_only_there(monkeypatch):
    values, calls = inputs(1, 20, 4, 3, 2, 5, torch.float32)[:6], []

    def kernel(*arguments):
        calls.append(arguments)
        return plain_ssd(*arguments)

    def liar(*arguments):
        y, h = plain_ssd(*arguments)
        return y * 1.1, h

    def use(function):
        fake = OptionalKernel("fake", lambda: function, plain_ssd, module._example, devices=("cpu",))
        monkeypatch.setattr(module, "KERNEL", fake)
        return ssd(*values, chunk=8)[0]

    expected = ssd(*values, chunk=8)[0]
    torch.testing.assert_close(use(kernel), expected)
    assert len(calls) == 2  # the comparison's, and this
    with pytest.warns(UserWarning, match="fake differs"):
        assert torch.equal(use(liar), expected)


def test_without_mamba_ssm_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.KERNEL.get(torch.zeros(1)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_is_the_recurrence_too():
    values = [v.detach().cuda().requires_grad_() for v in inputs(2, 150, 4, 64, 2, 64, torch.float32)]
    starts_BT = some_starts(2, 150).cuda()
    fast = ssd(*values[:6], h0=values[6], starts_BT=starts_BT)
    slow = naive_ssd(*values, starts_BT)
    gradients = (torch.autograd.grad(y.square().sum() + h.sum(), values) for y, h in (fast, slow))
    for a, b in zip(*gradients):
        assert (a - b).abs().max() < 1e-2 * b.abs().max()
