"""Cutting units out of a model: what stays is a plain model of the same family, with a configuration that says so."""

# Letters: H = query heads, K = key-value heads, d = head width, D = width of the residual stream.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_slm.pruning.gates import named_groups
from lightning_slm.pruning.structure import UNITS, Group, groups_of
from lightning_slm.pruning.structure_families import network_in
from lightning_slm.pruning.structure_roles import AttentionRoles, Network

Keep = Mapping[str, Tensor | Sequence[int]]


@torch.no_grad()
def shrink_(model: nn.Module, keep: Keep, optimizers: Iterable[torch.optim.Optimizer] = ()) -> list[dict[str, Any]]:
    """Remove units in place: weights, attributes of modules and the configuration, so that ``save_pretrained`` writes
    a model that ``from_pretrained`` loads, for Hugging Face's families without this package.

    All is checked before anything is changed. Parameters keep their identity, gradients are cut with them; the order of
    units stays. One configuration holds for all layers, so all must be given and keep as many units as each other;
    several groups are removed at once, since some only fit together: in GPT-2 and BERT the width of a head is hidden
    size / heads, so that heads and channels must go in proportion.

    Args:
        model: as for `structure_of`; not yet sharded.
        keep: what stays, by the names of groups: bool masks of shape (size,), or indices. Query heads of key-value
            heads that go, and all units of layers that go, go with them.
        optimizers: whose states are cut like the parameters, and which forget those of removed layers.

    Returns:
        What was applied, of plain types: one entry, for `replay_`.

    Raises:
        ValueError: what the configuration cannot say, and why; a name or a mask that does not fit; sharded weights.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> shrink_(model, {"model.layers.0.mlp/ffn": [0, 2, 5]})
    [{'kept': {'model.layers.0.mlp/ffn': [0, 2, 5]}, 'of': {'model.layers.0.mlp/ffn': 6}}]
    >>> model.model.layers[0].mlp.up_proj, model.config.intermediate_size
    (Linear(in_features=8, out_features=3, bias=False), 3)
    """
    network, groups = network_in(model), named_groups(model, keep)
    _check_whole(network)
    masks = {group.name: _mask(group, keep[group.name]) for group in groups}
    blocks = [i for i in range(len(network.blocks)) if "layer" not in masks or masks["layer"][i]]
    for group in groups:
        if not masks[group.name].any() and (group.layer is None or group.layer in blocks):
            raise ValueError(f"{group.name!r}: nothing would be left; keep one unit at least, or remove the layer.")
    plan = _planned(network, groups, masks, blocks)
    config = _checked(network, plan)
    cuts, gone = _cuts(network, groups, masks, blocks)
    optimizers = list(optimizers)
    for optimizer in optimizers:
        _check_states(optimizer, cuts)
    for optimizer in optimizers:
        _cut_states(optimizer, cuts, gone)
    for cut in cuts:
        cut.apply_()
    _remove_blocks(network, blocks)
    _tell(network, config, plan)
    kept = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
    return [{"kept": kept, "of": {group.name: group.size for group in groups}}]


def replay_(
    model: nn.Module, record: Iterable[Mapping[str, Any]], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Do again what ``shrink_`` did, to a model as it was before: its structure then fits the weights of a checkpoint.

    Args:
        record: the entries that ``shrink_`` returned, one call after the other.

    Raises:
        ValueError: the model has not the sizes it had then.
    """
    for number, step in enumerate(record):
        sizes = {group.name: group.size for group in groups_of(network_in(model), UNITS)}
        for name, size in step["of"].items():
            if sizes.get(name) != size:
                raise ValueError(
                    f"Step {number} of the record was done to {size} units of {name!r}, of which this model has "
                    f"{sizes.get(name, 0)}; replay it on a model as it was before, once."
                )
        shrink_(model, step["kept"], optimizers)


def smaller_config(network: Network, groups: list[Group], keep: Keep) -> Any:
    """The configuration of what `shrink_` would leave; nothing is changed.

    Args:
        groups: those that ``keep`` names.

    Raises:
        ValueError: as `shrink_`.
    """
    masks = {group.name: _mask(group, keep[group.name]) for group in groups}
    blocks = [i for i in range(len(network.blocks)) if "layer" not in masks or masks["layer"][i]]
    return _checked(network, _planned(network, groups, masks, blocks))


def _mask(group: Group, kept: Tensor | Sequence[int]) -> Tensor:
    given = torch.as_tensor(kept).detach().cpu()
    if given.dtype == torch.bool and given.shape == (group.size,):
        return given.clone()
    whole = given.numel() == 0 or not (given.is_floating_point() or given.dtype == torch.bool)
    if not whole or given.ndim != 1 or ((given < 0) | (given >= group.size)).any():
        raise ValueError(
            f"{group.name!r}: keep={given.tolist()} must be a bool mask of shape ({group.size},), or indices from 0 to "
            f"{group.size - 1}."
        )
    return torch.zeros(group.size, dtype=torch.bool).index_fill_(0, given.long(), True)


@dataclass(frozen=True, eq=False, slots=True)
class _Cut:
    """A parameter, and what of it stays along some of its axes."""

    name: str
    parameter: nn.Parameter
    masks: dict[int, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        for dim, mask in self.masks.items():
            tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
        return tensor

    def apply_(self) -> None:
        p = self.parameter
        gradient, p.grad, cut = p.grad, None, self.of(p.data)
        # A graph that somebody still holds remembers the old shape for the gradients to come; it is forgotten where
        # the dtype changes.
        p.data = p.data.new_empty(0, dtype=torch.float32 if p.dtype == torch.float64 else torch.float64)
        p.data = cut
        p.grad = None if gradient is None else self.of(gradient)


@dataclass(frozen=True, eq=False, slots=True)
class _Plan:
    """How many of each there will be; 0 where there is none."""

    units: set[str]
    blocks: list[int]
    kv_heads: int
    heads_each: int
    width: int
    hidden: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.heads_each


def _planned(network: Network, groups: list[Group], masks: dict[str, Tensor], blocks: list[int]) -> _Plan:
    mask_of = {(group.unit, id(group.places[0].module)): masks[group.name] for group in groups}
    names = {id(m): name for name, m in network.module.named_modules()}
    heads: dict[str, tuple[int, int]] = {}
    widths: dict[str, int] = {}
    for block in (network.roles[i] for i in blocks):
        if (a := block.attention) is not None:
            name = names[id(a.module)]
            heads[name] = _kept_heads(a, mask_of, name)
        if (f := block.feed_forward) is not None:
            mask = mask_of.get(("ffn", id(f.out)))
            widths[names[id(f.module)]] = f.width if mask is None else int(mask.sum())
    kv_heads, each = _one(heads, "(key-value heads, query heads for each)") or (0, 0)
    hidden = int(masks["hidden"].sum()) if "hidden" in masks else network.config.hidden_size
    units = {str(group.unit) for group in groups}
    return _Plan(units, blocks, kv_heads, each, _one(widths, "feed-forward units") or 0, hidden)


def _kept_heads(a: AttentionRoles, mask_of: dict[tuple[Any, int], Tensor], name: str) -> tuple[int, int]:
    """Key-value heads, and query heads for each of them."""
    each = a.heads // a.kv_heads
    kv_K = mask_of.get(("kv_group", id(a.out)), torch.ones(a.kv_heads, dtype=torch.bool))
    heads_H = mask_of.get(("head", id(a.out)), torch.ones(a.heads, dtype=torch.bool))
    if each == 1:
        kv_K = kv_K & heads_H
    counts = (heads_H & kv_K.repeat_interleave(each)).view(a.kv_heads, each).sum(1)[kv_K].tolist()
    if not any(counts):
        raise ValueError(f"{name!r} would have no head left; keep one at least, or remove the layer.")
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name!r}: {counts} query heads would stay for its key-value heads, but a configuration has one number "
            "for all of them; keep as many in each run of the group (Group.runs), or remove 'kv_group's as a whole."
        )
    return len(counts), counts[0]


def _one(counts: dict[str, Any], what: str) -> Any:
    """The number of all layers."""
    for name, count in counts.items():
        first = next(iter(counts))
        if count != counts[first]:
            raise ValueError(
                f"{first!r} would have {counts[first]} {what} and {name!r} {count}, but a configuration has one number "
                "for all layers; keep as many in each of them (groups that are not given stay whole)."
            )
    return next(iter(counts.values()), None)


def _checked(network: Network, plan: _Plan) -> Any:
    """The new configuration."""
    old = network.config
    if not network.head_dim_is_free and plan.units - {"layer", "ffn"}:
        d = network.attentions[0].head_dim
        if plan.heads * d != plan.hidden:
            raise ValueError(
                f"A {old.model_type!r} configuration has no head width: it is hidden size / heads, here {d}. "
                f"{plan.heads} heads and {plan.hidden} channels do not fit together; remove 'head' and 'hidden' at "
                f"once, so that {d} channels go for each head."
            )
    changes = _fields(network, plan)
    try:
        return type(old).from_dict({**old.to_dict(), **changes})
    except Exception as error:  # of many kinds, by family
        shown = ", ".join(f"{name}={value}" for name, value in changes.items() if value is not None)
        raise ValueError(f"{type(old).__name__} cannot say what would be left ({shown}): {error}") from error


def _fields(network: Network, plan: _Plan) -> dict[str, Any]:
    config, fields = network.config, dict[str, Any]()
    alias = getattr(config, "attribute_map", {})
    if "hidden" in plan.units:
        fields[alias.get("hidden_size", "hidden_size")] = plan.hidden
    if plan.heads and plan.units & {"head", "kv_group"}:
        fields[alias.get("num_attention_heads", "num_attention_heads")] = plan.heads
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = plan.kv_heads
    if plan.units - {"layer", "ffn"} and network.head_dim_is_free and network.attentions:
        fields["head_dim"] = network.attentions[0].head_dim
    if plan.width and plan.units & {"ffn", "hidden"}:
        fields["n_inner" if hasattr(config, "n_inner") else "intermediate_size"] = plan.width
    blocks, hidden = plan.blocks if "layer" in plan.units else None, plan.hidden if "hidden" in plan.units else None
    return fields | network.fields(network, blocks, hidden)


def _cuts(
    network: Network, groups: list[Group], masks: dict[str, Tensor], blocks: list[int]
) -> tuple[list[_Cut], list[nn.Parameter]]:
    """What to cut, and the parameters of removed blocks."""
    cuts: dict[int, _Cut] = {}
    for group in groups:
        for part in group.parts if group.unit != "layer" else ():
            p = part.parameter
            cut = cuts.setdefault(id(p), _Cut(part.name, p, {}))
            mask = cut.masks.setdefault(part.dim, torch.ones(p.shape[part.dim], dtype=torch.bool))
            mask.narrow(0, part.offset, group.size * part.width).logical_and_(
                masks[group.name].repeat_interleave(part.width)
            )
    gone = [p for i, block in enumerate(network.blocks) if i not in blocks for p in block.parameters()]
    return list(cuts.values()), gone


def _check_whole(network: Network) -> None:
    for name, p in network.module.named_parameters():
        if isinstance(p, DTensor):
            raise ValueError(
                f"{name!r} is sharded (a DTensor): every rank would have to cut another part of it. Shrink the model "
                "before a strategy shards it: in a callback's setup, or before the Trainer gets it."
            )


def _check_states(optimizer: torch.optim.Optimizer, cuts: list[_Cut]) -> None:
    for cut in cuts:
        for name, state in optimizer.state.get(cut.parameter, {}).items():
            if isinstance(state, Tensor) and state.numel() > 1 and state.shape != cut.parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(state.shape)} for {cut.name!r}, of "
                    f"shape {tuple(cut.parameter.shape)}: it cannot be cut with it. Shrink before the first step, or "
                    "use an optimizer whose states have the shape of the weights (AdamW)."
                )


def _cut_states(optimizer: torch.optim.Optimizer, cuts: list[_Cut], gone: list[nn.Parameter]) -> None:
    for cut in cuts:
        state = optimizer.state.get(cut.parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == cut.parameter.shape:
                state[name] = cut.of(value)
    dropped = {id(p) for p in gone}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in dropped]
    for p in gone:
        optimizer.state.pop(p, None)


def _remove_blocks(network: Network, kept: list[int]) -> None:
    """In place, since others hold the list; caches find their slots by ``layer_idx``."""
    for i in reversed(range(len(network.blocks))):
        if i not in kept:
            del network.blocks[i]
    network.roles[:] = [network.roles[i] for i in kept]
    for i, block in enumerate(network.blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment]


def _tell(network: Network, config: Any, plan: _Plan) -> None:
    """Write the new sizes to wherever the modules hold them."""
    for part in network.layers_and_norms():
        _resize(part)
    d = network.attentions[0].head_dim if network.attentions else 0
    sizes = {"hidden_size": plan.hidden, "embed_dim": plan.hidden, "split_size": plan.hidden}
    if network.attentions:
        sizes |= {"num_heads": plan.heads, "num_attention_heads": plan.heads, "all_head_size": plan.heads * d}
        sizes |= {"num_kv_heads": plan.kv_heads, "num_key_value_groups": plan.heads_each}
    if plan.width:
        sizes["intermediate_size"] = plan.width
    for module in network.holders():
        for name in sizes.keys() & vars(module).keys():
            setattr(module, name, sizes[name])
    given: list[Any] = [getattr(m, "config", None) for m in network.module.modules()]
    for old in {id(c): c for c in given if getattr(c, "model_type", None) == config.model_type}.values():
        before = old.to_dict()
        for name, value in config.to_dict().items():
            if before.get(name) != value:
                setattr(old, name, value)
    network.tidy(network)


def _resize(layer: Any) -> None:
    """The attributes in which a layer repeats the shape of its weight."""
    first, second = (*layer.weight.shape, None)[:2]
    if isinstance(layer, nn.Embedding):
        layer.embedding_dim = second
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (first,)
    elif type(layer).__name__ == "Conv1D":
        layer.nx, layer.nf = first, second
    elif hasattr(layer, "in_features"):
        layer.out_features, layer.in_features = first, second
