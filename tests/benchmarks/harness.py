"""Ratios that survive a noisy machine: variants alternate in one process, and medians are compared."""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl

HERE = Path(__file__).resolve().parent


@dataclass
class Goal:
    """One line of a benchmark's table: what was measured against what, and what it had to reach."""

    what: str
    value: float
    bound: float
    at_least: bool  # else at most
    unit: str = "x"
    detail: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> str:
        sign = ">=" if self.at_least else "<="
        return (
            f"| {self.what} | {self.value:.3f} {self.unit} | {sign} {self.bound} | {'yes' if self.met else '**no**'} |"
            f" {self.detail} |"
        )


@dataclass
class Results:
    """The goals of one benchmark run, printed as they come and written to a dated file."""

    theme: str
    goals: list[Goal] = field(default_factory=list)

    def add(self, goal: Goal) -> None:
        self.goals.append(goal)
        print(goal.row(), flush=True)

    def write(self) -> Path:
        """``results/<theme>_<hardware>_<yyyymm>.md``: the table, with the command, hardware and versions."""
        import lightning
        import torch
        import torchao
        import transformers

        cpu = _cpu_name()
        short = f"{torch.get_num_threads()}threads-{platform.machine()}"
        path = HERE / "results" / f"{self.theme}_{short}_{time.strftime('%Y%m')}.md"
        path.parent.mkdir(exist_ok=True)
        versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, lightning, transformers, torchao))
        lines = [
            f"# {self.theme}, {time.strftime('%Y-%m-%d')}",
            "",
            f"`make benchmark` (theme {self.theme}): {cpu}, {torch.get_num_threads()} threads,",
            f"{versions}. Ratios of medians; variants alternate in one process.",
            "",
            "| what | measured | goal | met | detail |",
            "|---|---|---|---|---|",
            *(g.row() for g in self.goals),
        ]
        path.write_text("\n".join(lines) + "\n")
        return path


class StepTime(pl.Callback):
    """Seconds per training step of ``steps``, after the first few."""

    def __init__(self, steps: int, warm_up: int) -> None:
        self.steps, self.warm_up = steps, warm_up

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.warm_up - 1:
            self.start = time.perf_counter()
        if batch_idx == self.steps - 1:
            self.seconds = (time.perf_counter() - self.start) / (self.steps - self.warm_up)


def alternate(variants: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """Call each variant once a round, in turn and in turned order, and keep what each returns (seconds)."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for r in range(rounds):
        for name in names if r % 2 == 0 else reversed(names):
            gc.collect()  # a trainer and its module are a cycle; left to chance, they would be freed in another's time
            times[name].append(variants[name]())
    return times


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of (time of ``of``) / (time of ``to``) in the same round."""
    return statistics.median(a / b for a, b in zip(times[of], times[to]))


def timed(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def peak_mib(code: str) -> float:
    """High-water mark of resident memory, MiB, that ``code`` adds after its line ``# start``, in a fresh process."""
    setup, _, work = code.partition("# start\n")
    mark = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    # The kernel's mark is reset first: a child's resource usage begins at that of its parent.
    reset = "open('/proc/self/clear_refs', 'w').write('5')"
    script = f"{setup}\n{reset}\nbefore = {mark}\n{work}\nprint(({mark} - before) / 1024)"
    # A fixed threshold: what is freed goes back to the system, and fragmentation is not measured in place of tensors.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "500000"}
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, capture_output=True, text=True, timeout=900, check=True, env=env)
    return float(out.stdout.strip().splitlines()[-1])


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
