"""Compress a model block after block, each on what its already compressed predecessors give it.

One block's statistics are held at a time, and what the model's forward holds between two blocks, for all calibration
batches: with N tokens, N * D activations; once more N * D where its embeddings stay in a variable of it (Hugging Face's
decoders); and the masks and rotations that it makes for each batch. `InputGram` takes I * I floats for each distinct
input of the block's layers, `InputNorms` I. None of it grows with the number of blocks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_slm.calibration.finished import Finished
from lightning_slm.calibration.passes import ForwardPass, Lockstep, halting_at
from lightning_slm.calibration.run import mask_of, run_model, unshared
from lightning_slm.calibration.statistics import Statistic, over_ranks
from lightning_slm.calibration.watch import Watch
from lightning_slm.measure.quality import evaluating
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.sharded import local, part_for, plain_copy, whole
from lightning_slm.nn.targets import Patterns, Target


@dataclass(frozen=True)
class Layer:
    """A weight to compress, whole, and what is known of its inputs."""

    name: str  # of the parameter in the model
    weight_OI: Tensor  # one row per output, in the weight's dtype; a copy
    inputs: Statistic | None  # None: its module was never called with any


# Gets the layers of one block, returns the new weights (O, I) by name; those it leaves out stay.
Compress = Callable[[str, list[Layer]], Mapping[str, Tensor]]


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    compress: Compress,
    statistic: type[Statistic],
    *,
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Let every calibration batch come to a block, look at its layers' inputs, compress it, go on to the next.

    A block that is run several times with the same weights is compressed at its last run, on the inputs of all. A layer
    outside of any block is a block of its own. Ranks add up their statistics, each with batches of its own, and
    compress alike.

    Args:
        model: any module; it runs in evaluation mode, without caches.
        batches: see `run_model`; all are held.
        targets: the weights to compress.
        compress: see `Compress`.
        statistic: what ``compress`` wants to know about inputs.
        blocks: see `repeated_blocks`; where there are none, each layer is one.
        run: runs the model on a batch; None: `run_model`.
        folder: finished blocks are kept there, and a later call with the same model and batches goes on after them;
            None: nowhere.
        about: what ``compress`` does, as plain values: a folder where something else was done is refused.
        progress: whether a bar is shown.

    Raises:
        ValueError: no batch, batches that take different ways through the model (on one rank or on several), or a
            folder of another model.
    """
    held = list(batches)
    units = _units(model, targets, blocks)
    _check_batches(len(held), any(unit.sharded for unit in units.values()))
    done = Finished(folder, {name: unit.weights for name, unit in units.items()}, about or {})
    way = run or (lambda batch: run_model(model, batch))
    device = next(model.parameters()).device.type
    # Lightning validates in inference mode, whose tensors could not be changed in the threads of the passes.
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), _plain(model):
        scout, *passes = [ForwardPass(lambda x=x: way(unshared(x)), device) for x in (held[0], *held)]  # type: ignore[misc]
        with halting_at({name: unit.module for name, unit in units.items()}) as forward:
            work = _Work(units, forward, compress, statistic, done, _sharded_around(model, units))
            work.count_runs(scout)
            work.go(passes, [mask_of(batch) for batch in held], progress)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what was gathered before is out of date


def _check_batches(count: int, sharded: bool) -> None:
    counts = over_ranks(count)
    if not all(counts):
        raise ValueError("there is no calibration batch: give a few (16 to 128 sequences are usual).")
    if sharded and len(set(counts)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, counts))} calibration batches, but gather the sharded weights in "
            "every forward pass together: give each rank as many."
        )


@dataclass(frozen=True)
class _Unit:
    """A block that holds targets, or a target outside of any."""

    name: str
    module: nn.Module
    targets: list[Target]
    weights: dict[str, Tensor]  # by target name, as they were before anything was gathered

    @property
    def sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.weights.values())

    def write_(self, targets: Sequence[Target], new: Mapping[str, Tensor]) -> None:
        """Write new weights (O, I) where the block has them, and where those that compute it have them."""
        for target in (t for t in targets if t.name in new):
            weight = new[target.name] if target.input_dim == 1 else new[target.name].T
            original = self.weights[target.name]
            target.weight.copy_(weight)
            local(original).copy_(part_for(weight.contiguous().to(target.weight.device), original))


def _units(model: nn.Module, targets: Sequence[Target], blocks: Patterns) -> dict[str, _Unit]:
    owner = {id(m): (name, block) for name, block in repeated_blocks(model, blocks) for m in block.modules()}
    found: dict[str, tuple[nn.Module, list[Target]]] = {}
    for target in targets:
        name, module = owner.get(id(target.module), (target.module_name, target.module))
        found.setdefault(name, (module, []))[1].append(target)
    return {n: _Unit(n, module, held, {t.name: t.weight for t in held}) for n, (module, held) in found.items()}


def _sharded_around(model: nn.Module, units: Mapping[str, _Unit]) -> list[FSDPModule]:
    """What the passes stand within while they stand at a block."""
    inside = {id(m) for unit in units.values() for m in unit.module.modules()}
    sharded = (m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in inside)
    return [m for m in sharded if any(id(part) in inside for part in m.modules())]


class _Work:
    """What is done where all passes stand, and how often they will still come there."""

    def __init__(
        self,
        units: Mapping[str, _Unit],
        forward: Mapping[str, Callable[..., Any]],
        compress: Compress,
        statistic: type[Statistic],
        done: Finished,
        around: Sequence[FSDPModule],
    ) -> None:
        self.units, self.forward, self.compress, self.done, self.around = units, forward, compress, done, around
        self.watches = {name: Watch(unit.targets, statistic) for name, unit in units.items()}
        self.left: Counter[str] = Counter()

    def count_runs(self, scout: ForwardPass) -> None:
        """How often each block is run in a pass. The pass is run to its end, for sharded models want that."""
        with Lockstep([scout]) as one:
            one.start()
            while one.calls[0] is not None:
                name = one.block
                self.left[name] += 1
                one.advance(self.forward[name])
        if any(other != self.left for other in over_ranks(self.left)):
            raise ValueError("calibration batches take other ways through the model on other ranks; give one kind.")

    def go(self, passes: Sequence[ForwardPass], masks: Sequence[Tensor | None], progress: bool) -> None:
        """From block to block; then those that no batch comes to."""
        unseen = [name for name in self.units if name not in self.left]
        to_the_end = any(unit.sharded for unit in self.units.values())  # FSDP2 counts on the end of a pass
        with Lockstep(passes, self.around) as all_passes:
            all_passes.start()
            for _ in track(range(self.left.total()), "calibrating", disable=not progress, transient=True):
                self._visit(all_passes, masks, to_the_end)
        for name in unseen:
            self._compress_(self.units[name], self.units[name].targets, seen=False)

    def _visit(self, passes: Lockstep, masks: Sequence[Tensor | None], to_the_end: bool) -> None:
        unit = self.units[passes.block]
        self.left[unit.name] -= 1
        module, function, targets = _computing(unit, self.forward[unit.name])
        if unit.name not in self.done:
            self._watch(passes, masks, module, function, targets)
        if not self.left[unit.name]:
            self._compress_(unit, targets, seen=True)
        if to_the_end or self.left.total():
            passes.advance(function)

    def _watch(
        self,
        passes: Lockstep,
        masks: Sequence[Tensor | None],
        module: nn.Module,
        function: Callable[..., Any],
        targets: list[Target],
    ) -> None:
        watch = self.watches[passes.block]
        watch.targets = targets

        def watched(*args: Any, **kwargs: Any) -> None:
            watch.see(module, args, kwargs)  # if it is a layer itself: no hook sees its forward
            function(*args, **kwargs)

        for call, mask in zip(passes.calls, masks):
            assert call is not None
            with watch.on(mask):
                call.run(watched, again=True)

    def _compress_(self, unit: _Unit, targets: Sequence[Target], seen: bool) -> None:
        """Get the new weights of a block and write them.

        Args:
            targets: its weights, or those of its copy.
            seen: False: the layers of the block are read, but never called.
        """
        watch = self.watches.pop(unit.name)  # its statistics end here
        if unit.name in self.done:
            new = self.done.weights(unit.name)
        else:
            if seen:
                watch.reduce_()
            new = self.compress(unit.name, [Layer(t.name, _as_OI(t), watch.of(t)) for t in targets])
            self.done.keep(unit.name, new)
        unit.write_(targets, new)


def _computing(unit: _Unit, own: Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any], list[Target]]:
    """What computes a block: itself, its forward and its targets; of a sharded one, those of a whole copy."""
    if not unit.sharded:
        return unit.module, own, unit.targets
    copy = plain_copy(unit.module)
    assert copy is not None
    where = {id(module): name for name, module in unit.module.named_modules()}
    targets = [Target(t.name, copy.get_submodule(where[id(t.module)]), t.attribute, t.input_dim) for t in unit.targets]
    return copy, copy.forward, targets


def _as_OI(target: Target) -> Tensor:
    weight = whole(target.weight.detach())
    return (weight if target.input_dim == 1 else weight.T).clone()


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Without caches of keys and values (a block is run twice), uncompiled (a halted pass cannot be traced), and
    without torch's fused encoder layer, which reads the weights of its sub-modules instead of calling them.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for config in cached:
        config.use_cache = False
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for config in cached:
            config.use_cache = True
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation
