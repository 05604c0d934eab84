"""The selective scan by mamba_ssm's kernel for NVIDIA GPUs, where that package is installed
(https://github.com/state-spaces/mamba).
"""

# Shape letters: B = batch, T = tokens, C = channels, N = states of a channel.

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_slm.nn.kernels import OptionalKernel

INSTALLED = importlib.util.find_spec("mamba_ssm") is not None


def usable(u_BTC: Tensor, A_CN: Tensor) -> bool:
    """Whether the kernel takes tensors like these: on a GPU, in float32 or shorter, with 256 states at most."""
    return INSTALLED and u_BTC.is_cuda and u_BTC.dtype != torch.float64 and A_CN.shape[1] <= 256


@torch.compiler.disable
def scan(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """`selective_scan` without state and starts: mamba_ssm's kernel if it agrees with PyTorch's own, else that."""
    assert arguments[0] is not None
    return (KERNEL.get(arguments[0]) or _own)(*arguments)


def load() -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba_ssm's kernel behind the signature of `selective_scan`; it begins with an empty state."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(
        u_BTC: Tensor,
        dt_BTC: Tensor,
        A_CN: Tensor,
        b_BTN: Tensor,
        c_BTN: Tensor,
        D_C: Tensor | None = None,
        gate_BTC: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # float32 throughout: the kernel wants one dtype, and bfloat16 would round the time steps' bias.
        u, dt, b, c = (t.float().mT.contiguous() for t in (u_BTC, dt_BTC, b_BTN, c_BTN))
        gate = None if gate_BTC is None else gate_BTC.float().mT.contiguous()
        D = None if D_C is None else D_C.float()
        y, h = selective_scan_fn(u, dt, A_CN.float(), b, c, D, gate, delta_softplus=True, return_last_state=True)
        return y.mT.to(u_BTC.dtype), h.detach().mT

    return scan


def _example(device: torch.device) -> list[Tensor]:
    B, T, C, N = 2, 37, 24, 16
    shapes = ((B, T, C), (B, T, C), (C, N), (B, T, N), (B, T, N), (C,), (B, T, C))
    u, dt, A, *rest = (torch.randn(shape, device=device) for shape in shapes)
    return [t.requires_grad_() for t in (u, dt, -A.exp(), *rest)]


def _own(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    from lightning_slm.nn.selective_scan import own_selective_scan  # which needs this file

    y_BTC, h_BNC = own_selective_scan(*arguments, None, None)
    return y_BTC, h_BNC.detach()  # as theirs


KERNEL = OptionalKernel("mamba_ssm's selective scan", load, _own, _example, tolerance=1e-3)
