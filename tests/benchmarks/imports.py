"""What ``import lightning_slm`` and ``lightning-slm --help`` cost."""

import shutil
import statistics
import subprocess
import sys

from harness import Goal, Results, timed


def seconds(*command: str) -> float:
    """Of a fresh process."""
    return timed(lambda: subprocess.run(command, check=True, capture_output=True, timeout=120))


def run(results: Results) -> None:
    # In one process: the difference of two processes of many seconds each is noise.
    code = "import lightning, time; t = time.perf_counter(); import lightning_slm; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(3)]
    extra = statistics.median(float(r.stdout.split()[-1]) for r in runs)
    results.add(Goal("import lightning_slm beyond import lightning", extra, 0.1, at_least=False, unit="s"))

    command = shutil.which("lightning-slm")
    assert command is not None, "lightning-slm is not on PATH: run through `make benchmark`"
    for words in (["--help"], ["fit", "--help"], ["generate", "--help"], ["recipes", "list"]):
        value = min(seconds(command, *words) for _ in range(3))
        results.add(Goal(f"lightning-slm {' '.join(words)}", value, 3.0, at_least=False, unit="s"))
