"""What a number depends on beside the model: the machine and the versions."""

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

_PACKAGES = ("lightning-slm", "torch", "lightning", "transformers", "torchao")


def hardware() -> dict[str, str | int]:
    """Processor, cores, threads in use, memory, and the accelerator if there is one."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def describe(machine: Mapping[str, str | int]) -> str:
    """`hardware` in a line.

    >>> describe({"processor": "Z80", "cores": 1, "threads": 1, "memory_bytes": 64_000, "system": "CP/M z80"})
    'Z80, cores 1, threads 1, memory 0.0 GB, CP/M z80'
    """
    memory = f"memory {int(machine['memory_bytes']) / 1e9:.1f} GB"
    parts = [machine["processor"], f"cores {machine['cores']}", f"threads {machine['threads']}", memory]
    return ", ".join(map(str, [*parts, machine["system"], *filter(None, [machine.get("accelerator")])]))


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about numbers; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (model := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return model[1]
    return platform.processor() or platform.machine()
