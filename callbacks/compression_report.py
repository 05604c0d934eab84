"""What compression cost and what it brought: the model before the run beside the artefact after it."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn


class CompressionReport(Callback):
    """Measure the model before training and its exported form after it."""

    def __init__(
        self,
        baseline: str | nn.Module = "start",
        batches: int = 32,
        prompt_tokens: int = 32,
        new_tokens: int = 64,
        runs: int = 5,
        targets: str | Sequence[str] = "*",
        skip: str | Sequence[str] = (),
    ) -> None:
        self.baseline = baseline
