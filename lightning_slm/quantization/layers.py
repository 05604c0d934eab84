"""Layers that compute in another way: found by name, exchanged by class, everything else as it was.

An exchanged layer is the same object with the same parameters under the same names: hooks, optimizers, checkpoints and
sharding do not notice. Each layer has one owner: what one technique exchanged, another one refuses.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import Patterns, Target, weight_targets

# What is wrong with a layer's sizes, in words that continue "its weight of (O, I) "; None where nothing is.
Misfit = Callable[[nn.Linear], str | None]


def exchange_(
    model: nn.Module,
    kind: type[nn.Linear],
    settings: Any,
    targets: Patterns = "*",
    skip: Patterns = (),
    misfit: Misfit = lambda layer: None,
    prepare: Callable[[nn.Linear], dict[str, Any]] = lambda layer: {},
) -> list[str]:
    """Let linear layers of ``model`` compute as ``kind`` does, in place; doing it twice is fine.

    Args:
        kind: a subclass of ``nn.Linear`` with a forward of its own; it finds ``settings`` as ``self.settings``.
        settings: how it computes, comparable (a frozen dataclass).
        targets: fnmatch patterns of the linear layers; embeddings and output heads are none.
        skip: patterns to leave out again.
        misfit: says what is wrong with the sizes of a layer; it then stays as it is and is named in a warning.
        prepare: further attributes of an exchanged layer.

    Returns: the names of the layers that compute as ``kind`` now.

    Raises:
        ValueError: a pattern that matches nothing, or a layer that another technique has exchanged already.
    """
    chosen = weight_targets(model, targets, skip)
    layers = [t for t in chosen if isinstance(t.module, nn.Linear) and t.attribute == "weight"]
    misfits = {t.name: what for t in layers if (what := misfit(t.module)) is not None}  # type: ignore[arg-type]
    done, fresh = [], []
    for target in layers:
        if target.name in misfits:
            continue
        if type(target.module) is kind:
            _check_same(target, settings)
            done.append(target)
        elif type(target.module) is nn.Linear:
            fresh.append(target)
        else:
            check_free(target, kind)
    for target in fresh:  # all checks come before any change
        layer: Any = target.module
        vars(layer).update(prepare(layer), settings=settings)
        layer.__class__ = kind
    keep_off_fast_path(model, kind)
    warn_of_the_rest(chosen, [t.module for t in done + fresh], misfits)
    names = {id(t.module) for t in done + fresh}
    return [t.module_name for t in layers if id(t.module) in names]


def restore_(model: nn.Module, kind: type[nn.Linear]) -> None:
    """Give layers of ``kind`` their plain class back; weights stay as they are."""
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = nn.Linear
            del module.settings


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Inside, layers that round only to train fast (``only_in_training``) compute as ``nn.Linear``: as exported."""
    kinds = {m: type(m) for m in model.modules() if getattr(type(m), "only_in_training", False)}
    for module in kinds:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def check_free(target: Target, kind: type[nn.Module]) -> None:
    """Raises: ValueError: another technique has exchanged this layer."""
    module = target.module
    if not isinstance(module, kind) and (hasattr(module, "settings") or hasattr(module, "quant")):
        raise ValueError(
            f"{target.module_name!r} computes as {type(module).__name__} already, so it cannot become "
            f"{kind.__name__}: choose `targets` and `skip` so that each layer is rounded by one technique."
        )


def warn_of_the_rest(chosen: list[Target], done: Sequence[nn.Module], misfits: dict[str, str] | None = None) -> None:
    """Name, once and by kind of module, what was asked for and stays in full precision."""
    misfits = misfits or {}
    ids = {id(getattr(m, "weight", None)) for m in done}
    rest = defaultdict(list)
    for target in chosen:
        if id(target.weight) not in ids and target.name not in misfits:
            rest[type(target.module).__name__].append(target.name)
    if rest:
        kinds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in rest.items())
        warnings.warn(
            f"Not quantised, for only the forward of an nn.Linear can be exchanged: {kinds}. Skip them to say so.",
            NoEffectWarning,
            stacklevel=4,
        )
    if misfits:
        reasons = "; ".join(f"{name} {what}" for name, what in misfits.items())
        warnings.warn(f"Left in full precision, for their sizes do not fit: {reasons}.", NoEffectWarning, stacklevel=4)
    if not done and not rest and not misfits:
        warnings.warn("Quantisation found no layer to work on.", NoEffectWarning, stacklevel=4)


def keep_off_fast_path(model: nn.Module, kind: type[nn.Module]) -> None:
    """nn.TransformerEncoderLayer has a fused eval path that reads the weights and never calls its linear layers."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(m, kind) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "not a known activation": PyTorch then takes the plain path
        else:
            module.use_nested_tensor = False  # only the fused path can take such tensors


def _check_same(target: Target, settings: Any) -> None:
    if target.module.settings != settings:
        raise ValueError(
            f"{target.module_name!r} computes with {target.module.settings} already, and {settings} is asked for: "
            "choose `targets` and `skip` so that each layer is rounded in one way."
        )
