"""What a model is made of, for pruning that makes it really smaller: groups of coupled units.

A unit is what can be removed for itself: an attention head, a key-value head with its query heads, a feed-forward unit,
a channel of the residual stream, a layer. Removing one touches several tensors at once (LLM-Pruner, Ma et al. 2023,
https://arxiv.org/abs/2305.11627, calls them coupled structures): a feed-forward unit is a row of ``gate_proj`` and
``up_proj`` and a column of ``down_proj``. A `Group` says which slices these are, so that scores can be summed over a
unit, gates can act on it (`gates`) and it can be cut out (`shrink`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_slm.pruning.structure_families import network_in
from lightning_slm.pruning.structure_roles import AttentionRoles, FeedForwardRoles, Network, Rows

Unit = Literal["head", "kv_group", "ffn", "hidden", "layer"]
UNITS: tuple[Unit, ...] = get_args(Unit)
# By the names of `shape_of`.
UNIT_OF: dict[str, Unit] = {
    "layers": "layer", "heads": "head", "kv_heads": "kv_group", "ffn": "ffn", "hidden": "hidden",
}  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Where the units of a group are in one parameter: unit u is entries ``offset + u * width`` and the ``width - 1``
    after it, along ``dim``. With ``unit``, the whole parameter belongs to that one.
    """

    name: str  # of the parameter, relative to the network; a tied one has its first name
    module: nn.Module
    attribute: str
    dim: int = 0
    width: int = 1
    offset: int = 0
    unit: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where a gate acts: on a module's input (each unit is ``width`` of its last axis), on its output, within a norm
    of the residual stream, or on what a block adds. With ``unit``, by that entry of the gate alone.
    """

    module: nn.Module
    at: Literal["input", "output", "norm", "block"]
    width: int = 1
    unit: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """A set of interchangeable units.

    Attributes:
        name: the path of what they are in, and the unit: "model.layers.3.mlp/ffn"; "hidden" and "layer" exist once.
        unit: what they are.
        size: how many.
        layer: the block's index; None for "hidden", "layer" and what several blocks share.
        parts: the slices of parameters; each parameter at most once for each of its axes.
        places: where gates act.
        runs: the units stand in so many runs of equal length, and as many must stay in each of them as in any other
            (query heads by the key-value head they read); 1: any may go.
    """

    name: str
    unit: Unit
    size: int
    layer: int | None
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    runs: int = 1

    def sums(self, tensor_of: Callable[[Part], Tensor | None]) -> Tensor:
        """Sums over all parts of each unit, float32, shape (size,).

        Args:
            tensor_of: numbers in the shape of the part's parameter, or None for a part that does not count.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> group, = structure_of(model, ["ffn"])
        >>> group.sums(lambda part: torch.ones_like(part.parameter)).tolist()  # 3 matrices, 8 weights each
        [24.0, 24.0, 24.0, 24.0, 24.0, 24.0]
        """
        total = torch.zeros(self.size)
        for part in self.parts:
            values = tensor_of(part)
            if values is None:
                continue
            total = total.to(values.device)
            if part.unit is not None:
                total[part.unit] += values.sum(dtype=torch.float32)
                continue
            units = values.narrow(part.dim, part.offset, self.size * part.width).movedim(part.dim, 0)
            total += units.reshape(self.size, -1).sum(1, dtype=torch.float32)
        return total


def structure_of(model: nn.Module, units: Unit | Sequence[Unit] = UNITS) -> list[Group]:
    """The groups of these kinds, in the order of the blocks; "hidden" and "layer" come last.

    "head" is a query head, with its key and value where every head has its own. Where query heads share them
    (grouped-query attention), the configuration has one number of query heads for all key-value heads, so that as many
    must stay for each (`Group.runs`). "kv_group" is a key-value head with all its query heads.

    Args:
        model: a network of a known family (ours; Hugging Face's Llama, Mistral, Qwen2, Qwen3, GPT-2 and BERT, under
            any head), or a module that holds one.
        units: what may go.

    Raises:
        ValueError: another family, or a part of the model in which the units are not known; names it.
    """
    wanted = [units] if isinstance(units, str) else list(units)
    if unknown := set(wanted) - set(UNITS):
        raise ValueError(f"unit={sorted(unknown)[0]!r} must be one of {', '.join(map(repr, UNITS))}.")
    network = network_in(model)
    for unit in wanted:
        _check(network, unit)
    return list(groups_of(network, wanted))


def shape_of(model: nn.Module) -> dict[str, int]:
    """Sizes of the network: "layers" (blocks), "heads", "kv_heads", "head_dim", "ffn", "hidden" and "parameters" (a
    tied one once). A model without attention, or without feed-forward layers of a known kind, lacks theirs.
    """
    network = network_in(model)
    sizes = {"layers": len(network.blocks), "hidden": network.config.hidden_size}
    for a in network.attentions[:1]:
        sizes |= {"heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim}
    for f in network.feed_forwards[:1]:
        sizes["ffn"] = f.width
    return {**sizes, "parameters": sum(p.numel() for p in network.module.parameters())}


def groups_of(network: Network, units: Iterable[str]) -> Iterator[Group]:
    """The groups of a network that was checked."""
    names = _Names(network)
    for i in range(len(network.roles)):
        for a in [a for a in network.attentions if names.first(a) == i]:
            if "head" in units:
                yield _heads(a, names)
            if "kv_group" in units:
                yield _kv_groups(a, names)
        for f in [f for f in network.feed_forwards if names.first(f) == i]:
            if "ffn" in units:
                yield _feed_forward(f, names)
    if "hidden" in units:
        yield _hidden(network, names)
    if "layer" in units:
        yield _layers(network, names)


class _Names:
    """Names of parameters and modules, and which blocks something belongs to."""

    def __init__(self, network: Network) -> None:
        self.modules = {id(m): name for name, m in network.module.named_modules()}
        self.parameters = {id(p): name for name, p in network.module.named_parameters()}
        self._blocks: dict[int, list[int]] = {}
        for i, block in enumerate(network.roles):
            for part in (block.attention, block.feed_forward):
                self._blocks.setdefault(id(part), []).append(i)

    def first(self, part: object) -> int:
        return self._blocks[id(part)][0]

    def layer(self, part: object) -> int | None:
        """None if several blocks share it."""
        blocks = self._blocks[id(part)]
        return blocks[0] if len(blocks) == 1 else None

    def outputs(self, rows: Rows, width: int) -> list[Part]:
        """Weight and bias."""
        layer: Any = rows.layer
        parts = [self.part(layer, "weight", 1 if is_transposed(layer) else 0, width, rows.offset)]
        if getattr(layer, "bias", None) is not None:
            parts.append(self.part(layer, "bias", 0, width, rows.offset))
        return parts

    def inputs(self, layer: nn.Module, width: int) -> Part:
        return self.part(layer, "weight", 0 if is_transposed(layer) else 1, width)

    def part(self, module: nn.Module, attribute: str, dim: int, width: int = 1, offset: int = 0) -> Part:
        name = self.parameters[id(getattr(module, attribute))]
        return Part(name, module, attribute, dim, width, offset)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is (in, out): transformers' Conv1D, and embeddings, whose rows are what they write."""
    return type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding)


def _heads(a: AttentionRoles, names: _Names) -> Group:
    if a.heads == a.kv_heads:
        return _kv_groups(a, names, "head")
    parts = [*names.outputs(a.query, a.head_dim), names.inputs(a.out, a.head_dim)]
    places = (Place(a.out, "input", a.head_dim),)
    return Group(_name(a, "head", names), "head", a.heads, names.layer(a), tuple(parts), places, a.kv_heads)


def _kv_groups(a: AttentionRoles, names: _Names, unit: Unit = "kv_group") -> Group:
    wide, d = a.heads // a.kv_heads * a.head_dim, a.head_dim
    parts = [*names.outputs(a.query, wide), *names.outputs(a.key, d), *names.outputs(a.value, d)]
    parts.append(names.inputs(a.out, wide))
    places = (Place(a.out, "input", wide),)
    return Group(_name(a, unit, names), unit, a.kv_heads, names.layer(a), tuple(parts), places)


def _feed_forward(f: FeedForwardRoles, names: _Names) -> Group:
    parts = [part for rows in f.into for part in names.outputs(rows, 1)] + [names.inputs(f.out, 1)]
    return Group(_name(f, "ffn", names), "ffn", f.width, names.layer(f), tuple(parts), (Place(f.out, "input"),))


def _name(role: AttentionRoles | FeedForwardRoles, unit: str, names: _Names) -> str:
    return f"{names.modules[id(role.module)]}/{unit}"


def _hidden(network: Network, names: _Names) -> Group:
    parts = [part for layer in network.writing for part in names.outputs(Rows(layer), 1)]
    parts += [names.inputs(layer, 1) for layer in network.reading]
    for norm in network.all_norms:
        parts += [names.part(norm, attribute, 0) for attribute, p in norm.named_parameters(recurse=False)]
    once = {(id(part.parameter), part.dim): part for part in reversed(parts)}  # tied ones and fused ones
    places = [Place(layer, "output") for layer in network.writing]
    places += [Place(norm, "norm") for norm in network.all_norms]
    D = network.config.hidden_size
    return Group("hidden", "hidden", D, None, tuple(reversed(once.values())), tuple(places))


def _layers(network: Network, names: _Names) -> Group:
    parts, places = [], []
    for i, block in enumerate(network.blocks):
        places.append(Place(block, "block", unit=i))
        for module in block.modules():
            parts += [
                Part(names.parameters[id(p)], module, attribute, unit=i)
                for attribute, p in module.named_parameters(recurse=False)
            ]
    return Group("layer", "layer", len(network.blocks), None, tuple(parts), tuple(places))


def _check(network: Network, unit: str) -> None:
    """Refuse a unit that cannot be removed from this network."""
    kind = network.config.model_type
    if unit in network.refusals:
        raise ValueError(f"unit={unit!r} cannot be removed from this {kind!r} model: {network.refusals[unit]}.")
    if unit != "layer" and (stranger := network.stranger(unit)) is not None:
        name, module = stranger
        raise ValueError(
            f"unit={unit!r}: what {name!r}, a {type(module).__name__}, has of it is not known for {kind!r} models; "
            "merge adapters first, or prune units that it does not touch ('layer', for example)."
        )
    missing = {"head": network.attentions, "kv_group": network.attentions, "ffn": network.feed_forwards}
    if not missing.get(unit, True):
        raise ValueError(f"unit={unit!r}: this {kind!r} model has none.")
    for layer in [] if unit == "layer" else [*network.reading, *network.writing]:
        weight: Any = layer.weight
        if not weight.is_floating_point() or weight.ndim != 2:
            name = next(name for name, m in network.module.named_modules() if m is layer)
            raise ValueError(f"{name!r} holds packed {weight.dtype}; prune before quantising.")
