"""What the tests of the strategies let several processes do: ``python ranks.py FOLDER PROCESSES JOB``.

Lightning starts the other processes. The first writes what the job returned to FOLDER/JOB.pt.
"""

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contract import (
    EVERY_CALLBACK,
    EVERY_PRECISION,
    combinable,
    comparable,
    flat,
    teacher_of,
    without_fresh_processes,
)
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from support import ForeignLlama, Notes, batches, differences, kill_and_resume, learned, leave_together, trainer
from torch.distributed.fsdp import fully_shard

from lightning_slm.callbacks import GradualPruning, KnowledgeDistillation
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.modules import CausalLM, MuonAdamW
from lightning_slm.nn.sharded import local
from lightning_slm.strategies import FSDP2Strategy, ZeRO1Strategy

STEPS, VOCABULARY = 20, 64
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}

# What each option is given; all must learn what one process learns.
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zero 3": (FSDP2Strategy, {}),
    "zero 2": (FSDP2Strategy, {"zero_stage": 2}),
    "zero 1": (ZeRO1Strategy, {}),
    "replicas": (FSDP2Strategy, {"replicas": 2}),
    "activation checkpointing": (FSDP2Strategy, {"activation_checkpointing": True}),
    "named blocks": (FSDP2Strategy, {"blocks": ["*token_mixer", "*channel_mixer"]}),
    "compiled blocks": (FSDP2Strategy, {"compile": True}),
    "offloaded": (FSDP2Strategy, {"cpu_offload": True}),
    "shared blocks": (FSDP2Strategy, {}),
    "every kind of state": (FSDP2Strategy, {}),
    "every kind of state, zero 1": (ZeRO1Strategy, {}),
}
# A router's balance is a product of means, so that two halves of a batch have another one than the whole.
_STATES = {
    "pattern": "mamba/moe mamba2/mlp rwkv4/rwkv4_ffn rwkv7_first/mlp linear_attention/mlp hymba/mlp swa/mlp",
    "mixers": {"moe": {"experts": 4, "balance": 0.0, "z_loss": 0.0}, "mamba2": {"head_dim": 32, "state_size": 8}},
    "sliding_window": 4,
}
# The models of options that have one of their own.
BUILT: dict[str, dict[str, Any]] = {
    "shared blocks": {"pattern": "attn/mlp@one*2", "repeat": 2},
    "every kind of state": _STATES,
    "every kind of state, zero 1": _STATES,
}


def sgd(params: Any) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: rounding stays rounding."""
    return torch.optim.SGD(params, lr=0.03, momentum=0.9)


def make(pattern: str = "attn/mlp*2", repeat: int = 1, optimizer: Any = None, **sizes: Any) -> CausalLM:
    """A CausalLM that is the same in every process."""
    torch.manual_seed(0)
    config = SLMConfig(vocab_size=VOCABULARY, **{**SIZES, **sizes}, pattern=pattern, repeat=repeat)
    return CausalLM(SLMForCausalLM(config), optimizer=optimizer or sgd, lr_scheduler=None)


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def run_of(folder: Path, processes: int, strategy: Any, callbacks: Any = (), **kwargs: Any) -> Any:
    settings = {"strategy": strategy, "devices": processes, "use_distributed_sampler": False, "steps": STEPS}
    return trainer(folder, callbacks, **{**settings, **kwargs})


def data(processes: int, batch: int = 4, n: int = STEPS * 4) -> Any:
    """This process's share of each batch of ``batch`` examples."""
    return batches(n=n, batch_size=batch // processes, part=slice(rank(), None, processes))


def losses(folder: Path, processes: int) -> Any:
    """Every option: the losses of all steps and how far the weights are from those of ``one process``."""
    found: dict[str, Any] = {}
    for name, (kind, options) in OPTIONS.items():
        for extra in ({}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}):
            notes = Notes()
            module = make(**BUILT.get(name, {}))
            run = run_of(folder, processes, kind(**options), logger=notes, **extra)
            halves = 2 if extra.get("accumulate_grad_batches") else 1
            run.fit(module, data(processes, batch=4 // halves))
            title = f"{name}, {' '.join(extra) or 'plain'}"
            found[title] = {"losses": [v["train_loss"] for v in notes.steps.values()], "weights": flat(module)}
            if name == "zero 3" and not extra:
                found["sharded"] = {n: tuple(local(p).shape) for n, p in module.named_parameters()}
    return found


class Bytes(Callback):
    """What this process holds, by kind, at the fullest moment of a step that a callback sees."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def _add(self, name: str, tensors: Any) -> None:
        self.found[name] = sum(local(t).numel() * t.element_size() for t in tensors if t is not None)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Forward is done: what zero_stage=3 has given back, 2 still has."""
        self._add("gathered", pl_module.parameters())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Backward is done."""
        self._add("parameters", pl_module.parameters())
        self._add("gradients", [p.grad for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """The states are there."""
        states = trainer.optimizers[0].state.values()
        self._add("states", [v for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.ndim])


def memory(folder: Path, processes: int) -> Any:
    """Bytes on every process, of each stage."""
    stages: dict[str, Any] = {"1": ZeRO1Strategy(), "2": FSDP2Strategy(zero_stage=2), "3": FSDP2Strategy()}
    found = {}
    for stage, strategy in stages.items():
        watch, module = Bytes(), make(optimizer=torch.optim.AdamW)
        whole = sum(p.numel() * 4 for p in module.parameters())
        blocks = sum(p.numel() * 4 for p in module.model.model.layers.parameters())
        run = run_of(folder, processes, strategy, [watch], steps=2)
        run.fit(module, data(processes))
        everywhere = run.strategy.all_gather(torch.tensor(list(watch.found.values())))
        found[stage] = {"whole": whole, "blocks": blocks, **dict(zip(watch.found, everywhere.T.tolist()))}
    return found


def resume(folder: Path, processes: int, strategy: Any, first: int, last: int, name: str, **kwargs: Any) -> Any:
    """Go on from step ``first`` to ``last`` and save; the optimizer's groups are not in the module's order."""
    module = make(optimizer=partial(torch.optim.AdamW, lr=1e-2))
    run = run_of(folder, processes, strategy, steps=last, **kwargs)
    same_again = data(processes, n=4)  # where a loader goes on is the loader's affair: every step sees the same batch
    run.fit(module, same_again, ckpt_path=folder / f"{name}.{first}.ckpt" if first else None)
    run.save_checkpoint(folder / f"{name}.{last}.ckpt")
    return flat(module)


def on_two_first(folder: Path, processes: int) -> Any:
    """The first steps of runs that one process goes on with."""
    for name, options in {"file": {}, "shards": {"save_distributed_checkpoint": True}}.items():
        resume(folder, processes, FSDP2Strategy(**options), 0, 6, name)
    resume(folder, processes, ZeRO1Strategy(), 0, 6, "zero1")
    return None


def on_two_last(folder: Path, processes: int) -> Any:
    """The last steps, and a run that two processes made alone."""
    found = {"straight": resume(folder, processes, FSDP2Strategy(), 0, 18, "straight")}
    for name, options in {"file": {}, "shards": {"save_distributed_checkpoint": True}}.items():
        found[name] = resume(folder, processes, FSDP2Strategy(**options), 12, 18, name)
    found["zero1"] = resume(folder, processes, ZeRO1Strategy(), 12, 18, "zero1")
    found["from one device"] = resume(folder, processes, FSDP2Strategy(), 12, 18, "single")
    return found


class ShardsOfTeacherAndMasks(Callback):
    """Whether teacher and masks are in shards while the student trains."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Any step will do."""
        kd, pruning = trainer.callbacks[:2]
        layer = kd._asked.network.model.layers[0]
        self.teacher = [(local(p).numel(), p.numel()) for p in layer.parameters()]
        masks = pruning._masks
        self.masks = [(keep.numel(), t.weight.numel()) for keep, t in zip(masks._keep, masks.targets)]


def everything_else(folder: Path, processes: int) -> Any:
    """Stages beside fit, a second fit, folders, precision, meta device, clipping by value, teacher and masks."""
    found: dict[str, Any] = {}
    module = make()
    run = run_of(folder, processes, "slm_fsdp2", steps=4)
    run.fit(module, data(processes), data(processes, n=8))
    (found["validate"],) = run.validate(module, data(processes, n=8), verbose=False)
    (found["test"],) = run.test(module, data(processes, n=8), verbose=False)
    found["predict"] = torch.cat(run.predict(module, data(processes, n=8)))
    module.save_pretrained(folder / "hf")
    again = run_of(folder, processes, "slm_fsdp2", steps=4)
    again.fit(module, data(processes))
    found["second fit"] = again.global_step
    plain = SLMForCausalLM.from_pretrained(folder / "hf") if rank() == 0 else None
    found["folder"] = None if plain is None else flat(plain)

    for name, options in {"bf16 weights": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}}.items():
        notes = Notes()
        run_of(folder, processes, FSDP2Strategy(**options), logger=notes).fit(make(), data(processes))
        found[name] = [v["train_loss"] for v in notes.steps.values()]
    notes = Notes()
    run_of(folder, processes, "slm_fsdp2", logger=notes, precision="bf16-mixed").fit(make(), data(processes))
    found["bf16-mixed"] = [v["train_loss"] for v in notes.steps.values()]

    torch.manual_seed(rank())  # not alike
    config = {"model_type": "slm", "vocab_size": VOCABULARY, **SIZES, "pattern": "attn/mlp*2"}
    meta = CausalLM(config, optimizer=sgd, lr_scheduler=None)
    run = run_of(folder, processes, FSDP2Strategy(meta_init=True, zero_stage=3), [was_meta := OnMeta()], steps=1)
    run.fit(meta, data(processes))
    found["meta in parts"] = meta._loss.in_parts
    found["meta"] = {"was meta": was_meta.found, **run.strategy.lightning_module_state_dict()}

    value = make()
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    run_of(folder, processes, "slm_fsdp2", steps=4, **clip).fit(value, data(processes))
    found["clipped by value"] = flat(value)

    watch = ShardsOfTeacherAndMasks()
    pruning = GradualPruning(0.5, group=4, begin=0.0, end=0.1, every=1)
    callbacks = [KnowledgeDistillation(teacher_of("foreign")), pruning, watch]
    run_of(folder, processes, "slm_fsdp2", callbacks, steps=4).fit(ForeignLlama(), data(processes))
    found["teacher"], found["masks"] = watch.teacher, watch.masks
    return found


class OnMeta(Callback):
    """Whether ``configure_model`` built without memory; there is no hook between it and the sharding."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look when the strategy sets up."""
        original = trainer.strategy.setup

        def setup(trainer: Any) -> None:
            self.found = all(p.is_meta for p in pl_module.parameters())
            original(trainer)

        trainer.strategy.setup = setup


class DieAt(Callback):
    """The second process is gone, as if the machine were, after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """All save before."""
        if trainer.global_step == self.step - 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
        if trainer.global_step == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, processes: int) -> Any:
    """A process dies; what the other says."""
    try:
        run_of(folder, processes, "slm_fsdp2", [DieAt(7)]).fit(make(), data(processes))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", [])}


def after_the_kill(folder: Path, processes: int) -> Any:
    """The run goes on from its last checkpoint, beside one that nothing happened to."""
    ends = []
    for path in (None, folder / "last.ckpt"):
        run = run_of(folder, processes, "slm_fsdp2")
        module = make()
        run.fit(module, data(processes), ckpt_path=path)
        run.save_checkpoint(folder / "end.ckpt")
        end = torch.load(folder / "end.ckpt", weights_only=True)
        ends.append({key: end[key] for key in ("state_dict", "optimizer_states", "loops")})
    return differences(*ends)


def optimizers(folder: Path, processes: int) -> Any:
    """Low-bit states, stochastic rounding: where a killed and resumed run differs, and the dtypes of the states."""
    from lightning_slm.modules.low_bit_optimizers import AdamW4bit, AdamW8bit, AdamWFp8

    bf16 = {"precision": "bf16-true"}
    rounding = {"MuonAdamW": partial(MuonAdamW, stochastic_rounding=True)}
    kinds = {"AdamW8bit": AdamW8bit, "AdamW4bit": AdamW4bit, "AdamWFp8": AdamWFp8, **rounding}
    found = {}
    for strategy in ("ddp", "slm_fsdp2", "slm_zero1"):
        for name, kind in kinds.items():

            def module(kind: Any = kind) -> Any:
                return make(optimizer=partial(kind, lr=1e-2), hidden_size=128, intermediate_size=128)

            pair = {"strategy": strategy, "devices": processes, "use_distributed_sampler": False}
            more = bf16 if name == "MuonAdamW" else {}
            loader = partial(data, processes, n=64)
            ends = kill_and_resume(module, list, folder / f"{strategy} {name}", loader, **pair, **more)
            states = ends[0]["optimizer_states"][0]["state"]
            kept = {t.dtype for s in states.values() for t in _tensors(s)}
            found[strategy, name] = {"differences": differences(*map(learned, ends)), "dtypes": sorted(map(str, kept))}
    return found


class ShardedLlama(ForeignLlama):
    """FSDP2 as Lightning's own strategy wants it: written out by the user."""

    def configure_model(self) -> None:
        if not hasattr(self.net, "set_requires_gradient_sync"):
            for part in (*self.net.model.layers, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def lightnings_own(folder: Path, processes: int) -> Any:
    """Every callback, and then BitNet with all it goes with, under Lightning's ModelParallelStrategy."""
    without_fresh_processes()
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    StrategyRegistry.register("halves", ModelParallelStrategy, **sizes)
    pair = {"strategy": "halves", "devices": processes, "use_distributed_sampler": False}
    makers = {name: (partial(lambda case: [case.make("foreign")], case), None) for name, case in EVERY_CALLBACK.items()}
    for name in ("BitNetPrecision", "Float8Precision", "Int8Precision", "Int4Precision"):
        makers[name] = (partial(combinable, "foreign", name), EVERY_PRECISION[name])
    found = {}
    for name, (callbacks, plugin) in makers.items():
        ends = kill_and_resume(ShardedLlama, callbacks, folder / name, plugin=plugin, **pair)
        found[name] = {"differences": differences(*map(comparable, ends)), "state_dict": ends[0]["state_dict"]}
    return found


def _tensors(nest: Any) -> Any:
    if isinstance(nest, dict):
        return [t for value in nest.values() for t in _tensors(value)]
    return [nest] if isinstance(nest, torch.Tensor) else []


def hybrid(folder: Path, processes: int) -> Any:
    """Four processes, two copies of two shards."""
    module = make()
    run_of(folder, processes, FSDP2Strategy(replicas=2)).fit(module, data(processes))
    shapes = {n: (local(p).shape[0], p.shape[0], p.device_mesh.ndim) for n, p in module.named_parameters()}
    return {"weights": flat(module), "shapes": shapes}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, processes, job = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    result = globals()[job](folder, processes)
    if rank() == 0:
        torch.save(result, folder / f"{job}.pt")
    if job != "killed":  # where there is nobody left to leave with
        leave_together()
