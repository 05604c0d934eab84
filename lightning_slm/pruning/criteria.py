"""What a weight is worth while it trains: by its size, and by what the steps since then have shown.

A criterion looks once at each optimizer step (`see`) and answers whenever asked (`scores`). Under sharding it keeps
this rank's part; what it saves is whole, so that a run resumes bit for bit on any number of ranks.
"""

# Shape letters: O = outputs of a layer, I = its inputs.

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_slm.errors import near
from lightning_slm.nn.sharded import as_shard_of, gathered, local, part_for, whole
from lightning_slm.nn.targets import Target
from lightning_slm.pruning.magnitude import magnitude_scores
from lightning_slm.pruning.masks import Budget
from lightning_slm.pruning.movement import movement_step, taylor_step
from lightning_slm.pruning.wanda import wanda_scores


class Magnitude:
    """The size of the weight as it is; nothing has to be seen (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

    budget: Budget = "layer"  # which weights the paper compares

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)

    def is_ready(self, steps: int) -> bool:
        """Whether it has seen ``steps`` steps, if it needs to see any."""
        return True

    def watch(self) -> Callable[[], None]:
        """Hooks for what gradients do not tell; the returned function takes them off."""
        return lambda: None

    def see(self) -> None:
        """Look at the gradients of one step, before the weights move; all ranks must call this."""

    def scores(self, target: Target) -> Tensor:
        """What each weight is worth, in the weight's own layout, whole; all ranks must call this."""
        return magnitude_scores(whole(target.weight))

    def forget(self) -> None:
        """Begin anew, after weights went."""

    def state_dict(self) -> dict[str, Any]:
        """What was seen: plain numbers and whole tensors; all ranks must call this."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class _Seeing(Magnitude):
    """Keeps one sum over the steps for each target."""

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def is_ready(self, steps: int) -> bool:
        return self.steps >= steps

    def forget(self) -> None:
        self.steps, self.sums = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": gathered(self._whole_sums(), keep=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.sums = {t.name: self._part(state["sums"][t.name], t) for t in self.targets if t.name in state["sums"]}

    def _whole_sums(self) -> dict[str, Tensor]:
        return {t.name: as_shard_of(self.sums[t.name], t.weight) for t in self.targets if t.name in self.sums}

    def _part(self, tensor: Tensor, target: Target) -> Tensor:
        return part_for(tensor.to(target.weight.device), target.weight).clone()


class _ByGradient(_Seeing):
    """Sums up a function of weight and gradient."""

    step: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        frozen = [t.name for t in targets if not t.weight.requires_grad]
        if frozen:
            raise ValueError(
                f"{frozen[0]!r} is frozen, so it has no gradient to be judged by; skip it, or choose the criterion "
                "'magnitude' or 'wanda'."
            )

    def see(self) -> None:
        self.steps += 1
        for target in self.targets:
            if target.weight.grad is not None:
                seen = type(self).step(local(target.weight.detach()), local(target.weight.grad))
                seen.nan_to_num_(0.0, 0.0, 0.0)  # of a step that fp16's loss scaling will leave out
                self.sums[target.name] = self.sums[target.name].add_(seen) if target.name in self.sums else seen

    def scores(self, target: Target) -> Tensor:
        if target.name not in self.sums:
            raise ValueError(
                f"{target.name!r} had no gradient in {self.steps} optimizer steps, so nothing tells what its weights "
                "are worth; skip it, or choose the criterion 'magnitude'."
            )
        return whole(as_shard_of(self.sums[target.name], target.weight))


class Movement(_ByGradient):
    """Weights that move away from zero stay (Sanh et al. 2020, https://arxiv.org/abs/2005.07683).

    Summed over all steps of the run: a score that once was earned counts until the end.
    """

    step = staticmethod(movement_step)

    def forget(self) -> None:
        """Nothing: the sum goes on."""


class Taylor(_ByGradient):
    """Weights whose loss would cost most stay (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).

    The mean over the steps since weights last went (as a sum: only the order counts).
    """

    step = staticmethod(taylor_step)


class Wanda(_Seeing):
    """Large weights of large inputs stay (Sun et al. 2023, https://arxiv.org/abs/2306.11695), row by row.

    The inputs are those of the training steps since weights last went, on all ranks.
    """

    budget: Budget = "row"

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        self._step: dict[str, Tensor] = {}  # squares of each input, and how many were summed, of this step and rank

    def watch(self) -> Callable[[], None]:
        hooks = [t.module.register_forward_pre_hook(partial(self._look, t), with_kwargs=True) for t in self.targets]

        def off() -> None:
            for hook in hooks:
                hook.remove()

        return off

    @torch.no_grad()
    def _look(self, target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, name, inputs = [*args, *kwargs.values()], target.name, target.weight.shape[target.input_dim]
        x = given[0] if given and module.training else None
        if isinstance(module, nn.MultiheadAttention) and any(other is not x for other in given[1:3]):
            return  # one matrix for different inputs
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1] != inputs:
            return
        rows_NI = x.detach().reshape(-1, inputs).float()
        squares = torch.cat([rows_NI.square().sum(0), rows_NI.new_full((1,), len(rows_NI))])
        self._step[name] = self._step[name] + squares if name in self._step else squares

    def see(self) -> None:
        """Every rank adds what all have seen in this step: together, so that what is saved is the same everywhere."""
        self.steps += 1
        nothing = [torch.zeros(t.weight.shape[t.input_dim] + 1, device=t.weight.device) for t in self.targets]
        step = torch.cat([self._step.pop(t.name, zeros) for t, zeros in zip(self.targets, nothing)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(step)
        for target, seen in zip(self.targets, step.split([len(zeros) for zeros in nothing])):
            self.sums[target.name] = self.sums[target.name] + seen if target.name in self.sums else seen.clone()

    def scores(self, target: Target) -> Tensor:
        *_, rows = seen = self.sums[target.name]
        if not rows:
            warnings.warn(
                f"{target.name!r}: read without being called, or no token came to it; judged by magnitude alone.",
                UserWarning,
                stacklevel=2,
            )
        rms_I = (seen[:-1] / rows).sqrt() if rows else torch.ones_like(seen[:-1])
        if not rms_I.isfinite().all():
            raise ValueError(f"{target.name!r}: its inputs are not finite (NaN or inf), so Wanda cannot weigh them.")
        weight = whole(target.weight)
        return wanda_scores(weight, rms_I) if target.input_dim == 1 else wanda_scores(weight.T, rms_I).T

    def _whole_sums(self) -> dict[str, Tensor]:
        return self.sums

    def _part(self, tensor: Tensor, target: Target) -> Tensor:
        return tensor.to(target.weight.device, copy=True)


CRITERIA: dict[str, type[Magnitude]] = {"magnitude": Magnitude, "movement": Movement, "taylor": Taylor, "wanda": Wanda}


def criterion_named(name: str) -> type[Magnitude]:
    """One of ``CRITERIA``.

    Raises:
        ValueError: an unknown name; lists the known ones.

    >>> criterion_named("wanda").__name__
    'Wanda'
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion={name!r} is unknown. {near(name, list(CRITERIA))}")
    return CRITERIA[name]
