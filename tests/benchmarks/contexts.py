"""What the length of a text costs: a step of decoding, the state that is kept, and training, for each kind of mixer."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from architectures import V, ours, step
from harness import HERE, Goal, Results, alternate, ratio, timed
from torch import Tensor

from lightning_slm.models.decode import make_decoder

TRAINED, DECODED = (512, 2048, 8192), (1024, 8192, 32768)
FLAT = {
    "Mamba": ("mamba/-*4", {"positions": "none"}),
    "Mamba-2": ("mamba2/-*4", {"positions": "none"}),
    "RWKV-4": ("rwkv4/rwkv4_ffn*4", {"positions": "none", "norm": "layer", "embedding_norm": True}),
    "linear attention": ("linear_attention/mlp*4", {}),
    "Samba": ("(mamba/mlp swa/mlp)*2", {"sliding_window": 256}),
    "attention": ("attn/mlp*4", {}),
}


@torch.inference_mode()
def long_contexts(results: Results, lengths: tuple[int, ...] = DECODED) -> dict[str, list[float]]:
    """Seconds of a step after so many tokens, and the bytes of what is kept, longest to shortest."""
    found: dict[str, list[float]] = {}
    for name, (pattern, values) in FLAT.items():
        model = ours(pattern, **values).eval()
        decoders = {str(n): make_decoder(model, 1, n + 80) for n in lengths}
        for n, read in zip(lengths, decoders.values()):
            read(torch.randint(0, V, (1, n)))

        def some_steps(read: Callable[[Tensor], Tensor]) -> float:
            return timed(lambda: read(torch.ones(1, 1, dtype=torch.long)), repeats=12)

        times = alternate({n: functools.partial(some_steps, read) for n, read in decoders.items()}, rounds=5)
        found[name] = [sorted(t)[len(t) // 2] for t in times.values()]
        detail = ", ".join(f"{1e3 * t:.2f} ms at {n}" for n, t in zip(lengths, found[name]))
        kept = [_bytes(read.cache) for read in decoders.values()]
        value, grows = ratio(times, str(lengths[-1]), str(lengths[0])), name == "attention"
        results.add(
            Goal(f"{name}: a step at {lengths[-1]} / at {lengths[0]}", value, 1.1, at_least=grows, detail=detail)
        )
        detail = ", ".join(f"{b / 2**10:.0f} KiB at {n}" for n, b in zip(lengths, kept))
        label = f"{name}: state at {lengths[-1]} / at {lengths[0]}"
        results.add(Goal(label, kept[-1] / kept[0], 1.0, at_least=grows, detail=detail))
    return found


def _bytes(cache: object) -> int:
    tensors = [*cache.keys, *cache.values, *(t for state in cache.states for t in state.values())]
    return sum(t.numel() * t.element_size() for t in tensors)


def long_training(results: Results, lengths: tuple[int, ...] = TRAINED) -> dict[str, list[float]]:
    """Milliseconds per 1000 tokens of training, at a constant number of tokens a step."""
    found: dict[str, list[float]] = {}
    for name, (pattern, values) in FLAT.items():
        model = ours(pattern, **values)
        works = {str(n): step(model, torch.float32, lengths[-1] // n, n) for n in lengths}
        for work in works.values():
            work()
        times = alternate({n: functools.partial(timed, work) for n, work in works.items()}, rounds=3)
        found[name] = [1e6 * min(t) / lengths[-1] for t in times.values()]
        detail = ", ".join(f"{t:.0f} ms/1k tokens at {n}" for n, t in zip(lengths, found[name]))
        value = ratio(times, str(lengths[-1]), str(lengths[0]))
        label = f"{name}: training at {lengths[-1]} / at {lengths[0]}"
        results.add(Goal(label, value, 1.2, at_least=name == "attention", detail=detail))
    return found


def plot(steps: dict[str, list[float]], training: dict[str, list[float]], path: Path) -> None:
    """Both costs against the length of the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in training.items():
        left.plot(TRAINED, values, marker="o", label=name)
    for name, values in steps.items():
        right.plot(DECODED, [1e3 * v for v in values], marker="o", label=name)
    both = ((left, TRAINED, "training, ms per 1000 tokens"), (right, DECODED, "one step of decoding, ms"))
    for axes, lengths, title in both:
        axes.set(xscale="log", ylim=0, xlabel="tokens of the text", title=title)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run(results: Results) -> None:
    plot(long_contexts(results), long_training(results), HERE / "results" / "contexts.png")
