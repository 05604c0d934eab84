"""Gates that learn whether they are open (Louizos, Welling & Kingma 2018, https://arxiv.org/abs/1712.01312).

A hard-concrete gate is a random number in [0, 1] that is 0 with some probability and 1 with some, so that a model with
gates can be trained while some of its units are missing, and the expected number of open gates, the L0 norm, has a
gradient. The learned number of each gate is ``log_alpha``: far below 0 it is shut, far above 0 open.
"""

# Shape letter: U = units of a group.

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_slm.pruning.structure import Group

_BOUND = math.log(100.0)  # of log_alpha, in Sheared LLaMA's code: beyond it a gate would have no gradient to come back
_EDGE = 1e-6  # the least and the largest random number, whose logarithms are taken


@dataclass(frozen=True)
class HardConcrete:
    """The distribution: a concrete variable (Maddison et al. 2017, https://arxiv.org/abs/1611.00712), stretched to
    (low, high) and cut off at 0 and 1.

    Args:
        temperature: the lower, the nearer to 0 or 1; between 0 and 1.
        low: below 0; the further, the more probable an exact 0.
        high: above 1; the further, the more probable an exact 1.

    >>> gate = HardConcrete()
    >>> gate.middle(torch.tensor([-4.0, 0.0, 4.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    temperature: float = 2 / 3
    low: float = -0.1
    high: float = 1.1

    def __post_init__(self) -> None:
        if not (0 < self.temperature < 1 and self.low < 0 and self.high > 1):
            raise ValueError(f"{self}: there must be 0 < temperature < 1, low < 0 and high > 1.")

    def sample(self, log_alpha_U: Tensor, uniform_U: Tensor) -> Tensor:
        """Gates for random numbers between 0 and 1 (equations 10 and 11), differentiable in ``log_alpha``."""
        logits_U = (torch.logit(uniform_U, _EDGE) + log_alpha_U) / self.temperature
        return self._stretched(logits_U.sigmoid())

    def open(self, log_alpha_U: Tensor) -> Tensor:
        """The probability that a gate is not 0 (equation 12); their sum is the expected L0 norm."""
        return torch.sigmoid(log_alpha_U - self.temperature * math.log(-self.low / self.high))

    def middle(self, log_alpha_U: Tensor) -> Tensor:
        """The gates without randomness, for evaluation (equation 13)."""
        return self._stretched(log_alpha_U.sigmoid())

    def _stretched(self, concrete_U: Tensor) -> Tensor:
        return (concrete_U * (self.high - self.low) + self.low).clamp(0, 1)


class L0Gates(nn.Module):
    """A hard-concrete gate for each unit of some groups, all open at first.

    ``log_alpha[i]`` belongs to ``groups[i]``. Random numbers are a function of seed and step: the same on every rank,
    in every micro-batch of a step and after a restart; nobody else's random numbers move.
    """

    def __init__(self, groups: Iterable[Group], seed: int = 0, gate: HardConcrete | None = None) -> None:
        super().__init__()
        self.groups, self.seed, self.gate = list(groups), seed, gate or HardConcrete()
        self.log_alpha = nn.ParameterList(torch.full((group.size,), _BOUND) for group in self.groups)

    def sample(self, step: int) -> dict[str, Tensor]:
        """Gates for one optimizer step, by the names of the groups: for `gated`."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        noise = [torch.rand(group.size, generator=random) for group in self.groups]
        return self._named([self.gate.sample(a, u.to(a.device)) for a, u in zip(self.log_alpha, noise)])

    def middle(self) -> dict[str, Tensor]:
        """Gates for evaluation."""
        return self._named([self.gate.middle(a.detach()) for a in self.log_alpha])

    def expected(self) -> dict[str, Tensor]:
        """How many are open in expectation, in each group; scalars, differentiable."""
        return self._named([self.gate.open(a).sum() for a in self.log_alpha])

    def expected_by_unit(self) -> dict[str, Tensor]:
        """The same, of a kind of unit: the mean over the layers."""
        with torch.no_grad():
            expected = self.expected()
            by_unit: dict[str, list[Tensor]] = {}
            for group in self.groups:
                by_unit.setdefault(group.unit, []).append(expected[group.name])
            return {unit: torch.stack(counts).mean() for unit, counts in by_unit.items()}

    def best(self, group: Group, count: int) -> Tensor:
        """A bool mask (U,) of the ``count`` units whose gates are most open, as many from each run of the group."""
        log_alpha = self.log_alpha[self.groups.index(group)].detach().view(group.runs, -1)
        mask = torch.zeros_like(log_alpha, dtype=torch.bool)
        return mask.scatter_(1, log_alpha.topk(count // group.runs, dim=1).indices, True).flatten().cpu()

    @torch.no_grad()
    def hold_in_bounds_(self) -> None:
        """After each step: a gate that is all but shut can still open."""
        for log_alpha in self.log_alpha:
            log_alpha.clamp_(-_BOUND, _BOUND)

    def _named(self, values: list[Tensor]) -> dict[str, Tensor]:
        return {group.name: value for group, value in zip(self.groups, values)}
