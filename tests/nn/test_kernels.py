"""A faster implementation is used only where it computes what PyTorch's own does."""

import pytest
import torch

from lightning_slm.nn.kernels import OptionalKernel


def reference(x):
    return x.sin(), x.square()


def example(device):
    return [torch.randn(5, device=device, requires_grad=True)]


def kernel_of(function):
    return OptionalKernel("it", lambda: function, reference, example, devices=("cpu",), tolerance=1e-5)


def test_one_that_agrees_is_used_and_compared_once():
    calls = []

    def same(x):
        calls.append(x)
        return reference(x)

    kernel = kernel_of(same)
    assert kernel.get(torch.ones(1)) is same
    assert kernel.get(torch.ones(1)) is same
    assert len(calls) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x.sin() * 1.01, x.square()),
        lambda x: (x.sin(), x.detach().square() + 0 * x),  # right, but its gradient is not
        lambda x: (x.sin(), x.square() * torch.nan),
        lambda x: (x.sin() * torch.nan, x.square()),
        lambda x: (x.sin(),),
    ],
    ids=["outputs", "gradients", "NaN last", "NaN first", "one output too few"],
)
def test_one_that_differs_is_not_used_and_says_so(wrong):
    with pytest.warns(UserWarning, match="so PyTorch's own is used|so that is used"):
        assert kernel_of(wrong).get(torch.ones(1)) is None


def test_one_that_is_not_installed_is_no_news():
    def load():
        raise ImportError("no such package")

    assert OptionalKernel("it", load, reference, example, devices=("cpu",)).get(torch.ones(1)) is None
