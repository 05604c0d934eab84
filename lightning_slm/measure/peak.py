"""Peak arithmetic of a device: by data sheet for GPUs, measured for CPUs."""

import re
import time
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# "tf32": float32 multiplied on tensor cores, as torch.set_float32_matmul_precision("high") allows.
Multiplied = torch.dtype | Literal["tf32"]


class Peaks(NamedTuple):
    """TFLOP/s of one GPU, dense (without 2:4 sparsity), products summed in float32; None: the hardware has no such."""

    fp32: float  # on ordinary cores
    tf32: float | None
    fp16: float | None
    bf16: float | None
    fp8: float | None
    int8: float | None


# What torch.cuda.get_device_name says, as a pattern; the first that is found counts. Data sheets of NVIDIA quote tensor
# cores "with sparsity" since 2020: these are the halves. Sources stand in the card of ThroughputMonitor.
PEAKS: dict[str, Peaks | None] = {
    r"\bMIG\b|\bLaptop\b|\bMax-Q\b|\bRTX [45]090 D\b": None,  # slices of a GPU, and smaller ones of the same name
    r"\bGB200\b": Peaks(80, 1250, 2500, 2500, 5000, 5000),
    r"\bB200\b": Peaks(75, 1125, 2250, 2250, 4500, 4500),
    r"\bB100\b": Peaks(60, 875, 1750, 1750, 3500, 3500),
    r"\bH[12]00 NVL\b": Peaks(60, 417.5, 835.5, 835.5, 1670.5, 1670.5),
    r"\bH[18]00 PCIe\b": Peaks(51, 378, 756.5, 756.5, 1513, 1513),
    r"\b(GH200|H200|H100|H800)\b": Peaks(67, 494.5, 989.5, 989.5, 1979, 1979),
    r"\bH20\b": Peaks(44, 74, 148, 148, 296, 296),
    r"\bA[18]00\b": Peaks(19.5, 156, 312, 312, None, 624),
    r"\bA40\b": Peaks(37.4, 74.8, 149.7, 149.7, None, 299.3),
    r"\bA30\b": Peaks(10.3, 82, 165, 165, None, 330),
    r"\bA10G\b": Peaks(31.5, 35, 70, 70, None, 140),
    r"\bA10\b": Peaks(31.2, 62.5, 125, 125, None, 250),
    r"\bL40S\b": Peaks(91.6, 183, 362, 362, 733, 733),
    r"\bL40\b": Peaks(90.5, 90.5, 181, 181, 362, 362),
    r"\bL4\b": Peaks(30.3, 60, 121, 121, 242.5, 242.5),
    r"\bV100S\b": Peaks(16.4, None, 130, None, None, None),
    r"\bV100-SXM": Peaks(15.7, None, 125, None, None, None),
    r"\bV100\b": Peaks(14, None, 112, None, None, None),
    r"\bT4\b": Peaks(8.1, None, 65, None, None, 130),
    r"\bRTX A6000\b": Peaks(38.7, 77.4, 154.8, 154.8, None, 309.7),
    r"\bRTX 6000 Ada\b": Peaks(91.1, 182.1, 364.2, 364.2, 728.5, 728.5),
    r"\bRTX 3090 Ti\b": Peaks(40, 40, 80, 80, None, 320),
    r"\bRTX 3090\b": Peaks(35.6, 35.6, 71, 71, None, 284),
    r"\bRTX 4090\b": Peaks(82.6, 82.6, 165.2, 165.2, 330.3, 660.6),
    r"\bRTX 5090\b": Peaks(104.8, 104.8, 209.5, 209.5, 419, 838),
    r"\bMI3(00|25)X\b": Peaks(163.4, 653.7, 1307.4, 1307.4, 2614.9, 2614.9),
}

_COLUMN: dict[Multiplied, str] = {
    torch.float32: "fp32",
    "tf32": "tf32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), "fp8"),
}


def peak_flops(device: torch.device | str, dtype: Multiplied) -> float | None:
    """The most floating-point (or integer) operations per second that ``device`` can do; a multiply-add is two.

    Args:
        device: of a GPU, the dense peak by data sheet; of a CPU, what `measured_peak` finds. A string that names no
            device is taken for the name of a GPU, as ``torch.cuda.get_device_name`` gives it.
        dtype: of what is multiplied; products are summed in a wider one.

    Returns: operations per second; None: not known, or no hardware for it.

    >>> peak_flops("NVIDIA H200", torch.bfloat16)
    989500000000000.0
    """
    if isinstance(device, str) and not re.fullmatch(r"(cuda|cpu|mps|xpu|xla|hpu|meta)(:\d+)?", device):
        return _by_name(device, dtype)
    device = torch.device(device)
    if device.type == "cuda":
        return _by_name(torch.cuda.get_device_name(device), dtype)
    return measured_peak(dtype, "cpu") if device.type == "cpu" else None


def measured_peak(dtype: Multiplied, device: torch.device | str = "cpu") -> float | None:
    """The best of a few products of two 1024 x 1024 matrices, in operations per second, with the threads in use now.

    What is reached in the best case, not what the processor's manual says: a fair bound where no data sheet is at hand.
    Takes about half a second, once per process.

    Returns: None where PyTorch cannot multiply this dtype on this device.
    """
    return _measured(torch.float32 if dtype == "tf32" else dtype, str(device), torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, device: str, threads: int) -> float | None:
    try:
        a = torch.ones(1024, 1024, device=device).to(dtype)
        times = [_seconds(a)]  # the first one warms up
        while len(times) < 3 or (sum(times) < 0.4 and len(times) < 50):
            times.append(_seconds(a))
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return 2 * 1024**3 / min(times)


@torch.no_grad()
def _seconds(a: Tensor) -> float:
    start = time.perf_counter()
    if a.dtype == torch.int8:
        product = torch._int_mm(a, a.T)
    elif a.dtype.itemsize == 1:
        one = torch.ones((), device=a.device)
        product = torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16)
    else:
        product = a @ a.T
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - start


def _by_name(name: str, dtype: Multiplied) -> float | None:
    column = _COLUMN.get(dtype)
    peaks = next((peaks for pattern, peaks in PEAKS.items() if re.search(pattern, name)), None)
    if peaks is None or column is None:
        return None
    tera = getattr(peaks, column)
    if column == "tf32" and tera is None:
        tera = peaks.fp32  # no such units: float32 is multiplied as it is
    return None if tera is None else tera * 1e12
