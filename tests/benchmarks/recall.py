"""What attention can and small states cannot: three tasks with an exact answer, for models of two to four layers.

    python tests/benchmarks/recall.py FOLDER [seeds] [tasks] [names]   the runs, one line of FOLDER/runs.jsonl each;
                                                                      tasks and names with commas between
    python tests/benchmarks/recall.py FOLDER --table                   the table of the lines that are there

- recall: multi-query associative recall (Arora et al. 2023, https://arxiv.org/abs/2312.04927): pairs of a key and a
  value, then the keys again in another order; share of the values that are given right.
- phone book (Jelassi et al. 2024, https://arxiv.org/abs/2402.01032): names with numbers of four digits, then one name;
  share of the digits that are given right.
- regression (Park et al. 2024, https://arxiv.org/abs/2402.04248): x, w x, x', w x', ... with a new w for each text;
  squared error of the last prediction, where guessing zero gives the variance, here 1.

All models train on the same number of fresh texts, with one learning rate. The rotary base is 100, as fits texts of 40
tokens: with the usual 10000 two layers of attention do not learn the first two tasks in these steps.
"""

import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from runs import read, run_missing
from torch import Tensor, nn

from lightning_slm.models import SLMConfig, SLMForCausalLM, SLMModel

# Shape letters: B = texts, T = tokens, n = pairs, d = inputs of the regression.

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "rope_theta": 100.0}
MAMBA2 = {"state_size": 16, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"pattern": "attn/mlp*2"},
    "Mamba with a state of 1": {"pattern": "mamba/mlp*2", "positions": "none", "mixers": {"mamba": {"state_size": 1}}},
    "Mamba with a state of 16": {"pattern": "mamba/mlp*2", "positions": "none"},
    "Mamba-2 with a state of 16": {"pattern": "mamba2/mlp*2", "positions": "none", "mixers": {"mamba2": MAMBA2}},
    "RWKV-4": {"pattern": "rwkv4/rwkv4_ffn*2", "positions": "none", "norm": "layer", "embedding_norm": True},
    "linear attention": {"pattern": "linear_attention/mlp*2"},
    "Samba with a window of 8": {"pattern": "mamba/mlp swa/mlp", "sliding_window": 8},
    "Mamba and attention": {"pattern": "mamba/mlp attn/mlp", "positions": "none"},
    "MambaFormer": {"pattern": "mamba/- attn/- mamba/- attn/- mamba/-", "positions": "none"},
}
KEYS = VALUES = 16
PAIRS, ENTRIES, DIGITS, EXAMPLES, INPUTS = 6, 4, 4, 20, 4
STEPS = {"recall": 2000, "phone book": 2000, "regression": 1500}
RATE, BATCH = 3e-3, 64


def recall_batch(B: int, pairs: int) -> tuple[Tensor, Tensor]:
    """(B, 4 n) tokens, and labels where a value is asked for."""
    keys = torch.rand(B, KEYS).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (B, pairs))
    book = torch.stack((keys, values), 2)
    again = book[torch.arange(B)[:, None], torch.rand(B, pairs).argsort(1)].flatten(1)
    ids = torch.cat((book.flatten(1), again), 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2 * pairs :: 2] = again[:, 1::2]
    return ids, labels


def phone_book_batch(B: int, entries: int) -> tuple[Tensor, Tensor]:
    """Entries of a name and four digits, one of the names, and its digits."""
    names = torch.rand(B, KEYS).argsort(1)[:, :entries, None] + 10
    book = torch.cat((names, torch.randint(10, (B, entries, DIGITS))), 2)
    asked = book[torch.arange(B), torch.randint(entries, (B,))]
    ids = torch.cat((book.flatten(1), asked), 1)
    labels = torch.full_like(ids, -100)
    labels[:, -DIGITS - 1 : -1] = asked[:, 1:]
    return ids, labels


class Regression(nn.Module):
    """Reads x and w x as vectors, and predicts the next w x at every x."""

    def __init__(self, config: SLMConfig) -> None:
        super().__init__()
        self.backbone = SLMModel(config)
        self.read, self.tell = nn.Linear(INPUTS + 1, config.hidden_size), nn.Linear(config.hidden_size, 1)

    def forward(self, x_Bnd: Tensor, y_Bn: Tensor) -> Tensor:
        B, n, d = x_Bnd.shape
        pairs = torch.zeros(B, n, 2, d + 1)
        pairs[:, :, 0, :d], pairs[:, :, 1, d] = x_Bnd, y_Bn
        hidden = self.backbone(inputs_embeds=self.read(pairs.flatten(1, 2)), use_cache=False).last_hidden_state
        return self.tell(hidden[:, ::2])[..., 0]


def regression_batch(B: int) -> tuple[Tensor, Tensor]:
    x_Bnd = torch.randn(B, EXAMPLES, INPUTS)
    w_Bd = torch.randn(B, INPUTS) / INPUTS**0.5
    return x_Bnd, torch.einsum("bnd,bd->bn", x_Bnd, w_Bd)


def train(network: nn.Module, loss: Callable[[], Tensor], rate: float, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 100) * max(0.02, 1 - s / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm.step()


def score(task: str, model: str, seed: int) -> float:
    """Share of right answers, or the squared error."""
    torch.manual_seed(seed)
    values = MODELS[model]
    config = SLMConfig(vocab_size=KEYS + VALUES, **SIZES, **values)
    if task == "regression":
        network = Regression(config)

        def error(B: int) -> Tensor:
            x, y = regression_batch(B)
            return (network(x, y) - y).square()

        train(network, lambda: error(BATCH).mean(), RATE, STEPS[task])
        with torch.inference_mode():
            return float(error(1024)[:, -1].mean())
    batch, most = {"recall": (recall_batch, PAIRS), "phone book": (phone_book_batch, ENTRIES)}[task]
    lm = SLMForCausalLM(config)

    def right(B: int, how_many: int) -> tuple[Tensor, Tensor]:
        ids, labels = batch(B, how_many)
        logits = lm(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), (logits.argmax(-1) == labels)[labels >= 0]

    train(lm, lambda: right(BATCH, most)[0], RATE, STEPS[task])
    with torch.inference_mode():
        return float(right(512, most)[1].float().mean())


def main(
    folder: Path, seeds: int = 3, tasks: Sequence[str] = tuple(STEPS), names: Sequence[str] = tuple(MODELS)
) -> None:
    axes = itertools.product(range(seeds), tasks, names)
    run_missing(folder, [{"task": t, "model": m, "seed": s} for s, t, m in axes], lambda **job: {"score": score(**job)})


def table(folder: Path) -> str:
    """Markdown: one row a model."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in read(folder):
        found[line["model"]][line["task"]].append(line["score"])
    rows = ["| model | " + " | ".join(STEPS) + " |", "|---|" + "--:|" * len(STEPS)]
    for model, tasks in found.items():
        cells = [f"{statistics.mean(v):.3f} ({max(v) - min(v):.3f})" if (v := tasks.get(t)) else "" for t in STEPS]
        rows.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if "--table" in sys.argv:
        print(table(where))
    else:
        torch.set_num_threads(1)
        main(where, *map(int, sys.argv[2:3]), *(names.split(",") for names in sys.argv[3:]))
