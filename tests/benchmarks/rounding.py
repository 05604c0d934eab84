"""What rounding costs a trained model, before and after training with it: tables of cards.

    python tests/benchmarks/rounding.py [steps]

llama2.c's stories260K on TinyStories, nats per token on 96 windows of 256 tokens of the validation split.
"""

import copy
import gzip
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_slm.models.llama2c import load_llama2c, load_llama2c_tokenizer
from lightning_slm.quantization import llm_int8_, nf4_, prepare_qat_

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WINDOW, BATCH, LEARNING_RATE = 256, 8, 1e-4


def windows(split: str, characters: int) -> Tensor:
    """Packed windows of the beginning of a split, each story behind a BOS."""
    tokenizer = load_llama2c_tokenizer(DATA / "weights/stories260K/tok512.bin")
    with gzip.open(DATA / f"tinystories/{split}.txt.gz", "rt") as file:
        stories = file.read(characters).split("<|endoftext|>")
    ids = [i for s in stories for i in [1, *tokenizer(s.strip(), add_special_tokens=False)["input_ids"]]]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def nats(model: nn.Module, valid: Tensor) -> float:
    """Mean cross-entropy of a token."""
    model.eval()
    return float(torch.stack([model(input_ids=b, labels=b, return_logits=False).loss for b in valid.split(32)]).mean())


def train(model: nn.Module, batches: Tensor, steps: int) -> nn.Module:
    """A short run whose learning rate falls to zero; the same batches every time."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        batch = batches[torch.randint(len(batches), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(steps: int = 100) -> None:
    """Print one line for each frozen precision, and for each scheme and embedding."""
    warnings.filterwarnings("ignore", "Left in full precision")  # rows of 172 are no blocks of 32
    dense = load_llama2c(DATA / "weights/stories260K/stories260K.bin")
    batches, valid = windows("train", 2_000_000), windows("valid", 300_000)[:96]
    print(
        f"dense: {nats(dense, valid):.4f}, trained on: {nats(train(copy.deepcopy(dense), batches, steps), valid):.4f}"
    )
    frozen = {"nf4": partial(nf4_, double_quant=False, block=32), "nf4, double": partial(nf4_, block=32)}
    for name, freeze in {**frozen, "llm_int8": llm_int8_}.items():
        model = copy.deepcopy(dense)
        layers = freeze(model)
        print(f"{name}: {nats(model, valid):.4f} ({len(layers)} layers)")
    for scheme in ("int8_act_int4_weight", "int4_weight", "int2_weight"):
        for embedding in (None, "int8", "int4"):
            model = copy.deepcopy(dense)
            prepare_qat_(model, scheme, 32, skip="*down_proj", embedding=embedding)
            prepare_qat_(model, scheme, 43, targets="*down_proj", embedding=None)  # rows of 172 = 4 x 43
            rounded = nats(model, valid)
            print(f"{scheme}, {embedding=}: {rounded:.4f}, trained so: {nats(train(model, batches, steps), valid):.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
