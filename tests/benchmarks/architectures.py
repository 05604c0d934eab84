"""Recurrent and hybrid models against Hugging Face's: the same weights; training, memory, decoding, long contexts."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import HERE, Goal, Results, alternate, peak_mib, ratio, timed
from torch import Tensor, nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.models.decode import make_decoder
from lightning_slm.nn.attention import windowed_attention
from lightning_slm.nn.hardware import fast_dtype

# Shape letters: B = batch, T = tokens.

V, D, B, T, PROMPT, NEW = 8192, 256, 4, 512, 32, 128
_SHARED = {"vocab_size": V, "hidden_size": D, "tie_word_embeddings": True}
_MAMBA2 = {"num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 128, "expand": 2}
_JAMBA = {
    "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 16,
}  # fmt: skip


def mamba(layers: int = 12) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(**_SHARED, num_hidden_layers=layers, state_size=16))


def mamba2(layers: int = 12, chunk: int = 64) -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM(Mamba2Config(**_SHARED, **_MAMBA2, num_hidden_layers=layers, chunk_size=chunk))


def rwkv(layers: int = 6) -> RwkvForCausalLM:
    sizes = {**_SHARED, "tie_word_embeddings": False}
    return RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=layers, context_length=T))


def jamba(layers: int = 8) -> JambaForCausalLM:
    return JambaForCausalLM(JambaConfig(**_SHARED, **_JAMBA, num_hidden_layers=layers))


def pair(make: Callable[[], PreTrainedModel]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    theirs = make()
    return {"theirs": theirs, "ours": SLMForCausalLM.from_hf(theirs)}


def ours(pattern: str, **values: object) -> SLMForCausalLM:
    """A model without a peer."""
    torch.manual_seed(0)
    sizes = {**_SHARED, "intermediate_size": 704, "num_attention_heads": 4, "max_position_embeddings": 2**17}
    return SLMForCausalLM(SLMConfig(**{**sizes, **values}, pattern=pattern))


def step(model: nn.Module, dtype: torch.dtype, batch: int = B, length: int = T) -> Callable[[], None]:
    """One forward and backward pass on fixed random tokens."""
    ids = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(0))
    model.train()

    def work() -> None:
        model.zero_grad()
        low = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with low:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return work


def compiled(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        block.compile()
    return model


def compare(results: Results, what: str, make: Callable[[], PreTrainedModel], bound: float, length: int = T) -> None:
    """Training throughput, ours to theirs, eager, in both precisions."""
    for dtype in dict.fromkeys((torch.float32, fast_dtype())):
        steps = {name: step(model, dtype, length=length) for name, model in pair(make).items()}
        for work in steps.values():
            work()
        times = alternate({k: functools.partial(timed, f) for k, f in steps.items()}, rounds=5)
        speed = f"{B * length / min(times['ours']):.0f} against {B * length / min(times['theirs']):.0f} tokens/s"
        name = f"{what}, training, {_short(dtype)}: ours / Hugging Face"
        results.add(Goal(name, ratio(times, "theirs", "ours"), bound, at_least=True, detail=speed))


def reach(results: Results, what: str, model: nn.Module, bounds: dict[torch.dtype, float], rounds: int = 5) -> None:
    """Tokens per second of training, where there is nothing to compare with."""
    for dtype in dict.fromkeys((torch.float32, fast_dtype())):
        work = step(model, dtype)
        work()
        speed = B * T / min(timed(work) for _ in range(rounds))
        results.add(Goal(f"{what}, training, {_short(dtype)}", speed, bounds[dtype], at_least=True, unit="tokens/s"))


MEMORY = """
import torch, architectures
models = architectures.pair(architectures.{name})
model = models[WHOSE].train()
del models
ids = torch.randint(0, architectures.V, ({batch}, {length}))
model(input_ids=ids[:1, :8], labels=ids[:1, :8], use_cache=False).loss.backward()
# start
for _ in range(2):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
"""


def memory(results: Results, what: str, name: str, bound: float) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + MEMORY.format(name=name, batch=B, length=T)
    peaks = {whose: peak_mib(f"WHOSE = {whose!r}\n{code}") for whose in ("theirs", "ours")}
    detail = f"{peaks['ours']:.0f} against {peaks['theirs']:.0f} MiB above the idle model, fresh processes"
    value = peaks["ours"] / peaks["theirs"]
    results.add(
        Goal(f"{what}, training, peak memory: ours / Hugging Face", value, bound, at_least=False, detail=detail)
    )


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


FLAT = {
    "Mamba": ("mamba/-*4", {"positions": "none"}),
    "Mamba-2": ("mamba2/-*4", {"positions": "none"}),
    "RWKV-4": ("rwkv4/rwkv4_ffn*4", {"positions": "none", "norm": "layer", "embedding_norm": True}),
    "linear attention": ("linear_attention/mlp*4", {}),
    "Samba": ("(mamba/mlp swa/mlp)*2", {"sliding_window": 256}),
    "attention": ("attn/mlp*4", {}),
}


@torch.inference_mode()
def long_contexts(results: Results, lengths: tuple[int, ...] = (1024, 8192, 32768)) -> dict[str, list[float]]:
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
        bound = 1.1 if name != "attention" else 1e9
        value = ratio(times, str(lengths[-1]), str(lengths[0]))
        results.add(
            Goal(f"{name}: a step at {lengths[-1]} / at {lengths[0]}", value, bound, at_least=False, detail=detail)
        )
        detail = ", ".join(f"{b / 2**10:.0f} KiB at {n}" for n, b in zip(lengths, kept))
        label = f"{name}: state at {lengths[-1]} / at {lengths[0]}"
        results.add(Goal(label, kept[-1] / kept[0], 1.0 if bound < 2 else 1e9, at_least=False, detail=detail))
    return found


def _bytes(cache: object) -> int:
    tensors = [*cache.keys, *cache.values, *(t for state in cache.states for t in state.values())]
    return sum(t.numel() * t.element_size() for t in tensors)


def long_training(results: Results, lengths: tuple[int, ...] = (512, 2048, 8192)) -> dict[str, list[float]]:
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
        bound = 1.2 if name != "attention" else 1e9
        label = f"{name}: training at {lengths[-1]} / at {lengths[0]}"
        results.add(Goal(label, value, bound, at_least=False, detail=detail))
    return found


def window(results: Results) -> None:
    """The window folded into blocks, against a mask of a band: T 2048, W 256, forward and backward."""
    q, k, v = (torch.randn(B, 4, 2048, 64, requires_grad=True) for _ in range(3))
    distance = torch.arange(2048)[:, None] - torch.arange(2048)
    band = (distance >= 0) & (distance < 256)

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y.sum(), (q, k, v))

    works = {
        "band": lambda: backward(F.scaled_dot_product_attention(q, k, v, band)),
        "blocks": lambda: backward(windowed_attention(q, k, v, 256)),
    }
    times = alternate({k: functools.partial(timed, f, 2) for k, f in works.items()}, rounds=7)
    detail = f"{1e3 * min(times['blocks']):.1f} against {1e3 * min(times['band']):.1f} ms"
    value = ratio(times, "band", "blocks")
    results.add(Goal("sliding window: blocks / band mask", value, 1.9, at_least=True, detail=detail))


def plot(steps: dict[str, list[float]], training: dict[str, list[float]], path: Path) -> None:
    """Both costs against the length of the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in training.items():
        left.plot((512, 2048, 8192), values, marker="o", label=name)
    for name, values in steps.items():
        right.plot((1024, 8192, 32768), [1e3 * v for v in values], marker="o", label=name)
    for axes, title in ((left, "training, ms per 1000 tokens"), (right, "one step of decoding, ms")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the text", title=title)
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(results: Results) -> None:
    low = fast_dtype()
    reach(results, "Mamba, 12 layers", pair(mamba)["ours"], {low: 1596, torch.float32: 1357})
    start = time.perf_counter()
    fast = compiled(pair(mamba)["ours"])
    reach(results, "Mamba, 12 layers, compiled", fast, {low: 2500, torch.float32: 2000})
    print(f"(compiling included, {time.perf_counter() - start:.0f} s)")
    compare(results, "Mamba, 1 layer, T 128", lambda: mamba(1), 10.0, length=128)
    compare(results, "Mamba-2, 12 layers, chunks of 64", mamba2, 2.0)
    memory(results, "Mamba-2, 12 layers", "mamba2", 0.6)
    compare(results, "RWKV-4, 6 layers", rwkv, 5.0)
    compare(results, "Jamba, 8 layers, T 128", jamba, 12.0, length=128)
    samba = ours("(mamba/mlp swa/mlp)*3", sliding_window=256)
    reach(results, "Samba-like, 6 layers, window 256", samba, {low: 3943, torch.float32: 2734})
    window(results)
    decode(results, "Mamba, 12 layers", mamba, 3.0, 5.0)
    decode(results, "Mamba-2, 12 layers", mamba2, 3.0, 5.0)
    decode(results, "RWKV-4, 6 layers", rwkv, 1.6, 1.6)
    decode(results, "Jamba, 8 layers", jamba, 1.0, 1.0)
    plot(long_contexts(results), long_training(results), HERE / "results" / "architectures.png")
