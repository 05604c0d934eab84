"""What each callback adds to a training step, against the bare Trainer on the same module."""

import tempfile
import time

import lightning.pytorch as pl
import torch
from harness import Goal, Results, StepTime, alternate, ratio
from torch.utils.data import DataLoader

from lightning_slm import CausalLM, CompressionReport, GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_slm.measure import measured
from lightning_slm.models import PRESETS, SLMForCausalLM

STEPS, WARM_UP, ROUNDS = 24, 4, 3
B, T, V = 4, 256, 4096


def network() -> SLMForCausalLM:
    torch.manual_seed(0)
    return SLMForCausalLM(PRESETS["slm-5m"].build_config())


def loader() -> DataLoader:
    ids = torch.randint(0, V, (STEPS * B, T), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=B)


def adamw(params):
    """Fused: torch's loop over tensors takes the square root of each second moment in a pass of its own, and where a
    pruned weight has made that zero the pass is three times slower (here 3 % of a step of a model this small).
    """
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def step_time(*callbacks: pl.Callback, model: torch.nn.Module | None = None, val: bool = False) -> float:
    """Seconds per step of a fresh run with these callbacks."""
    clock = StepTime(STEPS, WARM_UP)
    trainer = pl.Trainer(
        max_steps=STEPS,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=2 if val else 0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1000,
    )
    module = CausalLM(network() if model is None else model, optimizer=adamw, lr_scheduler=None)
    trainer.fit(module, loader(), loader() if val else None)
    return clock.seconds


def torchao_prepared() -> torch.nn.Module:
    """Torchao's own quantisation-aware training, without us, of the same linear layers."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = network()
    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    body = lambda m, name: isinstance(m, torch.nn.Linear) and "lm_head" not in name  # noqa: E731
    quantize_(model, QATConfig(base, step="prepare"), filter_fn=body)
    return model


def by_hand(teacher: torch.nn.Module) -> float:
    """The loop one would write: student step, teacher forward, cross-entropy and KL on whole logits."""
    student = network()
    optimizer = adamw(student.parameters())
    start = 0.0
    for i, batch in enumerate(loader()):
        if i == WARM_UP:
            start = time.perf_counter()
        ids = batch["input_ids"]
        logits = student(ids).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            taught = teacher(ids).logits[:, :-1].flatten(0, 1)
        ce = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        log_p, log_q = (logits / 2).log_softmax(-1), (taught / 2).log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * 4
        (0.5 * ce + 0.5 * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / (STEPS - WARM_UP)


def run(results: Results) -> None:
    teacher, folder = network().eval(), tempfile.TemporaryDirectory()
    brief = {"batches": 1, "runs": 1, "new_tokens": 8, "folder": folder.name}
    measured._measure_memory = lambda *_: None  # type: ignore  # fresh processes: measuring is before and after the steps, not in them

    times = alternate(
        {
            "bare": step_time,
            "bare again": step_time,
            "GradualPruning": lambda: step_time(GradualPruning(0.5)),
            "CompressionReport": lambda: step_time(CompressionReport(**brief), val=True),
        },
        ROUNDS,
    )
    noise = f"the bare Trainer against itself: {ratio(times, 'bare again', 'bare'):.3f}"
    for name, bound in {"GradualPruning": 1.03, "CompressionReport": 1.01}.items():
        results.add(Goal(f"step with {name} / bare", ratio(times, name, "bare"), bound, at_least=False, detail=noise))

    qat = {
        "torchao": lambda: step_time(model=torchao_prepared()),
        "ours": lambda: step_time(QuantizationAwareTraining("int8_act_int4_weight", embedding=None)),
    }
    value = ratio(alternate(qat, ROUNDS), "ours", "torchao")
    results.add(Goal("step with QuantizationAwareTraining / torchao's prepare", value, 1.05, at_least=False))

    distil = {
        "by hand": lambda: by_hand(teacher),
        "ours": lambda: step_time(KnowledgeDistillation(teacher=teacher, temperature=2.0, weight=0.5)),
    }
    value = ratio(alternate(distil, ROUNDS), "ours", "by hand")
    results.add(Goal("step with KnowledgeDistillation / loop by hand", value, 1.05, at_least=False))
