"""What small classifiers learn of real texts in about a minute of one thread, from nothing.

Two layers of width 128 (0.8 million parameters) on the three tables in the shared data; goals are what a majority class
scores, with a margin.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import Goal, Results
from lightning.pytorch import Trainer, seed_everything

from lightning_slm import ClassificationData, MuonAdamW, SequenceClassifier

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BODY = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "pattern": "attn/mlp*2",
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "path": "sst2/train.tsv.gz", "val_path": "sst2/dev.tsv", "text": "sentence", "max_length": 64,
    },
    "ag_news": {
        "path": "ag_news/train_head.csv.gz", "val_path": "ag_news/test_dev.csv.gz", "text": 1, "text_pair": 2,
        "label": 0, "max_length": 64,
    },
    "cola": {
        "path": "cola/in_domain_train.tsv", "val_path": "cola/in_domain_dev.tsv", "text": 3, "label": 1,
        "max_length": 48,
    },
}  # fmt: skip
GOALS = {"sst2": ("accuracy", 0.75, 0.509), "ag_news": ("accuracy", 0.78, 0.251), "cola": ("mcc", 0.05, 0.0)}
STEPS = {"sst2": 600, "ag_news": 300, "cola": 1000}


def run(results: Results) -> None:
    """Encoder and decoder on each table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for task, columns in TASKS.items():
        for causal in (False, True):
            results.add(_goal(task, columns, causal))


def _goal(task: str, columns: dict[str, Any], causal: bool) -> Goal:
    seed_everything(0, verbose=False)
    data = ClassificationData(**{**columns, "path": DATA / columns["path"], "val_path": DATA / columns["val_path"]})
    module = SequenceClassifier(
        {**BODY, "causal": causal}, lambda groups: MuonAdamW(groups, lr=3e-3, muon_lr=0.01, weight_decay=0.1)
    )
    trainer = Trainer(
        max_steps=STEPS[task], max_epochs=-1, accelerator="cpu", limit_val_batches=0, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data.prepare_data()
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    quiet = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (logged,) = quiet.validate(module, data, verbose=False)
    score, bound, majority = GOALS[task]
    found = ", ".join(f"{name} {logged[f'val_{name}']:.3f}" for name in ("accuracy", "f1", "mcc"))
    detail = f"{found}; majority class {majority}; {STEPS[task]} steps of 32 in {seconds:.0f} s"
    return Goal(
        f"{task}, {'decoder' if causal else 'encoder'}: {score}", logged[f"val_{score}"], bound, True, "", detail
    )
