"""Recurrent and hybrid models decode: the static loop, eager and compiled, against Hugging Face's ``generate()``.

Small steps gain nothing from a second thread (on the machine of the table they lose half by it): run it with
``OMP_NUM_THREADS=1``.
"""

import functools
from collections.abc import Callable

import torch
from architectures import V, jamba, mamba, mamba2, pair, rwkv
from harness import Goal, Results, alternate, ratio, timed
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_slm.models.decode import make_decoder

PROMPT, NEW = 32, 128


def decode(results: Results, what: str, make: Callable[[], PreTrainedModel], eager: float, fast: float) -> None:
    """Greedy decoding in float32: prompt of 32, 128 more."""
    for batch in (1, 8):
        models = pair(make)
        ids = torch.randint(1, V, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        variants = {
            "theirs": functools.partial(_generate, models["theirs"].eval(), ids),
            "eager": functools.partial(_loop, models["ours"].eval(), ids, False),
            "compiled": functools.partial(_loop, models["ours"], ids, True),
        }
        for work in variants.values():
            work()
        times = alternate({k: functools.partial(timed, f) for k, f in variants.items()}, rounds=3)
        for name, bound in {"eager": eager, "compiled": fast}.items():
            speed = f"{batch * NEW / min(times[name]):.0f} against {batch * NEW / min(times['theirs']):.0f} tokens/s"
            label = f"{what}, decoding, batch {batch}, {name}: ours / generate()"
            results.add(Goal(label, ratio(times, "theirs", name), bound, at_least=True, detail=speed))


def _generate(model: nn.Module, ids: Tensor) -> None:
    model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


@torch.inference_mode()
def _loop(model: nn.Module, ids: Tensor, compile: bool) -> None:
    read = make_decoder(model, len(ids), PROMPT + NEW, compile=compile)
    for _ in range(NEW):
        ids = read(ids).argmax(-1, keepdim=True)


def run(results: Results) -> None:
    decode(results, "Mamba, 12 layers", mamba, 3.0, 5.0)
    decode(results, "Mamba-2, 12 layers", mamba2, 3.0, 5.0)
    decode(results, "RWKV-4, 6 layers", rwkv, 1.6, 1.6)
    decode(results, "Jamba, 8 layers", jamba, 1.0, 1.0)
