"""Learning-rate schedules in fractions of the run, so that one configuration fits a run of any length."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi


class Schedule(ABC):
    """What the learning rate of every parameter group is multiplied by, at each optimizer step."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """The factor at ``step``, which counts optimizer steps from 0, of ``total``; from then on the last one."""


@dataclass(frozen=True)
class WSDSchedule(Schedule):
    """Warm-up, stable, decay: linear up, constant, linear down (Hu et al. 2024, https://arxiv.org/abs/2404.06395).

    Unlike a cosine it may be continued: a checkpoint of the stable phase belongs to runs of every length.

    Args:
        warmup: fraction of the run.
        decay: fraction of the run, at its end.
        final: factor after the last step.

    >>> schedule = WSDSchedule(warmup=0.2, decay=0.5)
    >>> [schedule(step, 10) for step in range(11)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    """

    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_fractions(self, warmup=self.warmup, decay=self.decay, final=self.final)
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are more than the whole run; shorten one.")

    def __call__(self, step: int, total: int) -> float:
        steps = self.decay * total
        left = min((total - step) / steps, 1.0) if steps else 1.0
        return _warmup(step, self.warmup * total) * (self.final + (1 - self.final) * max(left, 0.0))


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Linear warm-up, then half a cosine down (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983).

    Args:
        warmup: fraction of the run.
        final: factor after the last step.

    >>> schedule = CosineSchedule(warmup=0.2, final=0.1)
    >>> [round(schedule(step, 10), 2) for step in range(0, 11, 2)]
    [0.5, 1.0, 0.87, 0.55, 0.23, 0.1]
    """

    warmup: float = 0.02
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_fractions(self, warmup=self.warmup, final=self.final)

    def __call__(self, step: int, total: int) -> float:
        first = self.warmup * total
        done = min(max((step - first) / ((total - first) or 1), 0.0), 1.0)
        return _warmup(step, first) * (self.final + (1 - self.final) * (1 + cos(pi * done)) / 2)


def _warmup(step: int, steps: float) -> float:
    """Linear up to 1 in ``steps``; the first step already learns."""
    return min((step + 1) / steps, 1.0) if steps else 1.0


def _check_fractions(schedule: Schedule, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{type(schedule).__name__}: {name}={value} must be a fraction from 0 to 1.")
