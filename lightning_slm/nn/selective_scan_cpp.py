"""The selective scan as a C++ operator, compiled on this machine when it is first wanted.

Off unless it is asked for, since compiling takes half a minute and a compiler: ``LIGHTNING_SLM_CPP=1`` in the
environment, or `use_cpp_scan`. What comes out of the compiler is kept in PyTorch's folder of extensions.
"""

# Shape letters: B = batch, T = tokens, C = channels, N = states of a channel, K = chunks.

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_slm.nn.kernels import OptionalKernel
from lightning_slm.nn.selective_scan_core import TORCH, Core, chunk_size, rates

ON = "LIGHTNING_SLM_CPP"  # set to 1 in the environment: used wherever it can be
_SOURCE = Path(__file__).with_suffix("").with_name("selective_scan.cpp")
_INSTRUCTIONS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}

_wanted: bool | None = None


def use_cpp_scan(on: bool = True) -> None:
    """Whether the selective scan of float32 tensors on a CPU runs in C++, for this process from now on.

    Where it cannot be compiled, or does not compute what PyTorch's own does, a warning says so at its first use, and
    PyTorch's own goes on.
    """
    global _wanted
    _wanted = on


def core_for(x: Tensor) -> Core | None:
    """The operator, if it is wanted and can be used for tensors like ``x``."""
    wanted = os.environ.get(ON) == "1" if _wanted is None else _wanted
    return KERNEL.get(x) if wanted and x.dtype == torch.float32 else None  # type: ignore[return-value]


def build() -> None:
    """Compile the operator, or load what was compiled before, as ``torch.ops.lightning_slm_cpp``.

    Raises:
        RuntimeError: no compiler, or one that does not compile it; says what it printed.
    """
    if hasattr(torch.ops.lightning_slm_cpp, "selective_scan"):
        return  # loaded twice, it would end the process
    from torch.utils.cpp_extension import load

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *_INSTRUCTIONS.get(capability, ())]
    name = f"lightning_slm_selective_scan_{capability.lower()}"  # a folder may be shared by different machines
    try:
        load(name, [str(_SOURCE)], extra_cflags=flags, is_python_module=False)
    except (subprocess.SubprocessError, ImportError) as error:
        raise RuntimeError(str(error)) from error


def _load() -> Callable[..., object]:
    build()
    return Core(_forward, _backward)


def _forward(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BNC: Tensor | None,
    starts_BT: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _packed(x_BTC, delta_BTC, rates(A_CN), b_BTN, c_BTN, state_BNC, starts_BT)
    return torch.ops.lightning_slm_cpp.selective_scan(*tensors, chunk_size(x_BTC), keep)


def _backward(
    grad_y_BTC: Tensor,
    grad_h_BNC: Tensor,
    x_BTC: Tensor,
    delta_BTC: Tensor,
    A_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    starts_BT: Tensor | None,
    kept_BKNC: Tensor,
    with_y: bool,
) -> tuple[Tensor, ...]:
    tensors = _packed(
        grad_y_BTC, grad_h_BNC, x_BTC, delta_BTC, A_CN.t(), rates(A_CN), b_BTN, c_BTN, starts_BT, kept_BKNC
    )
    grad_x, grad_delta, grad_A_NC, *rest = torch.ops.lightning_slm_cpp.selective_scan_backward(
        *tensors, chunk_size(x_BTC), with_y
    )
    return grad_x, grad_delta, grad_A_NC.t().contiguous(), *rest


def _packed(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _example(device: torch.device) -> list[Tensor]:
    """Odd sizes, decays from none to nearly all."""
    B, T, C, N = 2, 37, 70, 5
    shapes = ((B, T, C), (B, T, C), (C, N), (B, T, N), (B, T, N), (B, N, C))
    x, delta, A, b, c, state = (torch.randn(shape, device=device) for shape in shapes)
    return [t.requires_grad_() for t in (x, delta.exp(), -A.exp(), b, c, state)]


KERNEL = OptionalKernel("The selective scan in C++", _load, TORCH, _example, devices=("cpu",), tolerance=1e-5)
