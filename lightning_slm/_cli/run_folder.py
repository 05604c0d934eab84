"""What a run leaves in its folder: the resolved configuration, and one checkpoint from which it continues exactly."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slm._cli.paths import CONFIG, LAST


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` of a run up to date: now and then, at the end, and at Ctrl-C.

    Lightning's ModelCheckpoint chooses the best of several, and may be added beside this one. It does not save the end
    of a run of ``max_steps``, and what it saves at an interrupt may be half an optimizer step. Here the first Ctrl-C
    lets the running step finish, saves and stops; a second one stops at once.

    Args:
        every_seconds: training time between two saves, in seconds.
    """

    def __init__(self, every_seconds: float = 60.0) -> None:
        self.every_seconds = every_seconds
        self.last_model_path = self.best_model_path = ""  # what Lightning and its loggers ask a Checkpoint for
        self._interrupted = False
        self._previous_handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        # Several ranks get the signal at different steps; there Lightning's own way of stopping must do.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._seen_step:  # within an accumulation, whose gradients no checkpoint holds
            return
        self._seen_step = trainer.global_step
        if self._interrupted:
            self._save(trainer)
            rank_zero_info(f"\nSaved step {trainer.global_step}: the same command with --ckpt_path last continues.")
            raise KeyboardInterrupt
        due = trainer.strategy.broadcast(time.monotonic() - self._saved_at >= self.every_seconds)
        if due or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.last_model_path = self.best_model_path = str(Path(trainer.default_root_dir) / LAST)
            trainer.save_checkpoint(self.last_model_path)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _on_interrupt(self, *_: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("\nStopping after this step; Ctrl-C again stops at once, without saving.")

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration of a training run beside its checkpoints; a later start replaces it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that cannot start must not replace the configuration of one that did."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=True, multifile=False)
