"""What ``import lightning_slm`` and ``lightning-slm --help`` cost."""

import shutil
import subprocess
import sys

from harness import Goal, Results, alternate, timed


def seconds(*command: str) -> float:
    """Of a fresh process."""
    return timed(lambda: subprocess.run(command, check=True, capture_output=True, timeout=120))


def run(results: Results) -> None:
    times = alternate(
        {
            "lightning": lambda: seconds(sys.executable, "-c", "import lightning"),
            "both": lambda: seconds(sys.executable, "-c", "import lightning, lightning_slm"),
        },
        rounds=5,
    )
    extra = min(times["both"]) - min(times["lightning"])
    results.add(Goal("import lightning_slm beyond import lightning", extra, 0.1, at_least=False, unit="s"))

    command = shutil.which("lightning-slm")
    assert command is not None, "lightning-slm is not on PATH: run through `make benchmark`"
    for words in (["--help"], ["fit", "--help"], ["generate", "--help"], ["recipes", "list"]):
        value = min(seconds(command, *words) for _ in range(3))
        results.add(Goal(f"lightning-slm {' '.join(words)}", value, 3.0, at_least=False, unit="s"))
