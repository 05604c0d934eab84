"""Our backbone against Hugging Face's LlamaForCausalLM: the same weights and sizes, training, memory and decoding."""

import contextlib
import time

import torch
from harness import Goal, Results, alternate, peak_mib, ratio, timed
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.decode import generate_stream
from lightning_slm.nn.hardware import fast_dtype

SIZES = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
B, T, PROMPT, NEW = 4, 512, 32, 128

MEMORY = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lightning_slm.models import SLMForCausalLM
theirs = LlamaForCausalLM(LlamaConfig(**{SIZES!r}))
model = theirs if WHOSE == "theirs" else SLMForCausalLM.from_hf(theirs)
model.train()
ids = torch.randint(0, 8192, ({B}, {T}))
torch.zeros(64, 64) @ torch.zeros(64, 64)
model(ids[:1, :8], labels=ids[:1, :8]).loss.backward()
# start
for _ in range(3):
    model(ids, labels=ids).loss.backward()
"""


def pair() -> tuple[LlamaForCausalLM, SLMForCausalLM]:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES))
    return theirs, SLMForCausalLM.from_hf(theirs)


def step(model: torch.nn.Module, dtype: torch.dtype):
    """One forward and backward pass on fixed random tokens."""
    ids = torch.randint(0, SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(0))
    low = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def work() -> None:
        model.zero_grad()
        with low:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    model.train()
    work()
    return work


def train(results: Results, dtype: torch.dtype) -> None:
    """Training throughput, eager and compiled."""
    name = str(dtype).removeprefix("torch.")
    theirs, ours = pair()
    steps = {"theirs": step(theirs, dtype), "ours": step(ours, dtype)}
    times = alternate({k: lambda f=f: timed(f, 2) for k, f in steps.items()}, rounds=7)
    speed = f"{B * T / min(times['ours']):.0f} against {B * T / min(times['theirs']):.0f} tokens/s"
    value = ratio(times, "theirs", "ours")
    results.add(Goal(f"training, eager, {name}: ours / Hugging Face", value, 1.15, at_least=True, detail=speed))

    theirs, ours = pair()
    theirs.compile()
    ours.compile()
    start = time.perf_counter()
    steps = {"theirs": step(theirs, dtype), "ours": step(ours, dtype)}
    compiling = time.perf_counter() - start
    times = alternate({k: lambda f=f: timed(f, 2) for k, f in steps.items()}, rounds=7)
    speed = f"{B * T / min(times['ours']):.0f} against {B * T / min(times['theirs']):.0f} tokens/s"
    speed += f"; both compiled in {compiling:.0f} s"
    value = ratio(times, "theirs", "ours")
    results.add(Goal(f"training, compiled, {name}: ours / Hugging Face", value, 1.2, at_least=True, detail=speed))


def decode(results: Results) -> None:
    """Greedy decoding at batch 1 in float32."""
    theirs, ours = pair()
    theirs.eval()
    ours.eval()
    prompt = torch.randint(1, SIZES["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def hugging_face() -> None:
        theirs.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    variants = {
        "theirs": hugging_face,
        "eager": lambda: list(generate_stream(ours, prompt, NEW)),
        "compiled": lambda: list(generate_stream(ours, prompt, NEW, compile=True)),
    }
    for work in variants.values():
        work()
    times = alternate({k: lambda f=f: timed(f) for k, f in variants.items()}, rounds=7)
    for name, bound in {"eager": 1.6, "compiled": 2.3}.items():
        speed = f"{NEW / min(times[name]):.0f} against {NEW / min(times['theirs']):.0f} tokens/s"
        value = ratio(times, "theirs", name)
        results.add(Goal(f"decoding, {name}: ours / generate()", value, bound, at_least=True, detail=speed))


def run(results: Results) -> None:
    for dtype in dict.fromkeys((fast_dtype(), torch.float32)):
        train(results, dtype)
    peaks = {whose: peak_mib(f"WHOSE = {whose!r}\n{MEMORY}") for whose in ("theirs", "ours")}
    detail = f"{peaks['ours']:.0f} against {peaks['theirs']:.0f} MiB above the idle model, fresh processes, three steps"
    value = peaks["ours"] / peaks["theirs"]
    results.add(Goal("training, peak memory: ours / Hugging Face", value, 0.7, at_least=False, detail=detail))
    decode(results)
