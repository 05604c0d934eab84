"""The chunked cross-entropy against all logits at once: loss, gradients, memory, and every kind of head."""

# Shape letters: N = tokens, D = model width, V = vocabulary.

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_slm.nn.cross_entropy import linear_cross_entropy, naive_cross_entropy

N, D, V = 37, 16, 50


@pytest.fixture
def hidden_ND():
    return torch.randn(N, D, requires_grad=True)


@pytest.fixture
def labels_N():
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    return labels


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk", [1, 8, N, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(hidden_ND, labels_N, chunk, bias):
    head = nn.Linear(D, V, bias=bias)
    inputs = (hidden_ND, *head.parameters())
    fast = linear_cross_entropy(hidden_ND, head, labels_N, chunk=chunk)
    slow = naive_cross_entropy(hidden_ND, head, labels_N)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    # A scaled loss: what accumulation and token-correct means do to it.
    for a, b in zip(gradients(fast / 7, *inputs), gradients(slow / 7, *inputs)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_tied_head_adds_its_gradient_to_the_embeddings(labels_N):
    embedding, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    ids = torch.randint(0, V, (N,))
    fast = gradients(linear_cross_entropy(embedding(ids), head, labels_N, chunk=8), embedding.weight)[0]
    slow = gradients(naive_cross_entropy(embedding(ids), head, labels_N), embedding.weight)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def test_extra_losses_see_every_row_once_and_pull_at_the_same_logits(hidden_ND, labels_N):
    head = nn.Linear(D, V)
    target_NV = torch.randn(N, V)
    seen = []

    def towards_target(logits_nV, labels_n, rows):
        assert torch.equal(labels_n, labels_N[rows])
        seen.extend(range(N)[rows])
        return 0.3 * F.mse_loss(logits_nV, target_NV[rows], reduction="sum")

    inputs = (hidden_ND, *head.parameters())
    fast = linear_cross_entropy(hidden_ND, head, labels_N, chunk=8, extra=[towards_target], ce_weight=0.7)
    slow = 0.7 * naive_cross_entropy(hidden_ND, head, labels_N)
    slow = slow + 0.3 * F.mse_loss(head(hidden_ND), target_NV, reduction="sum")
    assert seen == list(range(N))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-5)
    for a, b in zip(gradients(fast, *inputs), gradients(slow, *inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_any_module_is_a_head_and_frozen_weights_stay_without_gradient(hidden_ND, labels_N):
    head = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, V))
    head[0].requires_grad_(False)
    calls = []
    head.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    inputs = (hidden_ND, *head[2].parameters())
    fast = gradients(linear_cross_entropy(hidden_ND, head, labels_N, chunk=10), *inputs)
    assert calls == [10, 10, 10, 7]
    slow = gradients(naive_cross_entropy(hidden_ND, head, labels_N), *inputs)
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert head[0].weight.grad is None


def test_without_gradients_nothing_is_differentiated(hidden_ND, labels_N):
    head = nn.Linear(D, V)
    slow = naive_cross_entropy(hidden_ND, head, labels_N)
    with torch.no_grad():
        fast = linear_cross_entropy(hidden_ND, head, labels_N, chunk=8)
    assert not fast.requires_grad
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(hidden_ND, head, labels_N), fast, rtol=1e-6, atol=1e-6)


def test_under_bf16_autocast_the_loss_stays_float32_and_near(hidden_ND, labels_N):
    head = nn.Linear(D, V)
    inputs = (hidden_ND, head.weight)
    exact = naive_cross_entropy(hidden_ND, head, labels_N)
    with torch.autocast("cpu", torch.bfloat16):
        fast = linear_cross_entropy(hidden_ND, head, labels_N, chunk=8)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, exact, rtol=1e-2, atol=0)  # bfloat16 keeps eight bits
    for a, b in zip(gradients(fast, *inputs), gradients(exact, *inputs)):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


def test_no_tensor_of_all_logits_is_ever_made(hidden_ND, labels_N):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    head = nn.Linear(D, V)
    with Watch():
        linear_cross_entropy(hidden_ND, head, labels_N, chunk=8).backward()
    assert largest < N * V


def test_a_compiled_model_around_it_gives_the_same_gradients(hidden_ND, labels_N):
    head = nn.Linear(D, V)
    body = torch.compile(nn.Linear(D, D), backend="aot_eager")
    fast = linear_cross_entropy(body(hidden_ND), torch.compile(head, backend="aot_eager"), labels_N, chunk=16)
    slow = naive_cross_entropy(body(hidden_ND), head, labels_N)
    for a, b in zip(gradients(fast, hidden_ND, head.weight), gradients(slow, hidden_ND, head.weight)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_are_alike_and_no_rows_are_no_loss():
    head, sizes = nn.Linear(D, V), []
    head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    linear_cross_entropy(torch.randn(22, D), head, torch.zeros(22, dtype=torch.long), chunk=8)
    assert sizes == [8, 8, 6]
    nothing = linear_cross_entropy(torch.randn(0, D), head, torch.zeros(0, dtype=torch.long))
    assert nothing == 0
    nothing.backward()
    assert not head.weight.grad.any()
