"""How much there is of a model: parameters, zeros among them, bytes in memory and on disk."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lightning_slm.nn.targets import Patterns, weight_targets


class ParameterCount(NamedTuple):
    """How many weights a model has, and how many of them are not zero."""

    total: int
    nonzero: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters of ``model``: a tied one counts once, a packed one as the weights that it stands for.

    >>> layer = nn.Linear(4, 2, bias=False)
    >>> _ = layer.weight.data[0].zero_()
    >>> count_parameters(nn.Sequential(layer, layer))
    ParameterCount(total=8, nonzero=4)
    """
    parameters = list(_unpacked(model).parameters())  # each once, however often it is tied
    return ParameterCount(sum(p.numel() for p in parameters), sum(p.numel() - _zeros(p) for p in parameters))


def sparsity(model: nn.Module, targets: Patterns = "*", skip: Patterns = ()) -> float:
    """Zeros / elements of the targeted weights, from 0 to 1.

    Args:
        model: any module.
        targets: fnmatch patterns of layers, as the techniques take them; the default leaves out embeddings and head.
        skip: patterns to leave out again.

    Raises:
        ValueError: a pattern matches nothing; lists near names.
    """
    weights = [t.weight for t in weight_targets(_unpacked(model), targets, skip)]
    return sum(map(_zeros, weights)) / max(1, sum(w.numel() for w in weights))


def sparsity_by_layer(model: nn.Module, targets: Patterns = "*", skip: Patterns = ()) -> dict[str, float]:
    """The same, for each targeted layer by its name."""
    return {t.name: _zeros(t.weight) / t.weight.numel() for t in weight_targets(_unpacked(model), targets, skip)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of ``model`` hold in memory.

    What counts is the storage: a tied weight once, a view by what it keeps alive, a quantised tensor by its packed
    codes and scales, a sharded one by this rank's part.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for leaf in _plain_tensors(tensor):
            storage = leaf.untyped_storage()
            # Storages without memory behind them (meta device) have no address to tell them apart by.
            storages[storage.data_ptr() or id(leaf), storage.device] = storage.nbytes()
    return sum(storages.values())


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{str(path)!r} is neither a file nor a folder.")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _unpacked(model: nn.Module) -> nn.Module:
    """``model``, or where layers are packed a copy with plain ones: a packed layer says ``dequantized()``."""
    if not any(hasattr(m, "dequantized") for m in model.modules()):
        return model
    copied = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for name, packed in list(copied.named_modules()):
        if hasattr(packed, "dequantized"):
            plain = nn.Linear(1, 1, bias=False) if hasattr(packed, "in_features") else nn.Embedding(1, 1)
            # Tied layers hold the same codes.
            codes = packed.weight.data_ptr()
            plain.weight = made.setdefault(codes, nn.Parameter(packed.dequantized(), requires_grad=False))
            plain.register_parameter("bias", getattr(packed, "bias", None))
            copied.set_submodule(name, plain)
    return copied


def _zeros(weight: Tensor) -> int:
    weight = weight.detach()
    if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
        with contextlib.suppress(NotImplementedError):
            weight = weight.dequantize()
    return int((weight == 0).sum())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor subclass (torchao's, DTensor) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))
