"""The callback contract's table: every callback, on modules that are not made for it. Run as a script: on two ranks.

``python tests/contract.py FOLDER STRATEGY callbacks`` (or ``precisions``) lets Lightning start a second process, runs
what needs two ranks, and writes FOLDER/results.0.pt, which the fixture ``two_ranks`` reads.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import (
    VOCABULARY,
    Demo,
    ForeignLlama,
    Notes,
    batches,
    differences,
    kill_and_resume,
    learned,
    leave_together,
    trainer,
)
from torch import nn

from lightning_slm.callbacks import (
    ADMMPruning,
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    MagnitudePruning,
    NMSparseTraining,
    QuantizationAwareTraining,
    SparseGPTPruning,
    ThroughputMonitor,
    WandaPruning,
)
from lightning_slm.measure import measured
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.modules import CausalLM, muon_adamw
from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import weight_targets
from lightning_slm.strategies import (
    BitNetPrecision,
    Float8Precision,
    Int4Precision,
    Int8Precision,
    LLMInt8Precision,
    NF4Precision,
)


@dataclass(frozen=True)
class Kind:
    """A sort of LightningModule: how to make it, its data, and its network (what a teacher is)."""

    make: Callable[..., Any]
    network: str
    loader: Callable[..., Any] = batches


def our_module() -> CausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return CausalLM(model=SLMForCausalLM(SLMConfig(vocab_size=VOCABULARY, **sizes, pattern="attn/mlp*2")))


MODULES = {
    "demo": Kind(Demo, "model", partial(batches, pairs=True)),
    "foreign": Kind(ForeignLlama, "net"),
    "ours": Kind(our_module, "model"),
}


def teacher_of(kind: str) -> nn.Module:
    """Another network of the same sort; the caller's random numbers stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(42)
        return getattr(MODULES[kind].make(), MODULES[kind].network)


def low_bit(kind: type[Any], **kwargs: Any) -> partial[Any]:
    """Makes the plugin; in float32 beside it, so that what is compared is the plugin's own."""
    return partial(kind, base="32-true", **kwargs)


EVERY_PRECISION = {
    "BitNetPrecision": low_bit(BitNetPrecision),
    "BitNetPrecision, 1 bit": low_bit(BitNetPrecision, bits="1", warmup=0.8, weight_decay_until=0.7, sub_norm=True),
    "Float8Precision": low_bit(Float8Precision, emulate=True),
    "Float8Precision, rowwise": low_bit(Float8Precision, recipe="rowwise", emulate=True),
    "Int4Precision": low_bit(Int4Precision),
    "Int8Precision": low_bit(Int8Precision),
    "Int8Precision, blockwise": low_bit(Int8Precision, recipe="blockwise"),
    "LLMInt8Precision": low_bit(LLMInt8Precision),
    "NF4Precision": low_bit(NF4Precision, block=32),
}
# Further settings, which are tried without callbacks and in one process.
EVERY_SETTING = {
    **EVERY_PRECISION,
    "Float8Precision, rowwise_with_gw_hp": low_bit(Float8Precision, recipe="rowwise_with_gw_hp", emulate=True),
    "Int4Precision, all rows": low_bit(Int4Precision, sampled=False),
    "NF4Precision, magnitudes in 32 bits": low_bit(NF4Precision, block=32, double_quant=False),
}
FROZEN = ("NF4Precision", "LLMInt8Precision")  # weights are codes that do not change


def layer_of(precision: str) -> str:
    """Name of the class that a precision makes of a linear layer."""
    return re.sub("(Net)?Precision.*", "Linear", precision)


def refusal(precision: str, callback: str) -> str | None:
    """Why a precision and a callback do not go together; None: they do."""
    if callback == "QuantizationAwareTraining":
        return f"computes as FakeQuantLinear already, so it cannot become {layer_of(precision)}"
    if callback.endswith(("Pruning", "NMSparseTraining")) and precision.startswith(FROZEN):
        return r"q_proj.weight' holds packed torch.u?int8; prune before quantising"
    return None


def in_base(precision: str, base: str) -> partial[Any]:
    """Makes the plugin with another base."""
    make = EVERY_SETTING[precision]
    return partial(make.func, **{**make.keywords, "base": base})


def combinable(kind: str, precision: str) -> list[Any]:
    """One of each callback that goes together with a precision."""
    return [case.make(kind) for name, case in EVERY_CALLBACK.items() if refusal(precision, name) is None]


@dataclass(frozen=True)
class Case:
    """How to make a callback for a kind of module, two of them for one, and how it stands in YAML.

    Args:
        make: the callback for a kind of module.
        pair: the arguments of two instances that stand in one list.
        yaml: arguments of plain values.
        rounds: its result is a step function of the weights, so that equal up to rounding is not equal any more.
    """

    make: Callable[..., Any]
    pair: tuple[dict[str, Any], dict[str, Any]]
    yaml: dict[str, Any]
    rounds: bool = False


def unseen(kind: str) -> Any:
    """The demo's attention reads weights without calling their layers: nothing is known of their inputs."""
    return ["*out_proj", "*multihead_attn*"] if kind == "demo" else ()


def calibration(kind: str) -> list[Any]:
    """The same data whatever the batch size of a run, and on each of several ranks."""
    return list(MODULES[kind].loader(n=8))


EVERY_CALLBACK = {
    "ADMMPruning": Case(
        lambda kind, **kw: ADMMPruning(
            **{"sparsity": 0.5, "group": 4, "calibration": calibration(kind), "skip": unseen(kind), **kw}
        ),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "sparsity": 0.25, "group": None}),
        yaml={"sparsity": 0.5, "group": 4, "iterations": 30, "when": "end", "calibration": 8},
    ),
    "CompressionReport": Case(
        lambda kind, **kw: CompressionReport(**{"batches": 1, "prompt_tokens": 2, "new_tokens": 2, "runs": 1, **kw}),
        pair=({}, {"folder": "second"}),
        yaml={"batches": 4},
    ),
    "GradualPruning": Case(
        lambda kind, **kw: GradualPruning(**{"sparsity": 0.5, "group": 4, "end": 0.75, "every": 2, **kw}),
        pair=({}, {"sparsity": 0.25, "targets": "*layers.0*"}),
        yaml={"sparsity": 0.5, "group": 4, "skip": ["*down_proj"]},
    ),
    "KnowledgeDistillation": Case(
        lambda kind, **kw: KnowledgeDistillation(**{"teacher": teacher_of(kind), **kw}),
        pair=({}, {"weight": 0.25}),
        yaml={"teacher": "slm-5m", "temperature": 1.5},
    ),
    "MagnitudePruning": Case(
        lambda kind, **kw: MagnitudePruning(**{"sparsity": 0.25, **kw}),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "when": "end"}),
        yaml={"sparsity": 0.5, "budget": "row", "skip": ["*down_proj"]},
    ),
    "NMSparseTraining": Case(
        lambda kind, **kw: NMSparseTraining(**{"decay": 1e-3, "warmup": 0.5, "flips_every": 2, **kw}),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "sparsity": 0.25}),
        yaml={"sparsity": 0.5, "group": 4, "decay": 1e-4, "skip": ["*down_proj"]},
        rounds=True,
    ),
    "QuantizationAwareTraining": Case(
        # The demo's attention reads weights without calling their layers: nothing rounds there.
        lambda kind, **kw: QuantizationAwareTraining(
            **{"group": 16, "begin": 0.3, "skip": "*attn*" if kind == "demo" else (), **kw}
        ),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "scheme": "int8_weight", "begin": 0.6}),
        yaml={"scheme": "int4_weight", "group": 16, "embedding": None},
        rounds=True,
    ),
    "SparseGPTPruning": Case(
        lambda kind, **kw: SparseGPTPruning(
            **{"sparsity": 0.5, "group": 4, "calibration": calibration(kind), "skip": unseen(kind), **kw}
        ),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "sparsity": 0.25, "group": None}),
        yaml={"sparsity": {"*self_attn*": 0.4, "*": 0.6}, "damping": 0.05, "calibration": 8},
    ),
    "ThroughputMonitor": Case(
        lambda kind, **kw: ThroughputMonitor(**{"window": 4, "warmup": 1, **kw}),
        pair=({}, {"window": 2}),
        yaml={"window": 8, "warmup": 2, "peak_tflops": None},
    ),
    "WandaPruning": Case(
        lambda kind, **kw: WandaPruning(
            **{"sparsity": 0.5, "group": 4, "calibration": calibration(kind), "skip": unseen(kind), **kw}
        ),
        pair=({"targets": "*layers.0*"}, {"targets": "*layers.1*", "sparsity": 0.25, "group": None}),
        yaml={"sparsity": {"*self_attn*": 0.4, "*": 0.6}, "when": "end", "calibration": 8, "allocation": "uniform"},
    ),
}


# Models that change their shapes, and data of a callback's own, do not fit into the table: these have their tests of
# the contract beside their others.
ELSEWHERE = {
    "DynamicBatchLoading": "test_dynamic_batch_loading.py",
    "L0Pruning": "test_sheared_pruning.py",
    "ShearedPruning": "test_sheared_pruning.py",
    "StructuredPruning": "test_structured_pruning.py",
}


TIMED = ("slm/tokens_per_second", "slm/tflops_per_second", "slm/mfu")
STRATEGIES = ("ddp", "slm_fsdp2", "slm_zero1")
ON_TWO_RANKS = [(kind, name) for kind in MODULES for name in [*EVERY_CALLBACK, "all"]]


def all_together(kind: str) -> list[Any]:
    """One of each, in the order of the alphabet."""
    return [case.make(kind) for case in EVERY_CALLBACK.values()]


def without_fresh_processes() -> None:
    """CompressionReport measures memory in fresh processes, 10 s each; its own tests do that."""

    def left_out(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("left out in the contract's tests")

    measured.peak_memory = left_out


def muon_in_float32() -> None:
    """Where the processor has bf16, Newton-Schulz takes it, and another order of sums becomes another step."""
    muon_adamw.fast_dtype = lambda device: torch.float32


def comparable(end: dict[str, Any]) -> dict[str, Any]:
    """`learned`, but for times that were measured."""
    for key, state in end["callbacks"].items():
        for timed in ("first_token_seconds", "tokens_per_second") if key.startswith("CompressionReport") else ():
            state["before"]["values"].pop(timed, None)
    for logged in end.get("notes", {}).values():
        for key in [key for key in logged if key.startswith(TIMED)]:
            del logged[key]
    return learned(end)


def flat(module: nn.Module) -> torch.Tensor:
    """All parameters as one vector; whole, where ranks hold parts."""
    return torch.cat([whole(p.detach()).flatten() for p in module.parameters()])


def apart(first: nn.Module, second: nn.Module, start: torch.Tensor) -> float:
    """Distance between two trained modules, as a share of the way that the first one went."""
    return float((flat(first) - flat(second)).norm() / (flat(first) - start).norm())


def fit(
    kind: str,
    callbacks: list[Any],
    folder: Path,
    batch_size: int = 2,
    prepare: Any = None,
    part: slice = slice(None),
    n: int = 64,
    loader: Any = None,
    **kwargs: Any,
) -> Any:
    """A short run; returns its module, its start (as one vector) and its trainer."""
    torch.manual_seed(0)
    module = MODULES[kind].make()
    if prepare is not None:
        prepare(module)
    start = flat(module)
    run = trainer(folder, callbacks, **kwargs)
    loader = loader or MODULES[kind].loader
    run.fit(module, loader(n=n, batch_size=batch_size, part=part), loader(n=4))
    return module, start, run


def pruned(kind: str, state_dict: dict[str, Any], alone: bool = True) -> bool:
    """Whether half of every four weights are zero, as the table's `GradualPruning` leaves them.

    Args:
        alone: False: others that prune stood beside it, so that half is the least.
    """
    weights = [state_dict[target.name] for target in weight_targets(MODULES[kind].make())]
    zeros = [(weight.reshape(-1, 4) == 0).sum(1) for weight in weights]
    return all(bool(((z == 2) if alone else (z >= 2)).all()) for z in zeros)


def logged(run: Any) -> dict[str, list[float]]:
    """What a run with `Notes` logged, by name, step by step, but for times that were measured."""
    names = dict.fromkeys(name for values in run.logger.steps.values() for name in values)
    return {
        name: [values[name] for values in run.logger.steps.values() if name in values]
        for name in names
        if not name.startswith(TIMED)
    }


def make_callbacks(kind: str, name: str) -> list[Any]:
    return all_together(kind) if name == "all" else [EVERY_CALLBACK[name].make(kind)]


def on_two_ranks(folder: Path, kind: str, make: Callable[[], list[Any]], strategy: str, plugin: Any) -> dict[str, Any]:
    """Where kill + resume differs, whether the ranks agree, and what they learned."""
    m = MODULES[kind]
    # The examples are dealt out here: Lightning's own way would deal them in another order than one process has.
    part = slice(int(os.environ.get("LOCAL_RANK", 0)), None, 2)
    pair = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "plugin": plugin}
    ends = kill_and_resume(m.make, make, folder, partial(m.loader, part=part), **pair)
    module, _, run = fit(kind, make(), folder, part=part, logger=Notes(), **pair)
    ranks = run.strategy.all_gather(flat(module))
    return {
        "differences": differences(*map(comparable, ends)),
        "ranks agree": bool(torch.equal(ranks[0], ranks[1])),
        "steps": run.global_step,
        "learned": ranks[0],
        "logged": logged(run),
        "state_dict": ends[0]["state_dict"],
    }


if __name__ == "__main__":
    folder, strategy, part = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    without_fresh_processes()
    muon_in_float32()
    results: dict[str, Any] = {}
    jobs = [(f"{kind}-{name}", kind, partial(make_callbacks, kind, name), None) for kind, name in ON_TWO_RANKS]
    if part == "precisions":
        makers = {name: partial(combinable, "foreign", name) for name in EVERY_PRECISION}
        jobs = [(name, "foreign", makers[name], plugin) for name, plugin in EVERY_PRECISION.items()]
    for title, kind, make, plugin in jobs:
        try:
            results[title] = on_two_ranks(folder / title, kind, make, strategy, plugin)
        except Exception as error:  # the same on both ranks, if it is the callback's
            results[title] = {"error": f"{type(error).__name__}: {error}"}
        torch.save(results, folder / f"results.{os.environ.get('LOCAL_RANK', 0)}.pt")
    leave_together()
