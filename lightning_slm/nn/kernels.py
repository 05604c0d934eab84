"""Faster implementations of an operation that may or may not be there: kernels of other packages on a GPU, a compiled
C++ operator on a CPU. Each is compared with PyTorch's own on first use, so that none is ever silently wrong.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OFF = "LIGHTNING_SLM_KERNELS"  # set to 0 in the environment: PyTorch's own everywhere


@dataclass
class OptionalKernel:
    """One faster implementation of a function of tensors.

    Args:
        name: what a warning calls it.
        load: imports or builds it, and returns it with the reference's signature; ``ImportError`` (or an ``OSError`` or
            ``RuntimeError`` of a compiler) where it is not to be had.
        reference: PyTorch's own.
        example: arguments for the comparison, on a device; those that require grad are differentiated by.
        devices: device types that it works on.
        tolerance: largest difference, relative to the reference's largest magnitude, of outputs and gradients.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    reference: Callable[..., Any]
    example: Callable[[torch.device], Sequence[Any]]
    devices: tuple[str, ...] = ("cuda",)
    tolerance: float = 1e-2
    _found: dict[str, Callable[..., Any] | None] = field(default_factory=dict)

    def get(self, x: Tensor) -> Callable[..., Any] | None:
        """The kernel, if it can be used on the device of ``x`` and agrees there; else None."""
        kind = x.device.type
        if kind not in self.devices or os.environ.get(OFF) == "0":
            return None
        if kind not in self._found:
            self._found[kind] = self._checked(x.device)
        return self._found[kind]

    def _checked(self, device: torch.device) -> Callable[..., Any] | None:
        try:
            kernel = self.load()
        except ImportError:
            return None  # not installed: that is no news
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{self.name} could not be built, so PyTorch's own is used: {error}", stacklevel=4)
            return None
        try:
            # In a thread of its own: the caller may be inside an operator or in inference mode, without gradients.
            with ThreadPoolExecutor(1) as elsewhere:
                worst = elsewhere.submit(self._difference, kernel, device).result()
        except Exception as error:
            warnings.warn(f"{self.name} failed, so PyTorch's own is used: {error}", stacklevel=4)
            return None
        if not worst <= self.tolerance:
            warnings.warn(
                f"{self.name} differs from PyTorch's own by {worst:.1e} (allowed {self.tolerance:.0e}), so that is "
                f"used; {OFF}=0 turns the comparison off with it.",
                stacklevel=4,
            )
            return None
        return kernel

    def _difference(self, kernel: Callable[..., Any], device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        with torch.enable_grad(), torch.random.fork_rng(), torch.autocast(device.type, enabled=False):
            torch.manual_seed(0)
            arguments = self.example(device)
            theirs, ours = (_outputs_and_gradients(f, arguments) for f in (kernel, self.reference))
        apart = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in zip(theirs, ours, strict=True)]
        return float(torch.stack(apart).max())  # not Python's max, which loses a NaN


def _outputs_and_gradients(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if isinstance(t, Tensor)]
    wanted = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    total = torch.stack([t.float().square().sum() for t in outputs]).sum()
    return [t.detach().float() for t in (*outputs, *torch.autograd.grad(total, wanted))]
