"""Peak memory: the high-water mark of a fresh process on the CPU, of the allocator on CUDA."""

import contextlib
import gc
import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Bytes in use before the function ran, and the most while it ran."""

    baseline: int
    peak: int

    @property
    def bytes(self) -> int:
        """What the function itself needed."""
        return self.peak - self.baseline


def peak_memory(
    function: Callable[..., object], *args: Any, preload: Sequence[str] = (), device: str | torch.device = "cpu"
) -> PeakMemory:
    """The most memory that ``function(*args)`` has in use at any moment.

    On the CPU it runs in a fresh process, since what this one has used and freed already would hide it; the resident
    set after all imports is the baseline. On CUDA it runs here, and PyTorch's allocator tells.

    Args:
        function: a function that can be imported (defined at the top of a module that is not the main script). It
            must itself make what it measures: load the model, for example.
        args: its arguments; they are pickled.
        preload: modules to import before the baseline is taken, for imports that the function would do on first use.
        device: where the function allocates; "cpu" or a CUDA device.

    Raises:
        ValueError: ``function`` cannot be imported by another process.
        RuntimeError: it failed there; ends with that process's own last words.
    """
    if torch.device(device).type == "cuda":
        return _allocator_peak(function, args, torch.device(device))
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(
            f"peak_memory runs {function.__qualname__!r} in a fresh process, which has to import it; "
            f"define it at the top of a module of its own, not in the main script, a function or a lambda."
        )
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pickle"), Path(folder, "result.json")
        job.write_bytes(pickle.dumps((sys.path, list(preload), pickle.dumps((function, args)))))
        command = [sys.executable, "-c", _CHILD, str(job), str(result)]
        child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if child.returncode or not result.exists():
            raise RuntimeError(f"{function.__qualname__} failed in its fresh process: ...{child.stderr[-1000:]}")
        return PeakMemory(**json.loads(result.read_text()))


# The parent's search path comes first, so that the child finds the same modules.
_CHILD = """
import pickle, sys
from pathlib import Path
job, result = map(Path, sys.argv[1:])
sys.path[:], preload, call = pickle.loads(job.read_bytes())
from lightning_slm.measure.memory import _run_job
_run_job(preload, call, result)
"""


def _run_job(preload: list[str], call: bytes, result: Path) -> None:
    """The child's side: import, take the baseline, run, take the high-water mark."""
    for name in preload:
        import_module(name)
    function, args = pickle.loads(call)
    gc.collect()
    _forget_high_water()
    baseline = _resident_bytes()
    function(*args)
    result.write_text(json.dumps({"baseline": baseline, "peak": _high_water_bytes()}))


def _forget_high_water() -> None:
    """Linux can lower the mark to what is resident now; elsewhere a peak while importing stays in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _high_water_bytes() -> int:
    # Not getrusage on Linux: its mark is inherited from the parent, through fork and exec.
    status = Path("/proc/self/status")
    if status.exists() and (mark := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(mark[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _allocator_peak(function: Callable[..., object], args: Sequence[Any], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    baseline = torch.cuda.memory_allocated(device)
    function(*args)
    torch.cuda.synchronize(device)
    return PeakMemory(baseline, torch.cuda.max_memory_allocated(device))
