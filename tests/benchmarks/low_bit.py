"""What a model has learned after the same steps in each low-bit precision: the table of the precision plugins' cards.

    python tests/benchmarks/low_bit.py FOLDER [steps] [seeds] [names]   the runs, one line of FOLDER/runs.jsonl each;
                                                                       names: of precisions, with commas between
    python tests/benchmarks/low_bit.py FOLDER --table                   the table of the lines that are there

A model of a million parameters on the WikiText head and on this Python's standard library; bits per byte of the first
192 windows of the validation split, mean over seeds (of weights and data order), spread in brackets. Runs that a line
stands for are not repeated, so a broken-off table goes on; seeds and steps beside a line's are other lines.
"""

import itertools
import logging
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from runs import quiet_trainer, read, run_missing

from lightning_slm import CausalLM, TextData
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.strategies import BitNetPrecision, Float8Precision, Int4Precision, Int8Precision

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CORPORA: dict[str, Path | None] = {"WikiText head": DATA / "wikitext/train_head.txt.gz", "standard library": None}
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "pattern": "attn/mlp*4"}
PRECISIONS: dict[str, Callable[[], Any]] = {
    "fp32": lambda: None,
    "bf16": lambda: "bf16-mixed",
    "FP8 tensorwise": lambda: Float8Precision("tensorwise", emulate=True),
    "FP8 rowwise": lambda: Float8Precision("rowwise", emulate=True),
    "INT8 rowwise": lambda: Int8Precision("rowwise"),
    "INT8 blockwise": lambda: Int8Precision("blockwise"),
    "INT4": Int4Precision,
    "BitNet b1.58": lambda: BitNetPrecision("1.58"),
    "BitNet 1-bit": lambda: BitNetPrecision("1"),
}


def bits_per_byte(corpus: str, precision: str, steps: int, seed: int, folder: Path) -> float:
    """Of a model trained for ``steps`` steps of 1024 tokens."""
    pl.seed_everything(seed, verbose=False)
    data = TextData(CORPORA[corpus], vocab_size=2048, window=128, batch_size=8, seed=seed, cache_dir=folder / "cache")
    module = CausalLM(SLMForCausalLM(SLMConfig(vocab_size=2048, **SIZES)))
    chosen = PRECISIONS[precision]()
    how = {"precision": chosen} if chosen is None or isinstance(chosen, str) else {"plugins": [chosen]}
    trainer = quiet_trainer(steps, limit_val_batches=24, **how)
    trainer.fit(module, data)
    return trainer.validate(module, data, verbose=False)[0]["val_bits_per_byte"]


def main(folder: Path, steps: int = 250, seeds: int = 3, names: Sequence[str] = tuple(PRECISIONS)) -> None:
    """All runs that are missing, precision by precision, so that a table of few seeds is whole first."""
    axes = itertools.product(range(seeds), CORPORA, names)
    jobs = [{"corpus": corpus, "precision": name, "steps": steps, "seed": seed} for seed, corpus, name in axes]
    run_missing(folder, jobs, lambda **job: {"bpb": bits_per_byte(**job, folder=folder)})


def table(folder: Path) -> str:
    """Markdown: one row a precision, one column a corpus and number of steps."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in read(folder):
        found[line["corpus"], line["steps"]][line["precision"]].append(line["bpb"])
    columns = list(found)
    rows = ["| precision | " + " | ".join(f"{corpus}, {steps} steps" for corpus, steps in columns) + " |"]
    rows.append("|---|" + "--:|" * len(columns))
    for precision in PRECISIONS:
        values = [found[column][precision] for column in columns]
        cells = [f"{statistics.mean(v):.3f} ({max(v) - min(v):.3f})" if v else "" for v in values]
        rows.append(f"| {precision} | " + " | ".join(cells) + " |")
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
