"""The scan against the recurrence as it is written: outputs, gradients, and every way it can be run."""

# Shape letters: B = batch, T = tokens, C = channels, N = states of a channel, L = tokens of a chunk.

import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lightning_slm.nn import selective_scan as scans
from lightning_slm.nn import selective_scan_core as core_of_scan
from lightning_slm.nn import selective_scan_cpp as cpp
from lightning_slm.nn import selective_scan_mamba_ssm as mamba_ssm
from lightning_slm.nn.selective_scan import naive_selective_scan, selective_scan

SHAPES = {
    "one token": (2, 1, 6, 3),
    "a whole chunk": (1, 16, 5, 4),
    "a chunk and a token": (3, 17, 4, 1),
    "several chunks": (2, 40, 6, 16),
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's import


def inputs(B, T, C, N, dtype=torch.float64):
    """u, dt, A, b, c, D, gate, state; time steps from nearly none to several."""
    shapes = ((B, T, C), (B, T, C), (C, N), (B, T, N), (B, T, N), (C,), (B, T, C), (B, N, C))
    u, dt, A, *rest = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [t.requires_grad_() for t in (u, 2 * dt, -A.exp(), *rest)]


def some_starts(B, T):
    starts_BT = torch.rand(B, T) < 0.2
    starts_BT[0, 0] = True
    return starts_BT


def outputs_and_gradients(function, arguments, *rest):
    outputs = function(*arguments, *rest)
    torch.manual_seed(1)
    total = sum((t * torch.randn(t.shape, dtype=torch.float64)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(total, [t for t in arguments if t is not None])]


def agree(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("starts", [False, True], ids=["one text", "starts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_the_recurrences_to_1e_10(shape, starts):
    B, T, C, N = SHAPES[shape]
    starts_BT = some_starts(B, T) if starts else None
    arguments = inputs(B, T, C, N)
    agree(*(outputs_and_gradients(f, arguments, starts_BT) for f in (selective_scan, naive_selective_scan)), 1e-10)


@pytest.mark.parametrize("left_out", [{5}, {6}, {7}, {5, 6, 7}], ids=["D", "gate", "state", "all"])
def test_what_is_optional_can_be_left_out(left_out):
    arguments = [None if i in left_out else t for i, t in enumerate(inputs(2, 21, 4, 3))]
    agree(*(outputs_and_gradients(f, arguments) for f in (selective_scan, naive_selective_scan)), 1e-10)


def test_float32_is_near_double_precision():
    exact = [t.detach().requires_grad_() for t in inputs(2, 100, 8, 16)]
    rounded = [t.detach().float().requires_grad_() for t in exact]
    a, b = (outputs_and_gradients(selective_scan, arguments) for arguments in (exact, rounded))
    for x, y in zip(a, b):
        assert (x - y).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("starts", [False, True], ids=["one text", "starts"])
def test_gradcheck_with_first_and_last_state(monkeypatch, starts):
    monkeypatch.setattr(core_of_scan, "_CHUNK", 4)
    arguments, starts_BT = inputs(2, 10, 3, 2), some_starts(2, 10) if starts else None
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan(*tensors, starts_BT), arguments)


def test_a_text_in_two_parts_is_the_whole_text():
    arguments, at = inputs(2, 40, 6, 3), 23
    sequences = [t if i in (0, 1, 3, 4, 6) else None for i, t in enumerate(arguments)]
    whole, last = selective_scan(*arguments)
    outputs, state = [], arguments[7]
    for part in (slice(0, at), slice(at, None)):
        cut = [a if s is None else s[:, part] for s, a in zip(sequences, arguments)]
        y, state = selective_scan(*cut[:7], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


def test_how_many_rows_are_worked_on_together_changes_nothing(monkeypatch):
    arguments = inputs(5, 20, 4, 3)
    together = outputs_and_gradients(selective_scan, arguments)
    monkeypatch.setattr(core_of_scan, "_CACHED", 2 * 16 * 4 * 3)  # two rows
    agree(outputs_and_gradients(selective_scan, arguments), together, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("L", "group"), [(16, 4), (23, 4), (37, 6), (5, 2), (4, 4)])
def test_groups_of_tokens_at_once_are_tokens_one_by_one(L, group, reverse):
    x, decay = torch.randn(2, L, 3, 4, dtype=torch.float64), torch.rand(2, L, 3, 4, dtype=torch.float64)
    one_by_one, grouped = x.clone(), x.clone()
    core_of_scan.recurrence_(one_by_one, decay, reverse)
    core_of_scan.grouped_recurrence_(grouped, decay, group, reverse)
    torch.testing.assert_close(grouped, one_by_one)


def test_the_scan_of_a_gpu_computed_here_is_the_recurrences(monkeypatch):
    monkeypatch.setattr(core_of_scan, "_CHUNK", 32)
    monkeypatch.setattr(
        core_of_scan,
        "recurrence_",
        lambda x, decay, reverse=False: core_of_scan.grouped_recurrence_(x, decay, 5, reverse),
    )
    arguments, starts_BT = inputs(2, 32 + 9, 4, 3), some_starts(2, 32 + 9)
    agree(*(outputs_and_gradients(f, arguments, starts_BT) for f in (selective_scan, naive_selective_scan)), 1e-10)


def test_autocast_does_not_reach_into_the_scan():
    arguments = inputs(2, 40, 6, 4, torch.float32)
    plain = outputs_and_gradients(selective_scan, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        agree(outputs_and_gradients(selective_scan, arguments), plain, 0)


def test_bfloat16_inputs_are_scanned_in_float32():
    u, dt, A, b, c, D, gate, state = inputs(2, 40, 6, 4, torch.float32)
    short = [t.detach().bfloat16().requires_grad_() for t in (u, b, c, gate)]
    arguments = [short[0], dt, A, short[1], short[2], D, short[3], state]
    got = outputs_and_gradients(lambda *a: [t.float() for t in selective_scan(*a)], arguments)
    assert [g.dtype for g in got[2:]] == [t.dtype for t in arguments]
    long = [t.detach().float().requires_grad_() for t in arguments]
    for x, y in zip(got, outputs_and_gradients(selective_scan, long)):
        assert (x - y).abs().max() <= 2**-7 * y.abs().max()  # outputs and their gradients are rounded, once


def test_only_states_between_chunks_are_kept_for_the_backward_pass():
    B, T, C, N = 2, 160, 64, 16
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*inputs(B, T, C, N, torch.float32))
    assert sum(kept) < B * T * C * N / 3
    with torch.no_grad():
        *_, states = scans._scan(*inputs(B, T, C, N, torch.float32), None, False)
    assert states.numel() == 0


@pytest.mark.parametrize("starts", [False, True], ids=["one text", "starts"])
def test_the_operator_keeps_the_rules_of_operators(starts):
    starts_BT = some_starts(2, 20) if starts else None
    torch.library.opcheck(scans._scan, (*inputs(2, 20, 4, 3, torch.float32), starts_BT, True))
    some = [t if i in (0, 1, 2, 3, 4) else None for i, t in enumerate(inputs(2, 20, 4, 3, torch.float32))]
    torch.library.opcheck(scans._scan, (*some, starts_BT, True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiler_sees_one_operator():
    arguments = inputs(2, 40, 6, 4, torch.float32)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    agree(*(outputs_and_gradients(f, arguments) for f in (compiled, selective_scan)), 1e-6)


# ------------------------------------------------------------------------------------------------------- mamba_ssm


def fake_mamba_ssm(monkeypatch):
    """What stands in for the package: its signature and layout, (B, C, T) and (B, N, T), on any device."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert delta_softplus
        assert return_last_state
        assert delta_bias is None
        assert {t.dtype for t in (u, delta, A, B, C)} == {torch.float32}
        y, h = naive_selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, None if z is None else z.mT)
        return y.mT, h.mT.detach()

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].selective_scan_fn = selective_scan_fn


def test_mamba_ssms_kernel_gets_what_it_expects(monkeypatch):
    fake_mamba_ssm(monkeypatch)
    assert mamba_ssm.KERNEL._difference(mamba_ssm.load(), torch.device("cpu")) < 1e-5
    u, *rest = inputs(2, 9, 4, 3, torch.float32)
    y, h = mamba_ssm.load()(u.bfloat16(), *rest[:6])
    assert y.dtype == torch.bfloat16
    assert h.shape == (2, 3, 4)


def test_mamba_ssm_is_asked_only_where_it_can_answer(monkeypatch):
    calls = []

    def kernel(*arguments):
        calls.append(len(arguments))
        return naive_selective_scan(*arguments)

    monkeypatch.setattr(mamba_ssm, "usable", lambda u, A: True)
    monkeypatch.setattr(mamba_ssm, "KERNEL", SimpleNamespace(get=lambda x: kernel))
    arguments = inputs(2, 9, 4, 3)
    expected = naive_selective_scan(*arguments[:7])
    agree(selective_scan(*arguments[:7]), expected, 1e-12)
    assert calls == [7]
    selective_scan(*arguments)  # a state
    selective_scan(*arguments[:7], None, some_starts(2, 9))
    assert calls == [7]
    monkeypatch.setattr(mamba_ssm, "KERNEL", SimpleNamespace(get=lambda x: None))  # it differs, or fails
    agree(selective_scan(*arguments[:7]), expected, 1e-10)


def test_no_tensor_of_a_cpu_goes_to_mamba_ssm(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "INSTALLED", True)
    assert not mamba_ssm.usable(torch.zeros(1, 1, 1), torch.zeros(1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("length", [1, 40, 300])
def test_on_a_gpu_it_is_the_recurrences(length):
    arguments = [t.detach().cuda().requires_grad_() for t in inputs(2, length, 6, 4)]
    starts_BT = some_starts(2, length).cuda()
    agree(*(outputs_and_gradients(f, arguments, starts_BT) for f in (selective_scan, naive_selective_scan)), 1e-10)
    arguments = [t.detach().float().requires_grad_() for t in arguments[:7]]  # mamba_ssm, if it is installed
    a, b = (outputs_and_gradients(lambda *t, f=f: f(*t)[:1], arguments) for f in (selective_scan, naive_selective_scan))
    agree(a, b, 1e-3)


# ------------------------------------------------------------------------------------------------------------- C++

needs_compiler = pytest.mark.skipif(
    not (shutil.which("ninja") and any(map(shutil.which, ("c++", "g++", "clang++")))),
    reason="no C++ compiler, or no ninja",
)


@pytest.fixture
def no_choice(monkeypatch):
    """Nothing chosen yet, nothing built yet."""
    monkeypatch.setattr(cpp, "_wanted", None)
    monkeypatch.setattr(cpp.KERNEL, "_found", {})
    monkeypatch.delenv(cpp.ON, raising=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        cpp.build()


@pytest.fixture
def in_cpp(built, no_choice):
    cpp.use_cpp_scan()
    core = cpp.core_for(torch.zeros(1))
    assert core is not None, "built, and equal to PyTorch's own within 1e-5"
    return core


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("starts", [False, True], ids=["one text", "starts"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 70, 64, 16), (3, 33, 150, 5), (1, 20, 7, 256)], ids=str)
def test_cpp_computes_the_same_to_1e_5(in_cpp, monkeypatch, shape, starts):
    arguments = inputs(*shape, torch.float32)
    starts_BT = some_starts(*shape[:2]) if starts else None
    calls = []
    core = core_of_scan.Core(lambda *a: calls.append("forward") or in_cpp.forward(*a), in_cpp.backward)
    monkeypatch.setattr(cpp, "core_for", lambda x: core)
    got = outputs_and_gradients(selective_scan, arguments, starts_BT)
    assert calls == ["forward"]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    for x, y in zip(got, outputs_and_gradients(naive_selective_scan, exact, starts_BT), strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_cpp_is_compared_at_its_first_use_wherever_that_is(built, no_choice, monkeypatch, mode):
    monkeypatch.setenv(cpp.ON, "1")
    with mode():
        selective_scan(*inputs(2, 9, 4, 3, torch.float32))
    assert cpp.KERNEL._found["cpu"] is not None


@pytest.mark.slow
@needs_compiler
def test_cpp_takes_float32_only_and_stays_in_the_operator(in_cpp):
    assert cpp.core_for(torch.zeros(1, dtype=torch.float64)) is None
    arguments = inputs(2, 40, 6, 4, torch.float32)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    agree(*(outputs_and_gradients(f, arguments) for f in (compiled, selective_scan)), 1e-6)
    torch.library.opcheck(scans._scan, (*arguments, None, True))


@pytest.mark.slow
@needs_compiler
def test_cpp_decays_like_exp_over_its_whole_range(in_cpp):
    """One state, one step: h = exp(delta A) h."""
    A_CN = -torch.logspace(-6, 2.2, 200)[:, None]
    one, zero = torch.ones(1, 1, 200), torch.zeros(1, 1, 1)
    _, h_BNC, _ = in_cpp.forward(torch.zeros(1, 1, 200), one, A_CN, zero, zero, torch.ones(1, 1, 200), None, False)
    expected = A_CN.double().exp()[:, 0]
    normal = expected > 1e-37
    assert ((h_BNC[0, 0] - expected).abs() / expected)[normal].max() < 2e-5  # the rounding of an exponent near 85
    assert h_BNC[0, 0][~normal].abs().max() < 1e-36


def test_cpp_is_off_unless_wanted(no_choice, monkeypatch):
    monkeypatch.setattr(cpp, "build", lambda: pytest.fail("nobody asked for it"))
    assert cpp.core_for(torch.zeros(1)) is None


def test_where_it_cannot_be_built_a_warning_says_so_and_pytorch_goes_on(no_choice, monkeypatch):
    def no_compiler():
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(cpp, "build", no_compiler)
    monkeypatch.setenv(cpp.ON, "1")
    arguments = inputs(2, 9, 4, 3, torch.float32)
    with pytest.warns(UserWarning, match=r"C\+\+ could not be built, so PyTorch's own is used: no compiler here"):
        got = selective_scan(*arguments)
    agree(got, naive_selective_scan(*arguments), 1e-4)
    selective_scan(*arguments)  # once is enough: warnings are errors here
    cpp.use_cpp_scan(False)
    assert cpp.core_for(torch.zeros(1)) is None


@pytest.mark.slow
def test_a_compiler_that_is_missing_or_fails_is_a_runtime_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setattr(torch.ops, "lightning_slm_cpp", SimpleNamespace())  # as if nothing had been built before
    with pytest.raises(RuntimeError):
        cpp.build()
