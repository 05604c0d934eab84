"""Structured pruning as a whole: from scores and a target to what stays, and to the smaller model."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_slm.measure.flops import flops_per_token
from lightning_slm.pruning.importance import Criterion, Scores, check_criterion, scores_of
from lightning_slm.pruning.importance_gradients import Loss
from lightning_slm.pruning.shrink import shrink_, smaller_config
from lightning_slm.pruning.structure import UNIT_OF, UNITS, Group, Unit, shape_of, structure_of
from lightning_slm.pruning.structure_families import network_in

SIZE_OF: dict[Unit, str] = {unit: size for size, unit in UNIT_OF.items()}
Shape = dict[str, int]  # by the names of `shape_of`
_FEW = 4000  # combinations of sizes that are tried, the nearest first, where a configuration cannot say every one


@dataclass(frozen=True)
class Target:
    """How small a model shall become: exactly one of these.

    Args:
        ratio: share of the units to remove, of each kind that may go; between 0 and 1.
        parameters: how many may stay at most (a tied one counts once). Every kind of unit gives the same share; but for
            feed-forward units, of which as many stay as there is room for.
        flops: of the forward pass of one token, at most, by `flops_per_token`; likewise.
        shape: exactly what stays, of "layers", "heads", "kv_heads" (with their query heads), "ffn" and "hidden".
        context: tokens that a token attends to, for ``flops``.
    """

    ratio: float | None = None
    parameters: int | None = None
    flops: float | None = None
    shape: Mapping[str, int] | None = None
    context: int = 1024

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("ratio", "parameters", "flops", "shape")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Give exactly one of ratio, parameters, flops and shape, not {given or 'none'}.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} is a share of the units: it must lie between 0 and 1.")
        if self.shape is not None and (not self.shape or (strange := self.shape.keys() - UNIT_OF.keys())):
            what = f"{sorted(strange)[0]!r}, which is no size" if self.shape else "nothing in it"
            raise ValueError(f"shape has {what}; it may name {', '.join(map(repr, UNIT_OF))}.")

    def units(self, unit: Unit | Sequence[Unit]) -> list[Unit]:
        """What may go: what a shape names, else ``unit``.

        Raises:
            ValueError: an unknown unit; query heads and key-value groups at once, other than in a shape.
        """
        units: list[Any] = [unit] if isinstance(unit, str) else [*unit]
        if self.shape:
            units = [UNIT_OF[size] for size in self.shape]
        if strange := [u for u in units if u not in UNITS]:
            raise ValueError(f"unit={strange[0]!r} must be one of {', '.join(map(repr, UNITS))}.")
        if not self.shape and {"head", "kv_group"} <= set(units):
            raise ValueError(
                "unit: with a 'kv_group' its query heads go, so 'head' and 'kv_group' cannot give the same share each; "
                "choose one of them, or say shape={'heads': ..., 'kv_heads': ...}."
            )
        return units


def plan(model: nn.Module, scores: Scores, target: Target) -> dict[str, list[int]]:
    """What stays, for `shrink_`: the units with the highest scores, as many in each layer as in any other.

    Args:
        model: as for `structure_of`.
        scores: as `scores_of` returns them; of all units that may go.
        target: how small. What ``ratio``, ``parameters`` and ``flops`` come to is rounded to a shape that the
            configuration can say (heads that divide the width, for example), "ffn" and "hidden" to multiples of a
            power of two: the largest up to 64, and to a sixteenth of them, of which they are multiples now.

    Raises:
        ValueError: a target that cannot be reached, with the nearest one that can; scores of another model.
    """
    return kept(model, scores, target_shape(model, scores, target))


def structured_(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    unit: Unit | Sequence[Unit] = "ffn",
    criterion: Criterion = "activation",
    ratio: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    shape: Mapping[str, int] | None = None,
    context: int = 1024,
    loss: Loss | None = None,
    run: Callable[[Any], Any] | None = None,
    seed: int = 0,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> list[dict[str, Any]]:
    """Make a model smaller in place: score its units on ``batches``, and remove the least important ones.

    What comes out is a plain model of the same family, with a configuration that says its new sizes:
    ``save_pretrained`` writes what ``from_pretrained`` loads without this package.

    Args:
        model: as for `structure_of`.
        batches: calibration data; see `scores_of`, also for ``criterion``, ``loss``, ``run`` and ``seed``.
        unit: what may go: "head", "kv_group", "ffn", "hidden", "layer", or several. Of no account with a ``shape``.
        criterion: by what units are judged.
        ratio, parameters, flops, shape, context: how small; see `Target`.
        optimizers: as for `shrink_`.

    Returns:
        What was removed, of plain types, for `replay_`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> record = structured_(model, [torch.tensor([[1, 2, 3]])], unit="ffn", ratio=0.5)
    >>> model.config.intermediate_size
    3
    """
    target = Target(ratio, parameters, flops, shape, context)
    scores = scores_of(model, batches, criterion, target.units(unit), loss=loss, run=run, seed=seed)
    return shrink_(model, plan(model, scores, target), optimizers)


def check_target(model: nn.Module, target: Target, unit: Unit | Sequence[Unit], criterion: str) -> None:
    """Before anything is scored.

    Raises:
        ValueError: as `scores_of` and `plan` would, as far as scores have no say.
    """
    units = target.units(unit)
    check_criterion(criterion, units)
    target_shape(model, {group.name: torch.zeros(group.size) for group in structure_of(model, units)}, target)


def target_shape(model: nn.Module, scores: Scores, target: Target) -> Shape:
    """The sizes that a target comes to, by the names of `shape_of`: of what may go.

    Args:
        scores: they say which layers go, where layers are unlike each other.
    """
    space = _Space(model, scores)
    if target.shape is not None:
        space.check(target.shape)
        return dict(target.shape)
    if target.ratio is not None:
        shape = space.without(target.ratio)
        if all(space.now[size] == count for size, count in shape.items()):
            raise ValueError(f"ratio={target.ratio} of {space.now_of(shape)} rounds to nothing; give more.")
        return shape
    if target.parameters is not None:
        return _at_most(space, "parameters", target.parameters, lambda m: sum(p.numel() for p in m.parameters()))
    assert target.flops is not None
    return _at_most(space, "flops", target.flops, lambda m: flops_per_token(m, target.context))


def on_the_way(model: nn.Module, scores: Scores, start: Shape, end: Shape, cut: int, cuts: int) -> Shape:
    """The shape after some of several equal cuts; after the last one, the end itself.

    Sizes that the configuration can say; and whole multiples of a power of two, up to 64, where both ends are and there
    are as many of them as cuts, which is what kernels and groups of quantisation like.
    """
    if cut == cuts:
        return end
    wanted = {}
    for size, last in end.items():
        first, grain = start[size], 64
        while grain > 1 and (first % grain or last % grain or (first - last) // grain < cuts):
            grain //= 2
        wanted[size] = grain * round((first + (last - first) * cut / cuts) / grain)
    return _Space(model, scores).nearest(wanted)


def kept(model: nn.Module, scores: Scores, shape: Mapping[str, int]) -> dict[str, list[int]]:
    """The units of the highest scores for a shape; of equal ones the first."""
    return _Space(model, scores).kept(shape)


class _Space:
    """The shapes that a model can be cut to.

    Args:
        model: as for `structure_of`.
        scores: of all units that may go.
    """

    def __init__(self, model: nn.Module, scores: Scores) -> None:
        units = {name.rpartition("/")[2] for name in scores}
        self.network = network_in(model)
        self.groups: list[Group] = structure_of(model, [u for u in UNITS if u in units])
        self.scores, self.now = scores, shape_of(model)
        self.sizes = [SIZE_OF[unit] for unit in dict.fromkeys(group.unit for group in self.groups)]
        for group in self.groups:
            if group.name not in scores or scores[group.name].shape != (group.size,):
                has = tuple(scores[group.name].shape) if group.name in scores else "none"
                raise ValueError(
                    f"{group.name!r} has {group.size} units, but scores of shape {has}; score the model as it is now."
                )
        if len(self.groups) < len(scores):
            strange = sorted(scores.keys() - {group.name for group in self.groups})[0]
            raise ValueError(f"This model has no {strange!r}, of which there are scores; score it as it is now.")

    def kept(self, shape: Mapping[str, int]) -> dict[str, list[int]]:
        """Indices of what stays, by the names of groups."""
        stays = {}
        for group in self.groups:
            in_a_run = self._count(group, shape) // group.runs
            runs = self.scores[group.name].view(group.runs, -1)
            order = runs.argsort(dim=1, descending=True, stable=True)[:, :in_a_run]
            first = torch.arange(group.runs)[:, None] * runs.shape[1]
            stays[group.name] = sorted((order + first).flatten().tolist())
        return stays

    def config(self, shape: Mapping[str, int]) -> Any:
        """The configuration of the model that would be left; ValueError if it cannot say that."""
        return smaller_config(self.network, self.groups, self.kept(shape))

    def check(self, shape: Mapping[str, int]) -> None:
        """Raises: ValueError: the model cannot have this shape; says why."""
        for size, count in shape.items():
            if size not in self.now:
                raise ValueError(f"shape has {size!r}, of which this model has none.")
            if not 1 <= count <= self.now[size]:
                raise ValueError(
                    f"shape has {size}={count}, but the model has {self.now[size]}: from 1 to that many can stay."
                )
        for group in self.groups:
            if (count := self._count(group, shape)) % group.runs or not count:
                raise ValueError(
                    f"shape has {SIZE_OF[group.unit]}={shape[SIZE_OF[group.unit]]}, of which the "
                    f"{shape.get('kv_heads', self.now['kv_heads'])} key-value heads cannot have equal parts; give a "
                    "multiple of them."
                )
        self.config(shape)

    def without(self, share: float) -> Shape:
        """A shape that lacks this share of every kind of unit; one at least stays."""
        wanted = {}
        for size in self.sizes:
            grain = self.grain(size)
            wanted[size] = grain * max(1, round((1 - share) * self.now[size] / grain))
        return self.nearest(wanted)

    def grain(self, size: str) -> int:
        """What widths are made multiples of, which kernels and groups of quantisation like: a power of two, up to 64
        and to a sixteenth of the width, of which it is a multiple now.
        """
        grain = 64 if size in ("ffn", "hidden") else 1
        while grain > 1 and (self.now[size] % grain or 16 * grain > self.now[size]):
            grain //= 2
        return grain

    def nearest(self, shape: Shape) -> Shape:
        """The shape nearest to one that the configuration may not be able to say.

        Raises:
            ValueError: there is none near; why the shape itself cannot be.
        """
        fussy = ("heads", "kv_heads", "hidden")  # which must fit to each other
        near = [
            _around(n, self.now[size] - (n < self.now[size]), self._step(size)) if size in fussy else [n]
            for size, n in shape.items()
        ]
        choices = itertools.product(*near)
        by_distance = sorted(choices, key=lambda counts: sum(abs(c - w) / w for c, w in zip(counts, shape.values())))
        refusal: ValueError | None = None
        for counts in by_distance[:_FEW]:
            candidate = dict(zip(shape, counts))
            try:
                self.config(candidate)
            except ValueError as error:
                refusal = refusal or error
            else:
                return candidate
        if refusal is None:  # fewer than a step of query heads
            raise ValueError(f"No number of {', '.join(shape)} near {shape} can stay of {self.now_of(shape)}.")
        raise refusal

    def now_of(self, sizes: Iterable[str]) -> str:
        """The sizes as they are, for messages."""
        return ", ".join(f"{self.now[size]} {size}" for size in sizes)

    def _step(self, size: str) -> int:
        return max((group.runs for group in self.groups if SIZE_OF[group.unit] == size), default=1)

    def _count(self, group: Group, shape: Mapping[str, int]) -> int:
        """How many of a group stay, key-value groups that go as a whole not yet taken off."""
        count = shape[SIZE_OF[group.unit]]
        if group.unit == "head" and group.runs > 1 and "kv_heads" in shape:
            return count * group.runs // shape["kv_heads"] if count % shape["kv_heads"] == 0 else 0
        return count


def _around(count: int, most: int, step: int) -> list[int]:
    """Sizes to try, up to 64 steps away; heads and widths that a configuration can say are never far apart."""
    lowest = max(step, (count // step - 64) * step)
    return list(range(lowest, min(most, count + 64 * step) + 1, step))


def _at_most(space: _Space, name: str, wanted: float, value_of: Callable[[nn.Module], float]) -> Shape:
    """The largest shape, with the same share of every kind of unit gone, that comes to no more than ``wanted``."""
    kind: Any = type(space.network.module)

    def value(shape: Shape) -> float:
        config = space.config(shape)
        with torch.device("meta"):
            return value_of(kind(config))

    steps = max(space.now[size] for size in space.sizes)
    if wanted >= (most := value({size: space.now[size] for size in space.sizes})):
        raise ValueError(f"{name}={wanted:g} is no less than the {most:,} that the model has; give less.")
    too_many, enough = 0, steps - 1
    if (least := value(space.without(enough / steps))) > wanted:
        raise ValueError(
            f"{name}={wanted:g} cannot be reached by removing {', '.join(space.sizes)}: with one or the least of each "
            f"the model still has {least:,}. Give that or more, or let other units go, too."
        )
    while enough - too_many > 1:
        middle = (too_many + enough) // 2
        if value(space.without(middle / steps)) <= wanted:
            enough = middle
        else:
            too_many = middle
    shapes = [space.without(enough / steps)]
    if "ffn" in space.sizes:  # coarse units give more than is asked for, or less
        shapes = [_filled(space, s, wanted, value) for s in (*shapes, space.without(too_many / steps))]
    return max((s for s in shapes if value(s) <= wanted), key=value)


def _filled(space: _Space, shape: Shape, wanted: float, value: Callable[[Shape], float]) -> Shape:
    """With as many feed-forward units as there is room for; one at least."""
    grain = space.grain("ffn")
    fits, too_many = 1, space.now["ffn"] // grain + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if value({**shape, "ffn": middle * grain}) <= wanted:
            fits = middle
        else:
            too_many = middle
    return {**shape, "ffn": fits * grain}
