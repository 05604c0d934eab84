"""Long tables, run by run: one JSON line each, so that a table that was broken off goes on where it was."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def run_missing(folder: Path, jobs: Iterable[dict[str, Any]], work: Callable[..., dict[str, float]]) -> None:
    """Call ``work(**job)`` for every job that no line of ``folder/runs.jsonl`` stands for, and add its line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "runs.jsonl"
    done = read(folder)
    for job in jobs:
        if any(line.items() >= job.items() for line in done):
            continue
        start = time.perf_counter()
        line = {**job, **work(**job), "seconds": round(time.perf_counter() - start, 1)}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """What has been run."""
    lines = folder / "runs.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def quiet_trainer(steps: int, **how: Any) -> pl.Trainer:
    """Trains ``steps`` steps on the CPU and writes nothing."""
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
        gradient_clip_val=1.0,
        **how,
    )
