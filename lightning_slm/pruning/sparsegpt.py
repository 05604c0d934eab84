"""SparseGPT: prune a layer input by input, and let the inputs still to come make up for it (Frantar & Alistarh 2023,
https://arxiv.org/abs/2301.00774).

Changing a row of weights by d changes its outputs by X d, whose squared length is d H d^T with the Gram matrix
H = X^T X. Write H = R R^T with an upper triangular R: then it is the sum of (d R)_k^2, and its k-th part knows no input
after the k-th. So go from input to input. A weight that is kept can make its own part zero, whatever was done before:
that is the update. A pruned weight cannot; its part is (its current value * R_kk)^2: that is its score. The paper says
the same with the inverse of H, since 1 / R_kk^2 is the k-th of its pivots; the weights are equal, and one
factorisation is enough instead of a factorisation, an inverse and the factorisation of that.

Shape letters: O = outputs of a layer, I = its inputs, S = inputs of a span (a block, a group).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_slm.calibration import InputGram
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.least_squares import OncePerInput, cholesky_damped
from lightning_slm.pruning.masks import prune_mask
from lightning_slm.pruning.one_shot import Pruned, Sparsity, Task, prune_block_after_block_
from lightning_slm.pruning.selection import lowest, lowest_of_groups

_COLUMNS = 8  # so many inputs are done one by one; what they ask of the others is handed on by matrix products


def sparsegpt_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: Sparsity = 0.5,
    group: int | None = None,
    budget: Literal["row", "layer"] = "layer",
    block_size: int = 128,
    damping: float = 0.01,
    targets: Patterns = "*",
    skip: Patterns = (),
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Pruned]:
    """Prune in place, block after block, and change the weights that stay so that each layer's outputs stay.

    Args:
        model: any module; which of its weights are meant, `weight_targets` says.
        batches: calibration data; 16 to 128 sequences are usual. What a batch may be, `run_model` says.
        sparsity: share of the weights to set to zero, between 0 and 1; or shares by name pattern, of which the first
            that matches counts.
        group: consecutive inputs of which ``sparsity * group`` go (2:4 is ``sparsity=0.5, group=4``); None: no pattern.
        budget: without ``group``. "layer": the same share of every ``block_size`` inputs of a layer, as published;
            "row": of each output's.
        block_size: without ``group``, so many inputs are chosen from at a time; fewer see later what was made up for,
            more compete with each other.
        damping: share of the mean square of the inputs that is added to each of them. It is raised, with a warning,
            where the inputs say too little.
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
    check_sweep(block_size, damping)
    own: dict[str, Any] = {"budget": budget, "block_size": block_size}
    factors = OncePerInput(partial(factorised, damping=damping))
    return prune_block_after_block_(
        model,
        batches,
        partial(_sparsegpt, factors=factors, **own),
        InputGram,
        sparsity=sparsity,
        group=group,
        targets=targets,
        skip=skip,
        blocks=blocks,
        run=run,
        folder=folder,
        about={**own, "damping": damping},
        progress=progress,
    )


def _sparsegpt(task: Task, factors: OncePerInput["Factorised"], **own: Any) -> Tensor:
    return sparsegpt_weights(task.weight_OI, factors(task), task.sparsity, group=task.group, **own)


def check_sweep(block_size: int, damping: float) -> None:
    """Refuse what no sweep can be made with."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 input; 128 is usual.")
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be a share of the inputs' mean square, 0 or more; 0.01 is usual.")


class Factorised(NamedTuple):
    """The Gram matrix of a layer's inputs, as a sweep over them wants it.

    Attributes:
        answer_II: lower triangular with a diagonal of ones, R^T with row k divided by R_kk: how much input k gives for
            a change of an input before it.
        weight_I: R_kk: what a change of input k costs for which nothing before it and after it makes up.
        dead_I: True where an input was always zero.
    """

    answer_II: Tensor
    weight_I: Tensor
    dead_I: Tensor


def factorised(inputs: InputGram, name: str, damping: float) -> Factorised:
    """Factorise; an input that was always zero is put in for an average one that is related to no other.

    Upper times lower triangular is what Cholesky's lower times upper is, read from the other end.
    """
    dead_I = inputs.energy_I == 0
    reversed_II = inputs.gram_II.flip(0, 1)
    alive = (~dead_I).sum().clamp_min(1)
    reversed_II.diagonal().add_(dead_I.flip(0) * (inputs.energy_I.sum() / alive))
    if dead_I.all():
        reversed_II.fill_diagonal_(1.0)
    factor_II = cholesky_damped(reversed_II, damping, name)
    del reversed_II  # two matrices at a time, beside the Gram matrix
    answer_II = factor_II.T.flip(0, 1)
    weight_I = answer_II.diagonal().clone()
    return Factorised(answer_II.div_(weight_I[:, None]), weight_I, dead_I)


def sparsegpt_weights(
    weight_OI: Tensor,
    factor: Factorised,
    sparsity: float,
    *,
    group: int | None = None,
    budget: Literal["row", "layer"] = "layer",
    block_size: int = 128,
) -> Tensor:
    """The pruned and updated weight of one layer, (O, I), float32; see `sparsegpt_` for the arguments.

    Without ``group`` exactly ``sparsity * O * I`` weights go, and as many as it takes of dead inputs.
    """
    weight_IO = weight_OI.T.contiguous()
    weight_IO[factor.dead_I] = 0
    sweep = _Sweep(weight_IO, weight_IO.new_zeros(weight_IO.shape), factor)
    if group is not None:
        choose = partial(_of_group, count=round(sparsity * group))
    else:
        choose = partial(_of_row if budget == "row" else _of_block, sparsity=sparsity)

    def span(start: int, stop: int) -> None:
        scores_SO = sweep.current(start, stop).mul_(factor.weight_I[start:stop, None]).abs_()
        pruned = choose(scores_SO, start).unbind()
        sweep.in_halves(start, stop, _COLUMNS, lambda a, b: sweep.columns(a, b, pruned[a - start : b - start]))

    sweep.in_halves(0, len(weight_IO), group or block_size, span)
    return weight_IO.sub_(sweep.lost_IO).T


class _Sweep:
    """One layer on its way from the first input to the last.

    Attributes:
        weight_IO: as it was.
        lost_IO: what is taken from it; beyond the inputs that are done, what those ask for so far.
    """

    def __init__(self, weight_IO: Tensor, lost_IO: Tensor, factor: Factorised) -> None:
        self.weight_IO, self.lost_IO, self.answer_II = weight_IO, lost_IO, factor.answer_II
        self._weight, self._lost, self._answer = weight_IO.unbind(), lost_IO.unbind(), factor.answer_II.unbind()

    def current(self, start: int, stop: int) -> Tensor:
        """What the weights of a span would become if all of them were kept, (S, O)."""
        answer_SS, asked_SO = self.answer_II[start:stop, start:stop], self.lost_IO[start:stop]
        # Transposed, since what LAPACK returns stands column by column.
        lost_OS = torch.linalg.solve_triangular(answer_SS.T, asked_SO.T, upper=True, left=False, unitriangular=True)
        return self.weight_IO[start:stop] - lost_OS.T

    def in_halves(self, start: int, stop: int, step: int, work: Callable[[int, int], None]) -> None:
        """Do ``work`` in steps; what the first half of them asks of the second is passed on as a whole."""
        steps = -(-(stop - start) // step)
        if steps <= 1:
            work(start, stop)
            return
        middle = start + steps // 2 * step
        self.in_halves(start, middle, step, work)
        ask_II = self.answer_II[middle:stop, start:middle]
        self.lost_IO[middle:stop].addmm_(ask_II, self.lost_IO[start:middle], alpha=-1)
        self.in_halves(middle, stop, step, work)

    def columns(self, start: int, stop: int, pruned: Sequence[Tensor]) -> None:
        """Inputs one by one: a pruned weight is lost whole; a kept one makes its own part of the error zero."""
        done_OI = self.lost_IO[start:stop].T
        for i, (weight_O, lost_O, answer_I, pruned_O) in enumerate(
            zip(self._weight[start:stop], self._lost[start:stop], self._answer[start:stop], pruned)
        ):
            if i:
                lost_O.addmv_(done_OI[:, :i], answer_I[start : start + i], alpha=-1)
            torch.where(pruned_O, weight_O, lost_O, out=lost_O)


def _of_group(scores_SO: Tensor, start: int, count: int) -> Tensor:
    return lowest_of_groups(scores_SO, count, group=len(scores_SO))


def _of_block(scores_SO: Tensor, start: int, sparsity: float) -> Tensor:
    """Counts of blocks are rounded so that they add up to that of the layer."""
    inputs, outputs = scores_SO.shape
    return lowest(scores_SO, round(sparsity * outputs * (start + inputs)) - round(sparsity * outputs * start))


def _of_row(scores_SO: Tensor, start: int, sparsity: float) -> Tensor:
    inputs = len(scores_SO)
    count = round(sparsity * (start + inputs)) - round(sparsity * start)
    return prune_mask(scores_SO.T, count / inputs, group=inputs).T
