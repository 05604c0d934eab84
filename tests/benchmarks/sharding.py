"""What a sharding strategy costs where there is nothing to shard, and what two processes hold of a model."""

import os
import tempfile

import lightning.pytorch as pl
import torch
from harness import Goal, Results, StepTime, alternate, ratio
from torch.utils.data import DataLoader

import lightning_slm  # noqa: F401 (registers the strategies' names)
from lightning_slm import CausalLM
from lightning_slm.models import PRESETS, SLMForCausalLM

STEPS, WARM_UP, ROUNDS = 16, 4, 5
B, T = 4, 256


def step_time(strategy: str, preset: str = "slm-5m") -> float:
    """Seconds per step of a run in this one process."""
    torch.manual_seed(0)
    config = PRESETS[preset].build_config()
    module = CausalLM(
        SLMForCausalLM(config), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), lr_scheduler=None
    )
    ids = torch.randint(0, config.vocab_size, (STEPS * B, T), generator=torch.Generator().manual_seed(0))
    clock = StepTime(STEPS, WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=STEPS,
            strategy=strategy,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=B))
    return clock.seconds


def run(results: Results) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    names = ("auto", "slm_fsdp2", "slm_zero1")
    times = alternate({"again": lambda: step_time("auto"), **{n: lambda n=n: step_time(n) for n in names}}, ROUNDS)
    noise = f"the bare Trainer against itself: {ratio(times, 'again', 'auto'):.3f}"
    for name in names[1:]:
        goal = Goal(f"step with {name} in one process / bare", ratio(times, name, "auto"), 1.03, False, detail=noise)
        results.add(goal)
