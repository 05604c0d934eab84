"""The one convention of distillation losses, against formulas by hand and the factors of other libraries."""

# Shape letters: B = batch, T = tokens, V = vocabulary, N = rows.

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_slm.distillation import distillation_loss, forward_kl, forward_kl_rows, losses

B, T, V = 3, 7, 50


@pytest.fixture
def batch():
    labels = torch.randint(0, V, (B, T))
    labels[0, :2] = labels[1, 4] = labels[2, 3:] = -100
    return torch.randn(B, T, V) * 3, torch.randn(B, T, V) * 3, labels


def by_hand(student, teacher, labels, temperature):
    """Token after token, in float64, straight from the definition."""
    total, count = 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] == -100:
                continue
            p = torch.softmax(teacher[b, t].double() / temperature, -1)
            q = torch.softmax(student[b, t].double() / temperature, -1)
            total += sum((a * (a.log() - c.log())).item() for a, c in zip(p, q) if a > 0)
            count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_forward_kl_is_the_formula_by_hand(batch, temperature):
    assert forward_kl(*batch, temperature=temperature).item() == pytest.approx(by_hand(*batch, temperature), rel=1e-5)


def test_the_rows_and_their_gradient_are_those_of_torch(batch):
    student, teacher, _ = (x.flatten(0, -2) if x.is_floating_point() else x for x in batch)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    upstream = torch.rand(B * T)
    rows = forward_kl_rows(ours, teacher, 2.0)
    expected = F.kl_div(
        F.log_softmax(theirs / 2, -1), F.log_softmax(teacher.double() / 2, -1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
    rows.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("elements", [1, V, 4 * V, 10**9])
def test_the_size_of_the_chunks_changes_nothing(batch, monkeypatch, elements):
    student = batch[0].requires_grad_()
    whole = forward_kl(*batch, temperature=2.0)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", elements)
    chunked = forward_kl(*batch, temperature=2.0)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(chunked, student)[0], expected, rtol=1e-6, atol=1e-9)


def test_a_teacher_may_make_its_logits_when_they_are_needed(batch):
    student, teacher = batch[0].flatten(0, 1), batch[1].flatten(0, 1)
    asked = []
    lazy = forward_kl_rows(student, lambda rows: asked.append(rows) or teacher[rows], 2.0)
    assert torch.equal(lazy, forward_kl_rows(student, teacher, 2.0))
    assert sum(rows.stop - rows.start for rows in asked) == B * T


def test_log_probabilities_of_the_student_do_as_well_as_logits(batch):
    student, teacher, labels = batch
    log_probabilities = student.log_softmax(-1)
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(
            forward_kl(log_probabilities, teacher, labels, temperature=temperature),
            forward_kl(student, teacher, labels, temperature=temperature),
        )


def test_a_masked_token_counts_for_nothing_even_when_it_is_nan(batch):
    student, teacher, labels = batch
    expected = forward_kl(student, teacher, labels, temperature=2.0)
    broken = student.clone()
    broken[1, 3], broken[:, -1] = torch.nan, torch.nan  # position 3 predicts the masked token 4
    broken.requires_grad_()
    loss = forward_kl(broken, teacher, labels, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert broken.grad.isfinite().all()
    assert not broken.grad[1, 3].any()
    assert not broken.grad[:, -1].any()


def test_nothing_to_predict_costs_nothing(batch):
    student, teacher, labels = batch
    student.requires_grad_()
    loss = forward_kl(student, teacher, torch.full_like(labels, -100), temperature=2.0)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_of_every_type_stay_finite_and_right(dtype):
    top = torch.finfo(dtype).max / 4
    rows = torch.tensor([[top, 0.0, -top], [-top, -top, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    student = rows.clone().requires_grad_()
    same = forward_kl_rows(student, rows, 2.0)
    same.sum().backward()
    assert same.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6
    apart = forward_kl_rows(rows[2:], rows[:1], 1.0)  # all on one token against three alike: log 3 nats
    assert apart.item() == pytest.approx(math.log(3), rel=1e-6)


def test_tokens_that_are_forbidden_cost_nothing():
    never = -torch.inf
    student = torch.tensor([[1.0, 2.0, never], [1.0, 2.0, 3.0]]).requires_grad_()
    teacher = torch.tensor([[2.0, 1.0, never], [2.0, 1.0, never]])
    rows = forward_kl_rows(student, teacher, 1.0)
    rows.sum().backward()
    two = torch.tensor([[2.0, 1.0]]).softmax(-1)[0]
    assert rows[0].item() == pytest.approx((two * (two / two.flip(0)).log()).sum().item(), rel=1e-5)
    q = torch.tensor([1.0, 2.0, 3.0]).softmax(-1)[:2]
    assert rows[1].item() == pytest.approx((two * (two / q).log()).sum().item(), rel=1e-5)
    assert student.grad.isfinite().all()
    assert student.grad[0, 2] == 0


def test_what_only_the_student_forbids_costs_more_than_anything_but_is_no_nan():
    student = torch.tensor([[1.0, 2.0, -torch.inf]]).requires_grad_()
    loss = forward_kl_rows(student, torch.ones(1, 3), 1.0)
    loss.backward(torch.ones(1))
    assert loss.item() > 1e29
    assert student.grad.isfinite().all()


def test_half_precision_logits_give_what_float32_gives_of_the_same_numbers(batch):
    student, teacher, labels = batch[0].bfloat16(), batch[1].bfloat16(), batch[2]
    half, full = student.clone().requires_grad_(), student.float().requires_grad_()
    losses_ = (
        forward_kl(half, teacher, labels, temperature=2.0),
        forward_kl(full, teacher.float(), labels, temperature=2.0),
    )
    assert losses_[0].dtype == torch.float32
    assert losses_[0].item() == pytest.approx(losses_[1].item(), rel=1e-6)
    for loss in losses_:
        loss.backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=2**-7, atol=1e-6)


def test_the_factors_against_other_libraries(batch):
    """Their formulas (TRL 1.16, torchtune, ModelOpt 0.47), on unpadded tokens at temperature 1: only factors differ."""
    student, teacher, labels = batch[0], batch[1], torch.zeros_like(batch[2])
    ours = forward_kl(student, teacher, labels, temperature=1.0)
    s, t = student[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    tokens = B * (T - 1)
    trl = F.kl_div(s, t, log_target=True, reduction="batchmean")  # without labels: the sum over tokens / batch
    torch.testing.assert_close(ours, trl * B / tokens)
    torchtune = -(t.exp() * s).sum(-1).mean()  # a cross-entropy: KL + the teacher's entropy
    torch.testing.assert_close(ours, torchtune + (t.exp() * t).sum(-1).mean())
    modelopt = F.kl_div(s, t, log_target=True, reduction="none").mean()  # divides by the vocabulary too
    torch.testing.assert_close(ours, modelopt * V)


def test_the_squared_temperature_keeps_the_size_of_the_gradient(batch):
    """At high temperatures the gradient of a centred logit tends to (s - t) / V (Hinton et al. 2015, eq. 4)."""
    student, teacher, _ = batch
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    labels = torch.zeros(B, T, dtype=torch.long)
    student.requires_grad_()
    forward_kl(student, teacher, labels, temperature=1000.0).backward()
    expected = (student - teacher)[:, :-1] / V / (B * (T - 1))
    torch.testing.assert_close(student.grad[:, :-1], expected, rtol=0.02, atol=1e-5)


def test_the_helper_mixes_cross_entropy_and_kl(batch):
    student, teacher, labels = batch
    kl = forward_kl(student, teacher, labels, temperature=3.0)
    ce = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    mixed = distillation_loss(student, teacher, labels, temperature=3.0, weight=0.25)
    torch.testing.assert_close(mixed, 0.75 * ce + 0.25 * kl)
    given = distillation_loss(student, teacher, labels, task_loss=torch.tensor(7.0), temperature=3.0, weight=0.25)
    torch.testing.assert_close(given, 0.75 * 7 + 0.25 * kl)


def test_other_vocabularies_temperatures_and_labels_are_refused(batch):
    student, teacher, labels = batch
    with pytest.raises(ValueError, match=r"50 entries .* teacher's 49.*resize_token_embeddings\(49\)"):
        forward_kl(student, teacher[..., :-1], labels, temperature=1.0)
    with pytest.raises(ValueError, match="temperature=0 must be above zero"):
        forward_kl(student, teacher, labels, temperature=0)
    with pytest.raises(ValueError, match=r"labels of shape \(3, 6\)"):
        forward_kl(student, teacher, labels[:, :-1], temperature=1.0)


def test_backward_twice_through_one_graph_is_refused_rather_than_wrong(batch):
    student, teacher, labels = batch
    loss = forward_kl(student.requires_grad_(), teacher, labels, temperature=2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_no_second_tensor_of_the_logits_size_is_made_in_float32():
    """All storage that the loss allocates, seen by a dispatch mode: but for the gradient, a chunk at most."""
    student = torch.randn(4, 600, 1000, dtype=torch.bfloat16).requires_grad_()
    large = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > 4 * losses._CHUNK_ELEMENTS["cpu"]:
                large[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes(), out.dtype
            return out

    with Watch():
        forward_kl(student, student.detach(), torch.zeros(4, 600, dtype=torch.long), temperature=2.0).backward()
    del large[student.untyped_storage().data_ptr()]
    assert list(large.values()) == [(student.numel() * 2, torch.bfloat16)]
