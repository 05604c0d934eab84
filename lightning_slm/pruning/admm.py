"""ADMM pruning: the weights that stay are fitted to the layer's outputs by alternating directions (Boza 2024,
https://arxiv.org/abs/2401.02938).

Two copies of the weight take turns: one is free and pulled to the least squares of the outputs, one has the zeros; the
difference between them is summed up and pushes them together. Every turn is one product with a matrix that is inverted
once. Inputs are brought to norm 1 first, so that a weight's size is what it is worth (Wanda's score), and the zeros are
chosen anew in the first turns, more and more of them, by the sizes of what has been fitted so far.

Shape letters: O = outputs of a layer, I = its inputs.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_slm.calibration import InputGram
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.least_squares import OncePerInput, cholesky_damped
from lightning_slm.pruning.masks import prune_masks
from lightning_slm.pruning.one_shot import Pruned, Sparsity, Task, prune_block_after_block_
from lightning_slm.pruning.schedules import cubic_sparsity
from lightning_slm.pruning.selection import lowest, lowest_of_groups

_PENALTY = 1.0  # on the difference of the two copies; the published one, for inputs of norm 1


def admm_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: Sparsity = 0.5,
    group: int | None = None,
    budget: Literal["row", "layer"] = "layer",
    iterations: int = 20,
    mask_iterations: int = 15,
    damping: float = 0.1,
    targets: Patterns = "*",
    skip: Patterns = (),
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Pruned]:
    """Prune in place, block after block, and fit the weights that stay so that each layer's outputs stay.

    Args:
        model: any module; which of its weights are meant, `weight_targets` says.
        batches: calibration data; 16 to 128 sequences are usual. What a batch may be, `run_model` says.
        sparsity: share of the weights to set to zero, between 0 and 1; or shares by name pattern, of which the first
            that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: "layer": the same share of each layer's weights, as published; "row": of each output's.
        iterations: turns.
        mask_iterations: in so many of them zeros are chosen; 0: once, those of Wanda's smallest scores.
        damping: share of the mean square of the (normalised) inputs that is added to each of them: how much the weights
            shall stay near what they were.
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
            finite (names it), or arguments out of range.
    """
    check_turns(iterations, mask_iterations, damping)
    own: dict[str, Any] = {"iterations": iterations, "mask_iterations": mask_iterations}
    factors = OncePerInput(partial(inverted, damping=damping))
    return prune_block_after_block_(
        model,
        batches,
        partial(_admm, factors=factors, budget=budget, **own),
        InputGram,
        sparsity=sparsity,
        group=group,
        targets=targets,
        skip=skip,
        blocks=blocks,
        run=run,
        folder=folder,
        about={**own, "budget": budget, "damping": damping},
        progress=progress,
    )


def _admm(task: Task, factors: OncePerInput["Inverted"], budget: Literal["row", "layer"], **own: int) -> Tensor:
    zeros = partial(_zeros, sparsity=task.sparsity, group=task.group, budget=budget)
    return admm_weights(task.weight_OI, factors(task), zeros, **own)


def check_turns(iterations: int, mask_iterations: int, damping: float) -> None:
    """Refuse what is no number of turns."""
    if not 0 <= mask_iterations <= iterations or iterations < 1:
        raise ValueError(
            f"iterations={iterations} and mask_iterations={mask_iterations}: zeros are chosen in the first of at least "
            "1 turns, so give 0 <= mask_iterations <= iterations; 20 and 15 are usual."
        )
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be a share of the inputs' mean square, 0 or more; 0.1 is usual.")


class Inverted(NamedTuple):
    """What every turn needs of a layer's inputs.

    Attributes:
        inverse_II: of the damped Gram matrix of the normalised inputs plus the penalty, times the penalty.
        norm_I: norms of the inputs; 1 where an input was always zero.
    """

    inverse_II: Tensor
    norm_I: Tensor


def inverted(inputs: InputGram, name: str, damping: float) -> Inverted:
    """Normalise, damp and invert."""
    norm_I = inputs.energy_I.sqrt()
    norm_I.masked_fill_(norm_I == 0, 1.0)
    gram_II = inputs.gram_II / norm_I
    gram_II.div_(norm_I[:, None])
    share = gram_II.diagonal().mean().item() or 1.0  # below 1 by the share of dead inputs
    factor_II = cholesky_damped(gram_II, damping + _PENALTY / share, name)
    del gram_II
    return Inverted(torch.cholesky_inverse(factor_II).mul_(_PENALTY), norm_I)


def admm_weights(
    weight_OI: Tensor,
    factor: Inverted,
    zeros: Callable[[Tensor, float], Tensor],
    iterations: int = 20,
    mask_iterations: int = 15,
) -> Tensor:
    """The pruned and fitted weight of one layer, (O, I), float32.

    In the letters of the paper: U, the sum of differences, is what the mask takes of V = W + U, so V alone is carried
    from turn to turn.

    Args:
        zeros: gets sizes (I, O) and how far to go (0 to 1); returns what is to be zero, (I, O).
    """
    weight_IO = weight_OI.T * factor.norm_I[:, None]
    v_IO = weight_IO.clone()
    mask_IO = zeros(v_IO.abs(), 1.0) if mask_iterations == 0 else torch.zeros_like(v_IO, dtype=torch.bool)
    for turn in range(iterations):
        if turn < mask_iterations:
            mask_IO = zeros(v_IO.abs(), cubic_sparsity((turn + 1) / mask_iterations, 0.0, 1.0))
        u_IO = v_IO * mask_IO
        pull_IO = v_IO.sub_(u_IO, alpha=2).sub_(weight_IO)  # Z - U - W_0, where Z = V - U
        v_IO = u_IO.add_(weight_IO).addmm_(factor.inverse_II, pull_IO)
    return v_IO.masked_fill_(mask_IO, 0).div_(factor.norm_I[:, None]).T


def _zeros(
    sizes_IO: Tensor, ramp: float, sparsity: float, group: int | None, budget: Literal["row", "layer"]
) -> Tensor:
    """On the way to N:M, the lowest of those that would go in the end."""
    if group is not None:
        pruned_IO = lowest_of_groups(sizes_IO, round(sparsity * group), group)
        if ramp == 1.0:
            return pruned_IO
        sizes_IO = sizes_IO.masked_fill_(~pruned_IO, torch.inf)
    if budget == "layer":
        return lowest(sizes_IO, round(ramp * sparsity * sizes_IO.numel()))
    (mask_OI,) = prune_masks([sizes_IO.T], sparsity, budget="row", ramp=ramp)
    return mask_OI.T
