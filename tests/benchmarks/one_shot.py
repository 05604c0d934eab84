"""One-shot pruning against the published loops, which go layer by layer, sequence by sequence and column by column.

The loops are written out again from the papers and their repositories' order of work: a block's layers each sum up
their own statistic, of one sequence after another; SparseGPT takes a Cholesky factor, an inverse and the factor of that
for every layer and goes column by column; ADMM inverts for every layer. Both take each block twice with each sequence,
which is most of the time on a processor, so that is measured by itself too. The weights are random, for only time and
memory are looked at. Both get the same tokens, the loops as single sequences, we in batches of eight.

Shape letters: O = outputs of a layer, I = its inputs, B = columns of a block.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Goal, Results, alternate, peak_mib, ratio
from torch import Tensor, nn

from lightning_slm.calibration import calibrate_
from lightning_slm.models import PRESETS, SLMForCausalLM
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import admm_, sparsegpt_, wanda_

SEQUENCES, TOKENS, VOCABULARY, ROUNDS = 32, 256, 4096, 3
OURS: dict[str, Callable[..., Any]] = {"wanda": wanda_, "sparsegpt": sparsegpt_, "admm": admm_}


def slm() -> nn.Module:
    """Our preset of 5 million parameters: queries, keys and values are one matrix, gate and up another."""
    torch.manual_seed(0)
    return SLMForCausalLM(PRESETS["slm-5m"].build_config()).eval()


def llama() -> nn.Module:
    """Hugging Face's class, 25 million parameters: seven matrices a block."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "vocab_size": VOCABULARY}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=8)).eval()


MODELS = {"slm-5m": slm, "Llama 25M": llama}


def tokens(batch: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(batch)]


class Wanda:
    """The running mean of squared input norms, and a sort of every row."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.samples = layer, 0
        self.squares_I = torch.zeros(layer.in_features)

    def add(self, x: Tensor) -> None:
        self.squares_I *= self.samples / (self.samples + 1)
        self.samples += 1
        self.squares_I += x.flatten(0, 1).float().T.norm(dim=1) ** 2 / self.samples

    def solve(self, sparsity: float, group: int | None) -> None:
        scores = self.layer.weight.abs() * self.squares_I.sqrt()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if group is None:
            order = scores.sort(dim=1, stable=True)[1]
            mask.scatter_(1, order[:, : int(sparsity * scores.shape[1])], True)
        else:
            for i in range(0, scores.shape[1], group):
                lowest = scores[:, i : i + group].topk(int(sparsity * group), dim=1, largest=False)[1]
                mask.scatter_(1, i + lowest, True)
        self.layer.weight[mask] = 0


class SparseGPT:
    """A running mean of X^T X, three factorisations, and a loop over columns."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.samples = layer, 0
        self.hessian_II = torch.zeros(layer.in_features, layer.in_features)

    def add(self, x: Tensor) -> None:
        self.hessian_II *= self.samples / (self.samples + 1)
        self.samples += 1
        x = math.sqrt(2 / self.samples) * x.flatten(0, 1).T.float()
        self.hessian_II += x.matmul(x.T)

    def solve(self, sparsity: float, group: int | None, block: int = 128) -> None:
        w, h = self.layer.weight.clone(), self.hessian_II
        dead = h.diagonal() == 0
        h[dead, dead] = 1
        w[:, dead] = 0
        h.diagonal().add_(0.01 * h.diagonal().mean())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        for start in range(0, w.shape[1], block):
            stop = min(start + block, w.shape[1])
            self.columns(w, upper, start, stop, sparsity, group)
        self.layer.weight.copy_(w)

    def columns(self, w: Tensor, upper: Tensor, start: int, stop: int, sparsity: float, group: int | None) -> None:
        here, part = w[:, start:stop].clone(), upper[start:stop, start:stop]
        kept, errors, losses = torch.zeros_like(here), torch.zeros_like(here), torch.zeros_like(here)
        mask = torch.zeros_like(here, dtype=torch.bool)
        if group is None:
            scores = here**2 / part.diagonal() ** 2
            mask = scores <= scores.flatten().sort()[0][int(scores.numel() * sparsity)]
        for i in range(stop - start):
            column, pivot = here[:, i], part[i, i]
            if group is not None and i % group == 0:
                scores = here[:, i : i + group] ** 2 / part.diagonal()[i : i + group] ** 2
                mask.scatter_(1, i + scores.topk(int(sparsity * group), dim=1, largest=False)[1], True)
            new = column.clone()
            new[mask[:, i]] = 0
            kept[:, i] = new
            losses[:, i] = (column - new) ** 2 / pivot**2
            error = (column - new) / pivot
            here[:, i:] -= error[:, None].matmul(part[i, i:][None])
            errors[:, i] = error
        w[:, start:stop] = kept
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])


class ADMM:
    """X^T X, an inverse for each layer, and twenty turns of W, Z and U."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.gram_II = torch.zeros(layer.in_features, layer.in_features)

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, 1).float()
        self.gram_II += x.T.matmul(x)

    def solve(self, sparsity: float, group: int | None, turns: int = 20, choosing: int = 15) -> None:
        norm = self.gram_II.diagonal().sqrt() + 1e-8
        gram = ((self.gram_II / norm).T / norm).T
        w = (self.layer.weight * norm).T
        gram.diagonal().add_(0.1 * gram.diagonal().mean())
        target = gram.matmul(w)
        gram.diagonal().add_(1.0)
        inverse, u = torch.inverse(gram), torch.zeros_like(w)
        for turn in range(turns):
            if turn < choosing:
                share = sparsity - sparsity * (1 - (turn + 1) / choosing) ** 3
                mask = self.choose((w + u).abs(), share, sparsity, group)
            z = (w + u) * mask
            u = u + (w - z)
            w = inverse.matmul(target + (z - u))
        self.layer.weight.copy_(((w + u) * mask).T / norm)

    @staticmethod
    def choose(sizes: Tensor, share: float, sparsity: float, group: int | None) -> Tensor:
        if group is None:
            mask = torch.ones(sizes.numel(), dtype=torch.bool)
            mask[torch.topk(sizes.flatten(), k=int(sizes.numel() * share), largest=False).indices] = False
            return mask.view(sizes.shape)
        places = sizes.T.reshape(-1, group).sort(dim=1)[1][:, int(sparsity * group) :]
        kept = torch.zeros(places.shape[0], group, dtype=torch.bool).scatter_(1, places, True)
        kept = kept.view(sizes.T.shape).T
        open_sizes = sizes.masked_fill(kept, torch.inf)
        count = min(int(sizes.numel() * share) + 1, sizes.numel())
        return open_sizes >= open_sizes.flatten().kthvalue(count)[0]


class Nothing:
    """No statistic and no pruning: what the passes through the blocks take by themselves."""

    def __init__(self, layer: nn.Linear | int, device: Any = None) -> None:
        pass

    def add(self, x: Tensor) -> None:
        pass

    update = add

    def reduce_(self) -> None:
        pass

    def solve(self, sparsity: float, group: int | None) -> None:
        pass


PATTERNS = {None: "50 %", 4: "2:4"}
LOOPS = {"wanda": Wanda, "sparsegpt": SparseGPT, "admm": ADMM, "nothing": Nothing}


@torch.no_grad()
def published(model: nn.Module, batches: list[dict[str, Tensor]], method: str, group: int | None) -> None:
    """Block after block: each sequence through it, solve each layer, each sequence through it again."""
    blocks = [block for _, block in repeated_blocks(model)]
    hidden, further = given_to(model, blocks, batches)
    for block, (args, kwargs) in zip(blocks, further):
        loops = {layer: LOOPS[method](layer) for layer in block.modules() if isinstance(layer, nn.Linear)}
        hooks = [layer.register_forward_hook(lambda m, x, y, to=loop: to.add(x[0])) for layer, loop in loops.items()]
        for x in hidden:
            block(x, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        for loop in loops.values():
            loop.solve(0.5, group)
        hidden = [block(x, *args, **kwargs) for x in hidden]


class FirstBlock(Exception):
    """A sequence has come to the first block."""


def given_to(model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], Any]:
    """What the first block gets of every sequence, and what else each block is called with: as of the first one."""
    hidden: list[Tensor] = []
    further: list[Any] = []

    def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block is blocks[0]:
            hidden.append(args[0])
        if len(further) == len(blocks):
            raise FirstBlock
        further.append((args[1:], kwargs))

    hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    for batch in batches:
        with contextlib.suppress(FirstBlock):
            model.base_model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return hidden, further


def ours(model: nn.Module, batches: list[dict[str, Tensor]], method: str, group: int | None) -> None:
    if method == "nothing":
        targets = weight_targets(model)
        calibrate_(model, batches, targets, lambda *_: {}, Nothing, progress=False)  # type: ignore[arg-type]
    else:
        OURS[method](model, batches, sparsity=0.5, group=group, progress=False)


def added_memory(name: str, function: str, batch: int, method: str) -> float:
    """MiB that pruning adds to the model and its tokens, in a fresh process."""
    here = str(Path(__file__).parent)
    code = f"""import sys, torch
torch.set_num_threads({torch.get_num_threads()})
sys.path.insert(0, {here!r})
import one_shot
model, batches = one_shot.MODELS[{name!r}](), one_shot.tokens({batch})
with torch.no_grad():
    model(**batches[0], use_cache=False)
# start
one_shot.{function}(model, batches, {method!r}, None)"""
    return peak_mib(code)


def seconds(work: Callable[..., None], name: str, batch: int, method: str, group: int | None) -> float:
    """Of processor time, on one thread: what else runs on the machine is not measured."""
    model, batches = MODELS[name](), tokens(batch)
    start = time.process_time()
    work(model, batches, method, group)
    return time.process_time() - start


def run(results: Results) -> None:
    for name, (method, (group, pattern)) in itertools.product(MODELS, itertools.product(OURS, PATTERNS.items())):
        works = {"loop": (published, 1), "ours": (ours, 8)}
        times = alternate(
            {
                f"{who}, {what}": partial(seconds, work, name, batch, each, group)
                for who, (work, batch) in works.items()
                for what, each in (("passes", "nothing"), ("all", method))
            },
            ROUNDS,
        )
        detail = ", ".join(f"{who} {statistics.median(each):.2f} s" for who, each in times.items())
        what = f"{method}, {pattern}, {name}: loop / ours"
        results.add(Goal(what, ratio(times, "loop, all", "ours, all"), 2.0, at_least=True, detail=detail))
        for who in works:
            times[who] = [total - passes for total, passes in zip(times[f"{who}, all"], times[f"{who}, passes"])]
        detail = ", ".join(f"{who} {statistics.median(times[who]):.2f} s" for who in works)
        results.add(Goal(f"{what}, beyond the passes", ratio(times, "loop", "ours"), 2.0, at_least=True, detail=detail))
    for name, method in itertools.product(MODELS, OURS):
        loop, own, large = (added_memory(name, *v, method) for v in (("published", 1), ("ours", 1), ("ours", 8)))
        detail = f"loop {loop:.0f} MiB, ours {own:.0f} MiB, in batches of eight {large:.0f} MiB"
        results.add(Goal(f"{method}, {name}: memory, ours / loop", own / loop, 1.0, at_least=False, detail=detail))
