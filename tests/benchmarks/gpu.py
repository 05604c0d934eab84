"""Training on one GPU: tokens per second, MFU and memory of ours, of Lightning and of Hugging Face's Trainer.

The same sizes, batch, optimizer (fused AdamW) and random tokens for all; each with and without its blocks compiled.
Without a CUDA device nothing is measured; ``SLM_GPU_SMOKE=1 python tests/benchmarks/run.py gpu`` goes through all of it
on a CPU with a tiny model, FP8 emulated and the compiler's back end left out: that it runs, not how fast.
"""

import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from harness import Goal, Results
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_slm.measure.flops import training_flops
from lightning_slm.measure.peak import peak_flops
from lightning_slm.models import PRESETS, SLMConfig, SLMForCausalLM
from lightning_slm.modules import CausalLM
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.strategies.float8_precision import Float8Precision


@dataclass(frozen=True)
class Setting:
    """One model on one device.

    Args:
        name: of the preset.
        config: its sizes.
        batch: sequences of a step.
        window: tokens of a sequence.
        steps: of a run, ``warmup`` included.
        warmup: first steps that are not timed: compilation, allocation.
        backend: of ``torch.compile``.
    """

    name: str
    config: SLMConfig
    batch: int
    window: int
    steps: int = 40
    warmup: int = 15
    device: str = "cuda"
    backend: str = "inductor"

    @property
    def emulate(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Measured:
    """What one run came to."""

    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int  # 0 on a CPU: not measured


Found = dict[tuple[str, bool], Measured]  # by variant, and whether its blocks are compiled


def settings(smoke: bool) -> list[Setting]:
    """What is measured: sizes that an 80 GB card holds without activation checkpointing."""
    if smoke:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = SLMConfig(vocab_size=256, **sizes, pattern="attn/mlp*2", tie_word_embeddings=False)
        return [Setting("tiny", config, 2, 32, steps=3, warmup=1, device="cpu", backend="aot_eager")]
    shapes = {"mobilellm-125m": (8, 2048), "tinyllama-1.1b": (4, 2048)}
    return [Setting(name, PRESETS[name].build_config(), *shape) for name, shape in shapes.items()]


# Models, data, optimizer: the same for all.


def ours(setting: Setting, compile: bool) -> SLMForCausalLM:
    torch.manual_seed(0)
    with torch.device(setting.device):
        return compiled(SLMForCausalLM(setting.config), setting, compile)


def hugging_face(setting: Setting, compile: bool) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(setting.device):
        return compiled(SLMForCausalLM(setting.config).to_hf(), setting, compile)


def compiled(model: Any, setting: Setting, compile: bool) -> Any:
    for _, block in repeated_blocks(model) if compile else ():
        block.compile(backend=setting.backend)
    return model.train()


def examples(setting: Setting) -> list[dict[str, Tensor]]:
    shape = (setting.steps * setting.batch, setting.window)
    ids = torch.randint(0, setting.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


class Plain(pl.LightningModule):
    """What one writes around a Hugging Face model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


# The clock, hung into both trainers.


class Clock:
    """Seconds of the steps after the warm-up; the device is waited for at the two ends only."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.step, self.start, self.seconds = setting, 0, 0.0, 0.0

    def tick(self) -> None:
        """A step is done."""
        self.step += 1
        if self.step in (self.setting.warmup, self.setting.steps):
            if self.setting.device == "cuda":
                torch.cuda.synchronize()
            self.seconds, self.start = time.perf_counter() - self.start, time.perf_counter()


class InLightning(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


class InTheirs(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


# The variants: each trains a fresh model under a clock.


def with_lightning(setting: Setting, clock: Clock, module: pl.LightningModule, **precision: Any) -> None:
    trainer = pl.Trainer(
        max_steps=setting.steps,
        callbacks=[InLightning(clock)],
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **precision,
    )
    trainer.fit(module, DataLoader(examples(setting), batch_size=setting.batch))


def their_trainer(setting: Setting, clock: Clock, compile: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=setting.steps,
            per_device_train_batch_size=setting.batch,
            bf16=True,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            max_grad_norm=0.0,  # nobody clips here
            use_cpu=setting.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = hugging_face(setting, compile)
        callbacks: Any = [InTheirs(clock)]
        transformers.Trainer(model, arguments, train_dataset=examples(setting), callbacks=callbacks).train()


def lightning_and_their_model(setting: Setting, clock: Clock, compile: bool) -> None:
    with_lightning(setting, clock, Plain(hugging_face(setting, compile)), precision="bf16-mixed")


def our_module(setting: Setting, clock: Clock, compile: bool, **precision: Any) -> None:
    module = CausalLM(ours(setting, compile), optimizer=adamw, lr_scheduler=None)
    with_lightning(setting, clock, module, **(precision or {"precision": "bf16-mixed"}))


def our_fp8(setting: Setting, clock: Clock, compile: bool, recipe: Any) -> None:
    our_module(setting, clock, compile, plugins=[Float8Precision(recipe, emulate=setting.emulate)])


THEIRS, OURS = "Hugging Face Trainer", "CausalLM, bf16-mixed"
VARIANTS: dict[str, Callable[[Setting, Clock, bool], None]] = {
    THEIRS: their_trainer,
    "Lightning, LlamaForCausalLM, bf16-mixed": lightning_and_their_model,
    OURS: our_module,
    "CausalLM, FP8 tensorwise": functools.partial(our_fp8, recipe="tensorwise"),
    "CausalLM, FP8 rowwise": functools.partial(our_fp8, recipe="rowwise"),
}


def measure(setting: Setting, variant: Callable[..., None], compile: bool) -> Measured:
    """One run, with nothing left on the device of the run before."""
    gc.collect()
    torch._dynamo.reset()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(setting)
    variant(setting, clock, compile)
    sequences = (setting.steps - setting.warmup) * setting.batch
    with torch.device("meta"):
        flops = training_flops(SLMForCausalLM(setting.config), setting.window)
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else 0
    return Measured(sequences * setting.window / clock.seconds, sequences * flops / clock.seconds, peak)


def run(results: Results, smoke: bool | None = None) -> None:
    """Measure, and hold it against the goals; without a CUDA device say so."""
    smoke = os.environ.get("SLM_GPU_SMOKE") == "1" if smoke is None else smoke
    if not smoke and not torch.cuda.is_available():
        print("not run: needs a CUDA device")
        return
    for setting in settings(smoke):
        found: Found = {}
        for name, variant in VARIANTS.items():
            for compile in (False, True):
                try:
                    found[name, compile] = measure(setting, variant, compile)
                except (RuntimeError, torch.OutOfMemoryError) as error:  # too small a card, or one without FP8
                    print(f"not run: {setting.name}, {name}, {compile=}: {str(error).splitlines()[0]}", flush=True)
                    continue
                report(results, setting, found, name, compile)
        goals(results, setting, found)


def report(results: Results, setting: Setting, found: Found, name: str, compile: bool) -> None:
    """A line for each run: against Hugging Face's Trainer in the same way, compiled or not."""
    mine, theirs = found[name, compile], found.get((THEIRS, compile))
    device = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    detail = f"{mine.tokens_per_second:.0f} tokens/s, {mine.flops_per_second / 1e12:.2f} TFLOP/s"
    detail += f", {utilisation(setting, mine):.3f} of the bf16 peak, {mine.peak_bytes / 2**30:.1f} GiB"
    detail += f"; {setting.batch} x {setting.window} tokens, {device}"
    how = "compiled blocks" if compile else "eager"
    # FP8 pays off in compiled blocks only: its rounding is fused there.
    bound = 0.0 if name == THEIRS or ("FP8" in name and not compile) else 1.0
    value = mine.tokens_per_second / theirs.tokens_per_second if theirs else 0.0
    what = f"{setting.name}, {how}: tokens/s of {name} / {THEIRS}"
    results.add(Goal(what, value, bound, at_least=True, detail=detail))


def utilisation(setting: Setting, run: Measured) -> float:
    return run.flops_per_second / (peak_flops(setting.device, torch.bfloat16) or float("inf"))


def goals(results: Results, setting: Setting, found: Found) -> None:
    """What was set beforehand, for the larger model (and the tiny one of the smoke test)."""
    if setting.name == "mobilellm-125m" or (OURS, True) not in found:
        return
    dense = found[OURS, True]
    what = f"{setting.name}, compiled blocks: MFU of {OURS}"
    results.add(Goal(what, utilisation(setting, dense), 0.5, at_least=True, unit=""))
    fp8 = {name: run for (name, compile), run in found.items() if compile and "FP8" in name}
    for name, low in fp8.items():
        what = f"{setting.name}, compiled blocks: tokens/s of {name} / {OURS}"
        bound = 1.25 if low is max(fp8.values(), key=lambda run: run.tokens_per_second) else 0.0  # the faster recipe
        value = low.tokens_per_second / dense.tokens_per_second
        share = low.flops_per_second / (peak_flops(setting.device, torch.float8_e4m3fn) or float("inf"))
        results.add(Goal(what, value, bound, at_least=True, detail=f"{share:.3f} of the FP8 peak"))
    if (THEIRS, True) in found and found[THEIRS, True].peak_bytes:
        value = dense.peak_bytes / found[THEIRS, True].peak_bytes
        what = f"{setting.name}, compiled blocks: peak memory of {OURS} / {THEIRS}"
        results.add(Goal(what, value, 1.0, at_least=False))
