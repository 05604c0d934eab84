"""Masks that learn which units of a model to keep: for an exact shape, or as few as a penalty leaves.

Sheared LLaMA (Xia et al. 2024, https://arxiv.org/abs/2310.06694): gates on layers, heads, feed-forward units and
channels train together with the weights, under a constraint for every group of units that its expected number of open
gates be the target's. Voita et al. 2019 (https://arxiv.org/abs/1905.09418): gates on heads, and a price for each that
is open. Both end as a plain smaller model.
"""

# s, t = share of a group's units that is open in expectation, and shall be. lambda, phi = multipliers of a constraint.

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_slm.errors import near
from lightning_slm.pruning.gates import fold_
from lightning_slm.pruning.l0 import L0Gates
from lightning_slm.pruning.shrink import shrink_, smaller_config
from lightning_slm.pruning.structure import UNIT_OF, Group, Unit, shape_of, structure_of
from lightning_slm.pruning.structure_families import network_in

_AJAR = 0.01  # the least gate of a unit that stays: a norm leaves channels out whose gate is 0


class LearnedMasks:
    """Gates with an optimizer of their own, beside the one of the weights; a subclass says what is paid for them.

    Args:
        groups: the units that may go.
        lr: Adam's learning rate for the gates.
        seed: of the gates' random numbers.
        device: where the model is.
    """

    def __init__(self, groups: Sequence[Group], lr: float, seed: int = 0, device: torch.device | None = None) -> None:
        self.groups = list(groups)
        self.gates = L0Gates(self.groups, seed).to(device)
        self.optimizer = torch.optim.Adam(self._learned(lr), betas=(0.9, 0.95))

    # What a subclass says.

    def price(self, progress: float) -> Tensor:
        """The term beside the language-model loss; ``progress`` goes from 0 to 1 while masks are learned."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """How many units of each group stay at the end."""
        raise NotImplementedError

    def _learned(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.gates.log_alpha), "lr": lr}]

    # What all do.

    def zero_grad(self) -> None:
        """Before the backward pass of a step."""
        self.optimizer.zero_grad()

    def step_(self, progress: float, loss_scale: float = 1.0) -> None:
        """After the backward pass of the language-model loss: add the gradient of the price, and step.

        Args:
            loss_scale: what the loss was multiplied by for 16 bits.
        """
        log_alpha = list(self.gates.log_alpha)
        for p in log_alpha:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / loss_scale
        average_over_ranks_([p.grad for p in log_alpha if p.grad is not None])
        self.price(progress).backward()
        self.optimizer.step()
        self.gates.hold_in_bounds_()

    def final(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What stays, as masks, and the gates to fold into it, by the names of groups."""
        counts, gates = self.counts(), self.gates.middle()
        keep = {group.name: self.gates.best(group, counts[group.name]) for group in self.groups}
        for group in self.groups:
            kept = keep[group.name].to(gates[group.name])
            gates[group.name] = kept if group.unit == "layer" else self.folded(gates[group.name]) * kept
        return keep, gates

    def folded(self, gate: Tensor) -> Tensor:
        """Gates of units that stay, as they go into the weights."""
        return gate

    def cut_(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> list[dict[str, Any]]:
        """Fold the gates into the weights and remove what does not stay.

        Returns: the entry for `replay_`.
        """
        keep, gates = self.final()
        fold_(model, gates)
        return shrink_(model, keep, optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and whole tensors."""
        return {"learned": [p.detach() for p in self._parameters()], "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that was."""
        for p, value in zip(self._parameters(), state["learned"], strict=True):
            p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class ShearedMasks(LearnedMasks):
    """Masks for an exact shape: ``lambda * (s - t) + phi * (s - t)^2`` for each group, minimised by the gates and
    maximised by lambda and phi (a pair for each group; gradient ascent with Adam).

    Args:
        model: as for `structure_of`.
        shape: what shall be left of "layers", "heads" or "kv_heads", "ffn" and "hidden"; the others stay.
        lr: of the gates.
        multiplier_lr: of lambda and phi.
        warmup: the targets move linearly from all units to the shape over this share of the progress.

    Raises:
        ValueError: a shape that this model cannot have; says why.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> from lightning_slm.pruning import gated
    >>> masks = ShearedMasks(model, {"ffn": 3, "heads": 1})
    >>> with gated(model, masks.gates.sample(step=0)):
    ...     model(ids := torch.tensor([[1, 2, 3]]), labels=ids).loss.backward()
    >>> masks.step_(progress=0.1)
    >>> _ = masks.cut_(model)
    >>> model.config.intermediate_size, model.config.num_attention_heads
    (3, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Mapping[str, int],
        lr: float = 1.0,
        multiplier_lr: float = 1.0,
        warmup: float = 0.2,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        check_shape(model, shape)
        units = [UNIT_OF[key] for key, target in shape.items() if target < shape_of(model)[key]]
        self.target = {UNIT_OF[key]: target for key, target in shape.items()}
        groups = structure_of(model, units)
        self.multiplier_lr, self.warmup = multiplier_lr, warmup
        self.multipliers = [torch.zeros(2, device=device, requires_grad=True) for _ in groups]  # lambda, phi
        super().__init__(groups, lr, seed, device)

    def price(self, progress: float) -> Tensor:
        """The Lagrangian's term."""
        expected = self.gates.expected()
        ramp = min(1.0, progress / self.warmup) if self.warmup else 1.0
        terms = []
        for group, multipliers in zip(self.groups, self.multipliers):
            t = 1 + (self.target[group.unit] / group.size - 1) * ramp
            terms.append(lagrangian(expected[group.name] / group.size, t, *multipliers.unbind()))
        return torch.stack(terms).sum()

    def counts(self) -> dict[str, int]:
        """The shape's."""
        return {group.name: self.target[group.unit] for group in self.groups}

    def folded(self, gate: Tensor) -> Tensor:
        """None quite shut: the shape asks for this unit."""
        return gate.clamp(min=_AJAR)

    def _learned(self, lr: float) -> list[dict[str, Any]]:
        ascent = {"params": self.multipliers, "lr": self.multiplier_lr, "maximize": True}
        return [*super()._learned(lr), ascent]


class PricedMasks(LearnedMasks):
    """Masks at a price: ``strength`` times the expected number of open gates is added to the loss (Voita et al.).

    The layers may want different numbers of units, and a configuration has one for all: as many stay in each as in the
    one that wants most, and where a gate is shut what stays behind it is zero.

    Args:
        model: as for `structure_of`.
        units: what may go; "head" in the paper.
        strength: nats for an open gate.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Unit | Sequence[Unit] = "head",
        strength: float = 0.01,
        lr: float = 0.1,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.strength, self._network = strength, network_in(model)
        super().__init__(structure_of(model, units), lr, seed, device)

    def price(self, progress: float) -> Tensor:
        """Of all gates."""
        return self.strength * torch.stack(list(self.gates.expected().values())).sum()

    def counts(self) -> dict[str, int]:
        """In each layer as many as in the one that has most open; one at least, and more where the configuration
        cannot say so many.
        """
        middle, most = self.gates.middle(), dict[str, int]()
        for group in self.groups:
            in_a_run = (middle[group.name] > 0).view(group.runs, -1).sum(1).max()
            most[group.unit] = max(most.get(group.unit, group.runs), int(in_a_run) * group.runs)
        for group in self.groups:
            while most[group.unit] < group.size and not self._can_be_said(most):
                most[group.unit] += group.runs
        return {group.name: most[group.unit] for group in self.groups}

    def _can_be_said(self, counts: Mapping[str, int]) -> bool:
        keep = {group.name: self.gates.best(group, counts[group.unit]) for group in self.groups}
        try:
            smaller_config(self._network, self.groups, keep)
        except ValueError:
            return False
        return True


def lagrangian(s: Tensor, t: float, lambda_: Tensor, phi: Tensor) -> Tensor:
    """What a constraint ``s = t`` adds to the loss."""
    return lambda_ * (s - t) + phi * (s - t) ** 2


def check_shape(model: nn.Module, shape: Mapping[str, int]) -> None:
    """Nothing is changed.

    Raises:
        ValueError: there is no such size, it is larger than what is there, or the configuration cannot say it.
    """
    sizes = shape_of(model)
    for key, target in shape.items():
        if key not in UNIT_OF or key not in sizes:
            raise ValueError(f"shape has {key!r}, which is no size of this model. {near(key, UNIT_OF.keys() & sizes)}")
        if not 1 <= target <= sizes[key]:
            raise ValueError(f"shape has {key}={target}, but the model has {sizes[key]}: from 1 to that many can stay.")
    if {"heads", "kv_heads"} <= shape.keys():
        raise ValueError("shape has 'heads' and 'kv_heads': give one; with a key-value head its query heads go.")
    groups = [group for key in shape for group in structure_of(model, UNIT_OF[key])]
    keep = {}
    for group in groups:
        target = next(count for key, count in shape.items() if UNIT_OF[key] == group.unit)
        if target % group.runs:
            raise ValueError(
                f"shape has heads={target}, which is no multiple of the {group.runs} key-value heads; give one, or "
                "remove whole 'kv_heads'."
            )
        first = torch.arange(group.size).view(group.runs, -1)[:, : target // group.runs]
        keep[group.name] = first.flatten()
    smaller_config(network_in(model), groups, keep)


def average_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """In place, so that gates stay the same on all ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
