"""What all one-shot solvers have in common: which weights, how many of each, block after block on calibration data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_slm.calibration import InputGram, InputNorms, Layer, Statistic, calibrate_
from lightning_slm.calibration.blockwise import Compress
from lightning_slm.nn.sharded import whole
from lightning_slm.nn.targets import Patterns, Target, matches, weight_targets
from lightning_slm.pruning.masks import check_targets

# The same share everywhere, or shares by name pattern (0: this layer stays), of which the first that matches counts.
Sparsity = float | Mapping[str, float]


class Pruned(NamedTuple):
    """What became of one weight matrix.

    Attributes:
        sparsity: share of zeros.
        error: squared error of the layer's outputs on the calibration inputs, as a share of their squares; NaN where
            the method does not know the inputs' correlations.
        dead: inputs that were zero in all of the calibration data; their weights count for nothing.
        seen: False if the layer was never called with any input, so that its weights were judged by themselves.
    """

    sparsity: float
    error: float
    dead: int
    seen: bool


@dataclass(frozen=True)
class Task:
    """What a solver is given: a layer, and what is asked for. ``weight_OI`` is its to change, float32."""

    name: str
    weight_OI: Tensor
    inputs: Statistic
    sparsity: float
    group: int | None


Solver = Callable[[Task], Tensor]  # returns the new weight (O, I), with its zeros


def prune_block_after_block_(
    model: nn.Module,
    batches: Iterable[Any],
    solver: Solver,
    statistic: type[Statistic],
    *,
    sparsity: Sparsity,
    group: int | None,
    targets: Patterns,
    skip: Patterns,
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Pruned]:
    """Prune a model in place; see `wanda_` for the arguments, `calibrate_` for the way.

    Args:
        about: further arguments of the solver, as plain values: a ``folder`` where others were used is refused.

    Raises:
        ValueError: a pattern that matches nothing, a group that does not fit a layer, no calibration data, or inputs
            that are not finite; names the layer.
    """
    chosen = weight_targets(model, targets, skip)
    shares = shares_of(chosen, sparsity, group)
    results: dict[str, Pruned] = {}

    def compress(block: str, layers: list[Layer]) -> dict[str, Tensor]:
        return {layer.name: _solved(layer, shares[layer.name], group, solver, statistic, results) for layer in layers}

    name = getattr(solver, "func", solver)  # what a functools.partial calls
    told = {"solver": name.__qualname__, "sparsity": shares, "group": group, **(about or {})}
    way = {"blocks": blocks, "run": run, "folder": folder, "about": told, "progress": progress}
    calibrate_(model, batches, chosen, compress, statistic, **way)  # type: ignore[arg-type]
    for t in chosen:  # of blocks that an earlier, killed call had finished
        results.setdefault(t.name, Pruned(zeros_of(t), math.nan, 0, True))
    return {t.name: results[t.name] for t in chosen}


def look_at_dense(
    model: nn.Module,
    batches: Iterable[Any],
    look: Compress,
    *,
    sparsity: float,
    targets: Patterns = "*",
    skip: Patterns = (),
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> list[Target]:
    """Show every block of the unchanged model and its inputs' norms to ``look``, which returns no new weights.

    Returns: the targets.
    """
    chosen = weight_targets(model, targets, skip)
    check_targets(chosen, sparsity)
    calibrate_(model, batches, chosen, look, InputNorms, blocks=blocks, run=run, progress=progress)
    return chosen


def shares_of(targets: Sequence[Target], sparsity: Sparsity, group: int | None) -> dict[str, float]:
    """The sparsity of each target.

    Raises:
        ValueError: a share outside of (0, 1) (by pattern, of [0, 1]), a group that does not fit, a pattern that matches
            nothing, or a target that no pattern names.
    """
    if not isinstance(sparsity, Mapping):
        check_targets(targets, sparsity, group)
        return {t.name: float(sparsity) for t in targets}
    unused, shares = dict(sparsity), dict[str, float]()
    for target in targets:
        fitting = [p for p in sparsity if matches(target.name, p) or matches(target.module_name, p)]
        if not fitting:
            raise ValueError(f"sparsity names no share for {target.name!r}; add a pattern for it, or skip it.")
        unused.pop(fitting[0], None)
        shares[target.name] = share = float(sparsity[fitting[0]])
        if share not in (0.0, 1.0):  # all or nothing needs no group
            check_targets([target], share, group)
    check_targets(targets, 0.5)
    if unused:
        raise ValueError(f"sparsity: {', '.join(map(repr, unused))} is the first match of no weight that is pruned.")
    return shares


def zeros_of(target: Target) -> float:
    """The share of zeros in a weight; of a sharded one, all ranks must call this."""
    return (whole(target.weight.detach()) == 0).float().mean().item()


def _solved(
    layer: Layer,
    share: float,
    group: int | None,
    solver: Solver,
    statistic: type[Statistic],
    results: dict[str, Pruned],
) -> Tensor:
    weight = layer.weight_OI.float()
    inputs = layer.inputs or _equal_inputs(weight, statistic)
    if not inputs.energy_I.isfinite().all():
        raise ValueError(
            f"{layer.name!r}: its inputs are not finite on the calibration data (NaN or inf); look for a layer before "
            "it that overflows, or calibrate in float32 or bfloat16."
        )
    if share in (0.0, 1.0):
        new = weight * (1.0 - share)
    else:
        new = solver(Task(layer.name, weight.clone(), inputs, share, group))
    new = new.to(layer.weight_OI.dtype)
    results[layer.name] = Pruned(
        sparsity=(new == 0).float().mean().item(),
        error=_relative_error(weight, new.float(), inputs),
        dead=int((inputs.energy_I == 0).sum()),
        seen=layer.inputs is not None,
    )
    return new


def _equal_inputs(weight_OI: Tensor, statistic: type[Statistic]) -> Statistic:
    """For a layer that is read but not called (in nn.MultiheadAttention): as if all its inputs were alike."""
    inputs = statistic(weight_OI.shape[1], weight_OI.device)
    inputs.update(torch.eye(weight_OI.shape[1], device=weight_OI.device))
    return inputs


def _relative_error(old_OI: Tensor, new_OI: Tensor, inputs: Statistic) -> float:
    if not isinstance(inputs, InputGram):
        return math.nan
    lost = old_OI - new_OI
    squares = [((w @ inputs.gram_II) * w).sum().item() for w in (lost, old_OI)]
    return squares[0] / squares[1] if squares[1] > 0 else 0.0
