"""What structured pruning costs a trained model, at once and after a short training that recovers it; and what it buys.

    python tests/benchmarks/structured.py FOLDER [steps] [recovery] [seeds]   the runs, a line of FOLDER/runs.jsonl each
    python tests/benchmarks/structured.py FOLDER --table                      the table of the lines that are there
    python tests/benchmarks/structured.py FOLDER --speed                      five sizes by turns: speed over the dense

The model of 5 million parameters that ``pruning.py`` trains for ``steps`` steps (once; kept as FOLDER/dense_<steps>, or
put there) is made smaller, and trained for ``recovery`` steps more at a third of the rates. Three comparisons:

- criteria: half of the feed-forward units go, by lot and by criteria;
- width and depth: down to the same number of parameters, that of the model without a third of its layers;
- "new weights": the narrow model's shape, trained for ``recovery`` steps from random weights, at the dense rates;
- "two of four zero": the large model with half of its weights zero, for its speed (they are not held in training).

WikiText head and this Python's standard library together. Calibration: 64 windows of 256 tokens of the training split,
drawn with the seed. Perplexity of the first 64 windows of the validation split, mean over seeds, spread in brackets.
Speed on one thread: reading, 8 windows of 256 tokens at once; writing, 32 tokens after a prompt of 64.
"""

import itertools
import logging
import statistics
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from learning import BATCH, WINDOW
from pruning import dense, learner, perplexity, text, train
from runs import read, run_missing

from lightning_slm.measure.speed import greedy_stream, latency
from lightning_slm.models import SLMForCausalLM
from lightning_slm.pruning import magnitude_, shape_of, structured_

HALF: dict[str, Any] = {"unit": "ffn", "ratio": 0.5}
CRITERIA = ("random", "magnitude", "activation", "taylor", "taylor2", "michel")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{f"half of ffn, {criterion}": {**HALF, "criterion": criterion} for criterion in CRITERIA},
    "width": {"unit": ["ffn", "hidden"], "criterion": "activation"},
    "width, ffn only": {"unit": "ffn", "criterion": "activation"},
    "depth, block influence": {"unit": "layer", "criterion": "block_influence", "ratio": 1 / 3},
    "depth, loss": {"unit": "layer", "criterion": "loss", "ratio": 1 / 3},
    "depth, top": {"unit": "layer", "criterion": "top", "ratio": 1 / 3},
    "depth, random": {"unit": "layer", "criterion": "random", "ratio": 1 / 3},
    "width, new weights": {"unit": ["ffn", "hidden"], "criterion": "activation"},
    "two of four zero": {},
}


def smaller(method: str, seed: int, steps: int, recovery: int, folder: Path) -> dict[str, float]:
    """Perplexity at once and recovered, size and speed."""
    model, how = dense(folder, steps), dict(METHODS[method])
    if method.startswith("width"):
        how["parameters"] = without_a_third(folder, steps)
    if how:
        structured_(model, calibration(folder, seed), seed=seed, **how)
    if method == "two of four zero":
        magnitude_(model, sparsity=0.5, group=4)
    fresh = method.endswith("new weights")
    if fresh:
        pl.seed_everything(seed, verbose=False)
        model = SLMForCausalLM(model.config)
    module = learner(model, 1.5e-2 if fresh else 5e-3)
    at_once, fast = perplexity(module, folder), speeds(model.eval())
    train(module, folder, recovery, seed=1 + seed)
    sizes = {size: shape_of(model)[size] for size in ("parameters", "layers", "hidden", "ffn")}
    return {"at once": at_once, "recovered": perplexity(module, folder), **sizes, **fast}


def without_a_third(folder: Path, steps: int) -> int:
    """Parameters of the shallow model."""
    model = dense(folder, steps)
    structured_(model, unit="layer", criterion="top", ratio=1 / 3)
    return shape_of(model)["parameters"]


def calibration(folder: Path, seed: int) -> list[Any]:
    """64 windows."""
    data = text(folder, seed=100 + seed)
    data.prepare_data()
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), 64 // BATCH))


@torch.inference_mode()
def speeds(model: SLMForCausalLM, runs: int = 7) -> dict[str, float]:
    """Tokens per second, medians."""
    ids, times = torch.randint(4096, (BATCH, WINDOW), generator=torch.Generator().manual_seed(0)), []
    for _ in range(runs):
        start = time.perf_counter()
        model(ids)
        times.append(time.perf_counter() - start)
    writing = latency(lambda: greedy_stream(model, ids[:1, :64], 32), runs=runs)
    return {"read/s": ids.numel() / statistics.median(times), "write/s": writing.tokens_per_second}


def speed_by_turns(folder: Path, steps: int = 1000, rounds: int = 5) -> str:
    """Medians over the rounds of speed divided by the dense model's in the same round; weights do not matter here."""
    models = {}
    for name in ("dense", "two of four zero", "half of ffn, magnitude", "width, ffn only", "depth, top"):
        model, how = dense(folder, steps), {**METHODS[name]}
        if how:
            less = {"parameters": without_a_third(folder, steps)} if name.startswith("width") else {}
            structured_(model, **{**how, **less, "criterion": "top" if how["unit"] == "layer" else "magnitude"})
        if name == "two of four zero":
            magnitude_(model, sparsity=0.5, group=4)
        models[name] = model.eval()
    found = [{name: speeds(model, runs=3) for name, model in models.items()} for _ in range(rounds)]
    rows = ["| model | read | write |", "|---|--:|--:|"]
    for name in models:
        cells = [statistics.median(r[name][key] / r["dense"][key] for r in found) for key in ("read/s", "write/s")]
        rows.append(f"| {name} | {cells[0]:.2f} | {cells[1]:.2f} |")
    return "\n".join(rows)


def main(folder: Path, steps: int = 1000, recovery: int = 100, seeds: int = 3) -> None:
    """All runs that are missing, seed by seed."""
    jobs = [{"method": method, "seed": seed} for seed, method in itertools.product(range(seeds), METHODS)]
    how = {"steps": steps, "recovery": recovery}
    run_missing(folder, [{**job, **how} for job in jobs], lambda **job: smaller(**job, folder=folder))


def table(folder: Path) -> str:
    """Markdown: one row a method; a shape is layers x width x feed-forward units."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read(folder):
        found[line["method"]].append(line)
    head = ("method", "seeds", "shape", "parameters", "perplexity at once", "recovered", "read/s", "write/s")
    rows = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for method, lines in found.items():
        one = lines[0]
        shape = f"{one['layers']} x {one['hidden']} x {one['ffn']}"
        quality = [_spread([line[key] for line in lines]) for key in ("at once", "recovered")]
        speed = [f"{statistics.median(line[key] for line in lines):,.0f}" for key in ("read/s", "write/s")]
        cells = [method, str(len(lines)), shape, f"{one['parameters']:,}", *quality, *speed]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if "--table" in sys.argv:
        print(table(Path(sys.argv[1])))
    elif "--speed" in sys.argv:
        print(speed_by_turns(Path(sys.argv[1])))
    else:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
