"""Wanda: a weight matters as much as it is large and its input is (Sun et al. 2023,
https://arxiv.org/abs/2306.11695).
"""

# Shape letters: O = outputs of a layer, I = its inputs.

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_slm.calibration import InputNorms, Layer
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.masks import Budget, prune_masks
from lightning_slm.pruning.one_shot import Pruned, Sparsity, Task, look_at_dense, prune_block_after_block_


def wanda_scores(weight_OI: Tensor, norm_I: Tensor) -> Tensor:
    """What a weight is worth: its size times the norm of its input over the calibration tokens, (O, I), float32."""
    return weight_OI.detach().float().abs() * norm_I


def wanda_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: Sparsity = 0.5,
    group: int | None = None,
    budget: Budget = "row",
    targets: Patterns = "*",
    skip: Patterns = (),
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Pruned]:
    """Set the weights of least worth to zero, in place, block after block; the others stay as they are.

    Args:
        model: any module; which of its weights are meant, `weight_targets` says.
        batches: calibration data; 16 to 128 sequences are usual. What a batch may be, `run_model` says.
        sparsity: share of the weights to set to zero, between 0 and 1; or shares by name pattern, of which the first
            that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: "row": the same share of each output's weights, as published; "layer": of each layer's; "global": the
            lowest scores of the dense model wherever they are say how much of each layer goes.
        targets: name patterns of what to prune.
        skip: name patterns of what to leave out again.
        blocks: name patterns of the repeated blocks; "auto" finds them.
        run: runs the model on a batch, where `run_model` does not know how.
        folder: finished blocks are kept there, so that a killed run goes on after them.
        progress: whether a bar is shown.

    Returns:
        What became of every pruned weight, by its name.

    Raises:
        ValueError: a pattern that matches nothing, a group that does not fit a layer, no batches, inputs that are not
            finite; names it.
    """
    held = list(batches)
    within: Literal["row", "layer"] = "row" if budget == "row" else "layer"
    if budget == "global":
        sparsity = global_shares(
            model, held, sparsity, group, targets=targets, skip=skip, blocks=blocks, run=run, progress=progress
        )
    return prune_block_after_block_(
        model,
        held,
        partial(_solve, budget=within),
        InputNorms,
        sparsity=sparsity,
        group=group,
        targets=targets,
        skip=skip,
        blocks=blocks,
        run=run,
        folder=folder,
        about={"budget": within},
        progress=progress,
    )


def global_shares(
    model: nn.Module, batches: Iterable[Any], sparsity: Sparsity, group: int | None = None, **way: Any
) -> dict[str, float]:
    """The share of each layer that goes if the lowest scores of the dense model go wherever they are.

    Memory: the scores, 4 bytes for each weight.

    Args:
        model: it stays as it is.
        way: ``targets``, ``skip``, ``blocks``, ``run``, ``progress``, as of `wanda_`.

    Raises:
        ValueError: shares by pattern, a group, or a layer whose inputs are not known.
    """
    if isinstance(sparsity, Mapping) or group is not None:
        what = f"sparsity={sparsity!r}" if group is None else f"group={group}"
        raise ValueError(f'budget="global" settles how much of each layer goes, so it cannot stand beside {what}.')
    scores: dict[str, Tensor] = {}

    def look(_: str, layers: list[Layer]) -> dict[str, Tensor]:
        for layer in layers:
            if layer.inputs is None:
                raise ValueError(
                    f"{layer.name!r} is read without being called: nothing is known of its inputs, so it cannot "
                    'compete with other layers; skip it, or choose budget="layer".'
                )
            scores[layer.name] = wanda_scores(layer.weight_OI, layer.inputs.energy_I.sqrt())
        return {}

    look_at_dense(model, batches, look, sparsity=sparsity, **way)
    masks = prune_masks(list(scores.values()), sparsity, budget="global")
    return {name: mask.float().mean(dtype=torch.float64).item() for name, mask in zip(scores, masks)}


def _solve(task: Task, budget: Literal["row", "layer"]) -> Tensor:
    scores = wanda_scores(task.weight_OI, task.inputs.rms_I)
    (mask_OI,) = prune_masks([scores], task.sparsity, group=task.group, budget=budget)
    return task.weight_OI.masked_fill_(mask_OI, 0)
