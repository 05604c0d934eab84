"""Writing text with packed weights: mobilellm-125m at batch 1 on the CPU, against float32 and bfloat16 of the same."""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Goal, Results, alternate, peak_mib, ratio, timed
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_slm.export import save_hf_folder
from lightning_slm.models import PRESETS, SLMForCausalLM
from lightning_slm.models.decode import generate_stream
from lightning_slm.quantization import prepare_qat_
from lightning_slm.quantization.bitnet import bitnet_
from lightning_slm.quantization.int4_kernel import use_int4_kernel_

PRESET, PROMPT, NEW, LONG, ROUNDS = "mobilellm-125m", 16, 32, 512, 5

# Name -> folder, dtype, whether PyTorch's 4-bit kernel is asked for, whether the step is compiled; the goal against
# float32 in the same mode.
VARIANTS: dict[str, tuple[str, torch.dtype, bool, bool, float | None]] = {
    "float32": ("dense", torch.float32, False, False, None),
    "bfloat16": ("dense in bfloat16", torch.bfloat16, False, False, None),
    "int4 as loaded, float32": ("int4", torch.float32, False, False, 1.0),
    "int4 by the kernel, bfloat16": ("int4", torch.bfloat16, True, False, 1.0),
    "ternary as loaded, float32": ("ternary", torch.float32, False, False, 1.0),
    "ternary by the kernel, bfloat16": ("ternary", torch.bfloat16, True, False, 1.0),
    "float32, compiled": ("dense", torch.float32, False, True, None),
    "int4 as loaded, float32, compiled": ("int4", torch.float32, False, True, 1.0),
    "ternary as loaded, float32, compiled": ("ternary", torch.float32, False, True, 1.0),
}

MEMORY = """
import contextlib, io, torch
from transformers import AutoModelForCausalLM
import lightning_slm
from lightning_slm.models.decode import generate_stream
from lightning_slm.quantization.int4_kernel import use_int4_kernel_
torch.zeros(64, 64) @ torch.zeros(64, 64)
# start
with contextlib.redirect_stderr(io.StringIO()):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=DTYPE)
if KERNEL:
    use_int4_kernel_(model)
list(generate_stream(model, torch.arange(1, 17), 8))
"""


def write_folders(where: Path) -> None:
    """The same random weights dense, in int4 groups of 32 (embedding and head in int8), and ternary."""
    torch.manual_seed(0)
    dense = SLMForCausalLM(PRESETS[PRESET].build_config()).eval()
    int4, ternary = copy.deepcopy(dense), copy.deepcopy(dense)
    prepare_qat_(int4, "int4_weight")
    bitnet_(ternary)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
        for name, model in {"dense": dense, "int4": int4, "ternary": ternary}.items():
            save_hf_folder(model, where / name)
        save_hf_folder(dense.bfloat16(), where / "dense in bfloat16")


def load(where: Path, name: str) -> tuple[nn.Module, bool]:
    """A variant's model, and whether its step is compiled."""
    folder, dtype, kernel, compiled, _ = VARIANTS[name]
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(where / folder, dtype=dtype)
    if kernel:
        use_int4_kernel_(model)
    return model, compiled


def decoder(model: nn.Module, compiled: bool) -> Any:
    """Seconds of each token after the first."""
    prompt = torch.arange(1, PROMPT + 1)

    def write() -> float:
        stream = generate_stream(model, prompt, NEW, compile=compiled)
        next(stream)  # reads the prompt
        return timed(lambda: list(stream)) / (NEW - 1)

    return write


def reader(model: nn.Module) -> Any:
    """Seconds of a long prompt."""
    ids = torch.arange(1, LONG + 1)[None]

    @torch.inference_mode()
    def read() -> float:
        return timed(lambda: model(input_ids=ids, logits_to_keep=1))

    return read


def run(results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        write_folders(where)
        decoders, readers, compiling = {}, {}, 0.0
        for name in VARIANTS:
            model, compiled = load(where, name)
            decoders[name] = decoder(model, compiled)
            if not compiled:
                readers[name] = reader(model)
            start = time.perf_counter()
            decoders[name]()
            compiling += time.perf_counter() - start if VARIANTS[name][3] else 0.0
        print(f"three models compiled in {compiling:.0f} s")
        times, prompts = alternate(decoders, rounds=ROUNDS), alternate(readers, rounds=ROUNDS)
        peaks = {name: peak(where, name) for name, variant in VARIANTS.items() if not variant[3]}
    report(results, times, prompts, peaks)


def peak(where: Path, name: str) -> float:
    """MiB above an idle Python, loading included."""
    folder, dtype, kernel, *_ = VARIANTS[name]
    given = f"import torch\nFOLDER, DTYPE, KERNEL = {str(where / folder)!r}, {dtype}, {kernel}\n"
    return peak_mib(given + MEMORY)


def report(
    results: Results, times: dict[str, list[float]], prompts: dict[str, list[float]], peaks: dict[str, float]
) -> None:
    rate = {name: f"{1 / statistics.median(seconds):.1f}" for name, seconds in times.items()}
    for name, (*_, compiled, goal) in VARIANTS.items():
        if goal is not None:
            dense = "float32, compiled" if compiled else "float32"
            detail = f"{rate[name]} against {rate[dense]} tokens/s"
            results.add(Goal(f"{name} / {dense}: speed", ratio(times, dense, name), goal, at_least=True, detail=detail))
    for name, variant in VARIANTS.items():
        if variant[1] == torch.bfloat16 and variant[2]:
            detail = f"{rate[name]} against {rate['bfloat16']} tokens/s"
            value = ratio(times, "bfloat16", name)
            results.add(Goal(f"{name} / bfloat16: speed", value, 1.0, at_least=True, detail=detail))
    for name, seconds in prompts.items():
        if VARIANTS[name][4] is not None:
            dense = str(VARIANTS[name][1]).removeprefix("torch.")
            detail = f"{statistics.median(seconds):.2f} against {statistics.median(prompts[dense]):.2f} s"
            value, what = ratio(prompts, dense, name), f"{name} / {dense}: a prompt of {LONG} tokens"
            results.add(Goal(what, value, 0.75, at_least=True, detail=detail))
    for name, mib in peaks.items():
        if name not in ("float32", "bfloat16"):
            detail = (
                f"{mib:.0f} against {peaks['float32']:.0f} MiB (bfloat16: {peaks['bfloat16']:.0f}), loading included"
            )
            value = mib / peaks["float32"]
            results.add(Goal(f"{name} / float32: peak memory", value, 0.5, at_least=False, detail=detail))
