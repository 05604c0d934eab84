"""What one-shot pruning costs a trained model, before and after a short training that recovers it.

    python tests/benchmarks/pruning.py FOLDER [steps] [recovery] [seeds]   the runs, one line of FOLDER/runs.jsonl each
    python tests/benchmarks/pruning.py FOLDER --table                      the table of the lines that are there

A model of 5 million parameters is trained for ``steps`` steps (once; it is kept in FOLDER), pruned with calibration
data of each seed, and trained for ``recovery`` steps more, at a third of the rates.

WikiText head and this Python's standard library together. Calibration: 64 windows of 256 tokens of the training split.
Perplexity of the first 64 windows of the validation split, mean over seeds, spread in brackets. One thread.
"""

import itertools
import logging
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from learning import BATCH, WINDOW, build, corpus
from runs import quiet_trainer, read, run_missing

from lightning_slm import CausalLM, MuonAdamW, TextData
from lightning_slm.callbacks import ADMMPruning, MagnitudePruning, SparseGPTPruning, WandaPruning
from lightning_slm.models import SLMForCausalLM

METHODS: dict[str, Callable[..., Any]] = {
    "magnitude": MagnitudePruning,
    "Wanda": WandaPruning,
    "SparseGPT": SparseGPTPruning,
    "ADMM": ADMMPruning,
}
PATTERNS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"sparsity": 0.5, "group": 4},
    "70 %": {"sparsity": 0.7},
}


def text(folder: Path, seed: int = 0) -> TextData:
    cache = folder / "cache"
    return TextData(corpus(folder), vocab_size=4096, window=WINDOW, batch_size=BATCH, seed=seed, cache_dir=cache)


def train(module: CausalLM, folder: Path, steps: int, callbacks: tuple[Any, ...] = (), seed: int = 0) -> None:
    quiet_trainer(steps, precision="bf16-mixed", callbacks=list(callbacks)).fit(module, text(folder, seed))


def learner(model: SLMForCausalLM, lr: float) -> CausalLM:
    return CausalLM(model, optimizer=partial(MuonAdamW, lr=lr, muon_lr=0.02 * lr / 1.5e-2))


def dense(folder: Path, steps: int) -> SLMForCausalLM:
    """The trained model; trained once."""
    place = folder / f"dense_{steps}"
    if not place.exists():
        pl.seed_everything(0, verbose=False)
        module = learner(build("slm-5m"), 1.5e-2)
        train(module, folder, steps)
        module.model.save_pretrained(place)
    return SLMForCausalLM.from_pretrained(place)


def perplexity(module: CausalLM, folder: Path, callbacks: tuple[Any, ...] = ()) -> float:
    trainer = quiet_trainer(1, limit_val_batches=64 // BATCH, callbacks=list(callbacks))
    return trainer.validate(module, text(folder), verbose=False)[0]["val_perplexity"]


def pruned(method: str, pattern: str, seed: int, steps: int, recovery: int, folder: Path) -> dict[str, float]:
    """Perplexity at once, and after training with the zeros held, at a third of the dense model's rates."""
    module = learner(dense(folder, steps), 5e-3)
    how = PATTERNS.get(pattern, {})
    if method not in ("dense", "magnitude"):
        how = {"calibration": 64 // BATCH, "seed": seed, **how}
    callbacks = (METHODS[method](**how),) if method in METHODS else ()
    at_once = perplexity(module, folder, callbacks)
    train(module, folder, recovery, callbacks, seed=1 + seed)
    return {"at once": at_once, "recovered": perplexity(module, folder), "zeros": zeros(module)}


@torch.no_grad()
def zeros(module: CausalLM) -> float:
    """Share of zeros in the matrices of the blocks."""
    weights = [p for p in module.model.model.layers.parameters() if p.ndim == 2]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def main(folder: Path, steps: int = 1000, recovery: int = 50, seeds: int = 3) -> None:
    """All runs that are missing, seed by seed."""
    named = [("dense", "dense"), *itertools.product(METHODS, PATTERNS)]
    jobs = [{"method": m, "pattern": p, "seed": s} for s, (m, p) in itertools.product(range(seeds), named)]
    how = {"steps": steps, "recovery": recovery}
    run_missing(folder, [{**job, **how} for job in jobs], lambda **job: pruned(**job, folder=folder))


def table(folder: Path) -> str:
    """Markdown: one row a method and pattern."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in read(folder):
        found[line["pattern"], line["method"]].append(line)
    rows = ["| pattern | method | seeds | perplexity at once | recovered |", "|---|---|--:|--:|--:|"]
    for (pattern, method), lines in found.items():
        cells = [_spread([line[key] for line in lines]) for key in ("at once", "recovered")]
        rows.append(f"| {pattern} | {method} | {len(lines)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if "--table" in sys.argv:
        print(table(Path(sys.argv[1])))
    else:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
