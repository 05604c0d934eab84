"""Recurrent and hybrid models against Hugging Face's: the same weights; training, memory, decoding, windows."""

import contextlib
import functools
import time
from collections.abc import Callable

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
from lightning_slm.nn.attention import windowed_attention
from lightning_slm.nn.hardware import fast_dtype

# Shape letters: B = batch, T = tokens.

V, D, B, T = 8192, 256, 4, 512
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
