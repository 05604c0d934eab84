"""``fit --minutes``: how many steps of this very run fit into so many minutes on this very machine.

Schedules of learning rate and sparsity need a known number of steps, and how long a step takes differs tenfold between
laptops. So a few steps of the run itself are timed first, and the number is kept in the run's configuration: a run that
is continued keeps it.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slm._cli.paths import CONFIG, LAST

# What a run whose steps are timed leaves out. So many steps are never taken, but schedules want a number.
PROBE = {
    "max_steps": 100_000,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_WARM_UP, _TIMED, _LONGEST = 3, 30, 10.0  # steps, steps at most, seconds at most
_SHARE = 0.92  # of the minutes for training steps; the rest for validation and checkpoints


class Stopwatch(Callback):
    """Times the steps after the first few, then stops the run."""

    def __init__(self) -> None:
        self.step_seconds = self.start_seconds = 0.0
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now, steps = time.monotonic(), trainer.global_step
        if steps == _WARM_UP and not self.start_seconds:
            self.start_seconds, self._began = now - self._started, now
        elif steps > _WARM_UP:
            self.step_seconds = (now - self._began) / (steps - _WARM_UP)
            trainer.should_stop = steps >= _WARM_UP + _TIMED or now - self._began > _LONGEST


def steps_of_run(folder: Path) -> int | None:
    """The number of steps that a run to be continued was given; None if there is none to continue."""
    if not ((folder / CONFIG).is_file() and (folder / LAST).is_file()):
        return None
    return yaml.safe_load((folder / CONFIG).read_text())["trainer"]["max_steps"]


def steps_that_fit(minutes: float, probe: Any) -> int:
    """Optimizer steps that fit into ``minutes``.

    Args:
        probe: runs the same training as the command in another folder, with a `Stopwatch` that it is given.
    """
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        probe(watch, folder)
    if not watch.step_seconds:
        raise ValueError("--minutes: the run ended before a step could be timed; give --trainer.max_steps instead.")
    steps = max(1, int((60 * minutes * _SHARE - watch.start_seconds) / watch.step_seconds))
    rank_zero_info(f"{watch.step_seconds:.2f} s per step: {steps} steps fit into {minutes:g} minutes.")
    return steps
