"""What architectures of five million parameters learn of real text from the same tokens, and what reading costs them.

    python tests/benchmarks/learning.py FOLDER [steps] [seeds] [names]   the runs, one line of FOLDER/runs.jsonl each;
                                                                        names: of presets, with commas between
    python tests/benchmarks/learning.py FOLDER --table                   the table of the lines that are there

The text is the WikiText head and this Python's standard library together; bits per byte of the first 64 windows of the
validation split, mean over seeds (of weights and data order), spread in brackets. One thread.
"""

import itertools
import logging
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from runs import quiet_trainer, read, run_missing

from lightning_slm import CausalLM, MuonAdamW, TextData
from lightning_slm.data.sources import standard_library_files
from lightning_slm.models import PRESETS, SLMCache, SLMForCausalLM

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WINDOW, BATCH, LONG = 256, 8, 8192
ARCHITECTURES = (
    "slm-5m", "mamba-5m", "mamba2-5m", "rwkv4-5m", "rwkv7-5m", "linear-5m", "samba-5m", "hymba-5m", "mambaformer-5m",
    "jamba-5m",
)  # fmt: skip
# The same number of parameters as deep and thin, and as shallow and wide (MobileLLM's comparison).
SHAPES = {
    "5m deep": ("attn/mlp*14", 160, 432, 5),
    "5m wide": ("attn/mlp*2", 384, 992, 6),
    "15m deep": ("attn/mlp*14", 288, 768, 9),
    "15m wide": ("attn/mlp*4", 512, 1408, 8),
}  # pattern, width, width inside, heads


def corpus(folder: Path) -> Path:
    """Both texts in one folder, as links."""
    both = folder / "corpus"
    if not both.exists():
        both.mkdir(parents=True)
        os.symlink(DATA / "wikitext" / "train_head.txt.gz", both / "wikitext.txt.gz")
        for number, file in enumerate(standard_library_files()):
            os.symlink(file, both / f"{number:04d}_{file.name}")
    return both


def build(name: str) -> SLMForCausalLM:
    """A preset, or one of the shapes."""
    values: dict[str, Any] = {"max_position_embeddings": LONG}
    if name in SHAPES:
        pattern, hidden, inside, heads = SHAPES[name]
        values |= {"pattern": pattern, "hidden_size": hidden, "intermediate_size": inside}
        values |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return SLMForCausalLM(PRESETS["slm-5m" if name in SHAPES else name].build_config(**values))


def learn(architecture: str, steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Bits per byte after ``steps`` steps of 2048 tokens, tokens per second, and MiB of state at 8k tokens."""
    pl.seed_everything(seed, verbose=False)
    data = TextData(
        corpus(folder), vocab_size=4096, window=WINDOW, batch_size=BATCH, seed=seed, cache_dir=folder / "cache"
    )
    module = CausalLM(build(architecture), optimizer=lambda groups: MuonAdamW(groups, lr=1.5e-2, muon_lr=0.02))
    trainer = quiet_trainer(steps, limit_val_batches=8, precision="bf16-mixed")
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    found = trainer.validate(module, data, verbose=False)[0]["val_bits_per_byte"]
    return {
        "bpb": found,
        "tokens_per_second": steps * WINDOW * BATCH / seconds,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "state_mib": state_mib(module.model),
    }


@torch.inference_mode()
def state_mib(model: SLMForCausalLM, context: int = LONG) -> float:
    """Of the cache after so many tokens, read in pieces."""
    cache = SLMCache(model.eval().config)
    for ids in torch.randint(0, model.config.vocab_size, (1, context)).split(1024, 1):
        model.model(ids, past_key_values=cache)
    return cache.nbytes() / 2**20


def main(folder: Path, steps: int = 100, seeds: int = 3, names: Sequence[str] = ARCHITECTURES) -> None:
    """All runs that are missing, seed by seed."""
    jobs = [{"architecture": n, "steps": steps, "seed": s} for s, n in itertools.product(range(seeds), names)]
    run_missing(folder, jobs, lambda **job: learn(**job, folder=folder))


def table(folder: Path) -> str:
    """Markdown: one row an architecture, best first."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in read(folder):
        found[line["architecture"], line["steps"]].append(line)
    rows = ["| architecture | parameters | steps | seeds | bits per byte | tokens/s | state at 8k, MiB |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|")
    for (name, steps), lines in sorted(found.items(), key=lambda item: statistics.mean(x["bpb"] for x in item[1])):
        bpb = [line["bpb"] for line in lines]
        speed = max(line["tokens_per_second"] for line in lines)  # what else ran can only have slowed a run down
        rows.append(
            f"| {name} | {lines[0]['parameters'] / 1e6:.2f} M | {steps} | {len(lines)} | "
            f"{statistics.mean(bpb):.3f} ({max(bpb) - min(bpb):.3f}) | {speed:.0f} | {lines[0]['state_mib']:.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    where = Path(sys.argv[1])
    if "--table" in sys.argv:
        print(table(where))
    else:
        torch.set_num_threads(1)
        main(where, *map(int, sys.argv[2:4]), *(names.split(",") for names in sys.argv[4:]))
