"""Statistics of the inputs of chosen layers, while a block runs."""

# Shape letters: B = batch, T = tokens, N = rows, I = inputs of a layer.

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_slm.calibration.statistics import Statistic, over_ranks
from lightning_slm.nn.targets import Target


class Watch:
    """Adds the inputs of layers up as they are called.

    Layers that are given the very same tensor (queries, keys and values; gate and up) share one statistic: it is
    computed once.

    Args:
        targets: whose inputs; their modules are called with them as the first argument (nn.Linear, Conv1D).
        kind: which statistic.
    """

    def __init__(self, targets: Iterable[Target], kind: type[Statistic]) -> None:
        self.targets, self.kind = list(targets), kind
        self.statistics: dict[str, Statistic] = {}
        self._lender: dict[str, str] = {}  # whose statistic a layer shares, itself included
        self._now: dict[str, _Same] = {}  # who was last called with what
        self._mask_BT: Tensor | None = None

    @contextmanager
    def on(self, mask_BT: Tensor | None = None) -> Iterator[None]:
        """Watch inside.

        Args:
            mask_BT: positions that count; None: all. Inputs that are neither (B, T, I) nor (B * T, I) count as they
                are.
        """
        self._mask_BT, self._now = mask_BT, {}
        modules = {t.module for t in self.targets}
        hooks = [m.register_forward_pre_hook(self.see, prepend=True, with_kwargs=True) for m in modules]
        try:
            yield
        finally:
            self._now = {}
            for hook in hooks:
                hook.remove()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called; for whoever calls a module's forward, which no hook sees."""
        if (x := _input_of(module, args, kwargs)) is not None:
            for target in self.targets:
                if target.module is module and x.shape[-1] == target.weight.shape[target.input_dim]:
                    self._add(target.name, x)

    def _add(self, name: str, x: Tensor) -> None:
        lender = self._lender.setdefault(name, self._who_has(x) or name)
        self._now[name] = _Same(x)
        if lender == name:
            if name not in self.statistics:
                self.statistics[name] = self.kind(x.shape[-1], x.device)
            self.statistics[name].update(self._rows(x))
        elif lender not in self._now or not self._now[lender].still(x):
            raise ValueError(
                f"{name!r} had the same input as {lender!r} in its first call and another one now; calibrate them one "
                "after the other, or skip one of them."
            )

    def _who_has(self, x: Tensor) -> str | None:
        return next((name for name, seen in self._now.items() if seen.still(x) and self._lender[name] == name), None)

    def _rows(self, x: Tensor) -> Tensor:
        mask_BT = self._mask_BT
        if mask_BT is not None and x.shape[:-1] in (mask_BT.shape, (mask_BT.numel(),)):
            return x[mask_BT.view(x.shape[:-1]).to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def reduce_(self) -> None:
        """Add up over all ranks; each must call this.

        A rank whose tokens never came to a layer (an expert, say) has nothing to add, but must take part.
        """
        seen: dict[str, str] = {}
        for name, lender in (pair for lenders in over_ranks(self._lender) for pair in lenders.items()):
            if seen.setdefault(name, lender) != lender:
                raise ValueError(f"{name!r} has the same input as {lender!r} on one rank only; skip one of them.")
        for target in self.targets:  # in the same order everywhere
            if seen.get(target.name) == target.name:
                inputs, device = target.weight.shape[target.input_dim], target.weight.device
                self.statistics.setdefault(target.name, self.kind(inputs, device)).reduce_()
        self._lender = seen

    def of(self, target: Target) -> Statistic | None:
        """The statistic of a target's inputs; None: its module was never called with any."""
        return self.statistics.get(self._lender.get(target.name, ""))


class _Same:
    """Remembers a tensor without holding it, and whether it was written to since."""

    def __init__(self, x: Tensor) -> None:
        self._ref, self._version = weakref.ref(x), _version(x)

    def still(self, x: Tensor) -> bool:
        return self._ref() is x and self._version == _version(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer is called with, if it is called as a layer is; else whoever asks finds no statistic."""
    given = [*args, *kwargs.values()]
    if isinstance(module, nn.MultiheadAttention):
        parts = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
        if any(part is not parts[0] for part in parts):
            return None  # one matrix for different inputs
        given = parts
    x = given[0] if given else None
    return x if isinstance(x, Tensor) and x.is_floating_point() and x.ndim else None
