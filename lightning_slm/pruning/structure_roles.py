"""The roles that modules play in a model, as far as structured pruning has to know: where heads, feed-forward units and
the residual stream are. `structure_families` finds them.
"""

# Letters: H = query heads, K = key-value heads, d = head width, D = width of the residual stream.

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Outputs of a layer, from ``offset`` on: several matrices may be stacked in one."""

    layer: nn.Module
    offset: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class AttentionRoles:
    """Query head h reads key-value head ``h // (heads // kv_heads)``."""

    module: nn.Module
    query: Rows
    key: Rows
    value: Rows
    out: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[nn.Module, ...] = ()  # over the width of one head, the same for all

    @property
    def layers(self) -> list[nn.Module]:
        """Those that read the residual stream."""
        return once(rows.layer for rows in (self.query, self.key, self.value))


@dataclass(frozen=True, eq=False, slots=True)
class FeedForwardRoles:
    """Unit i is row i of each of ``into`` and column i of ``out``."""

    module: nn.Module
    into: tuple[Rows, ...]
    out: nn.Module
    width: int

    @property
    def layers(self) -> list[nn.Module]:
        """Those that read the residual stream."""
        return once(rows.layer for rows in self.into)


@dataclass(frozen=True, eq=False, slots=True)
class OtherRoles:
    """A mixer whose inside has no units of ours, between a layer that reads the residual stream and one that writes."""

    module: nn.Module
    into: nn.Module
    out: nn.Module


@dataclass(frozen=True, eq=False, slots=True)
class BlockRoles:
    """One block; None for what it has not, or has of a kind without roles. Two blocks may share what they hold."""

    module: nn.Module
    attention: AttentionRoles | None
    feed_forward: FeedForwardRoles | None
    norms: tuple[nn.Module, ...]
    others: tuple[OtherRoles, ...] = ()


@dataclass(eq=False, slots=True)
class Network:
    """A model whose roles are known, and how its configuration says its sizes.

    Attributes:
        module: what has the configuration; names are relative to it.
        head_dim_is_free: whether the configuration can say a head width other than hidden size / heads.
        embeddings: write to the residual stream.
        norms: of the residual stream, outside of the blocks; last the one before the head.
        readers: of the residual stream, outside of the blocks: output heads.
        through: from the stream's channels to as many of its own, which are removed with them (BERT's pooler).
        aside: by unit, modules that have nothing to do with it.
        refusals: by unit, why it cannot be removed.
        fields: the configuration's fields, beside plain sizes, that change when these blocks stay (None: all) and the
            stream has this width (None: its own).
        tidy: drops what nothing uses once blocks are gone.
    """

    module: nn.Module
    config: Any
    blocks: nn.ModuleList
    roles: list[BlockRoles]
    head_dim_is_free: bool
    embeddings: tuple[nn.Module, ...]
    norms: tuple[nn.Module, ...]
    fields: Callable[["Network", list[int] | None, int | None], dict[str, Any]]
    readers: tuple[nn.Module, ...] = ()
    through: tuple[nn.Module, ...] = ()
    aside: Mapping[str, list[nn.Module]] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    tidy: Callable[["Network"], None] = lambda network: None

    @property
    def attentions(self) -> list[AttentionRoles]:
        return once(b.attention for b in self.roles if b.attention is not None)

    @property
    def feed_forwards(self) -> list[FeedForwardRoles]:
        return once(b.feed_forward for b in self.roles if b.feed_forward is not None)

    @property
    def others(self) -> list[OtherRoles]:
        return once(other for b in self.roles for other in b.others)

    @property
    def all_norms(self) -> list[nn.Module]:
        """All that norm the residual stream."""
        return once((*self.norms, *(n for block in self.roles for n in block.norms)))

    @property
    def reading(self) -> list[nn.Module]:
        """All layers whose inputs are the channels of the residual stream."""
        inside = [p.layers for p in self.attentions] + [p.layers for p in self.feed_forwards]
        inside.append([p.into for p in self.others])
        return [*(layer for layers in inside for layer in layers), *self.through, *self.readers]

    @property
    def writing(self) -> list[nn.Module]:
        """All layers whose outputs are the channels of the residual stream."""
        inside = [p.out for p in self.attentions] + [p.out for p in self.feed_forwards] + [p.out for p in self.others]
        return [*self.embeddings, *inside, *self.through]

    def layers_and_norms(self) -> list[Any]:
        """All whose weights are ever cut."""
        return once((*self.reading, *self.writing, *self.all_norms))

    def holders(self) -> list[nn.Module]:
        """Modules that may hold sizes as attributes."""
        parts: list[Any] = [*self.roles, *self.attentions, *self.feed_forwards]
        return [part.module for part in parts]

    def stranger(self, unit: str) -> tuple[str, nn.Module] | None:
        """The first module with parameters whose role for this unit is not known; of several in one, their parent."""
        known = {id(m) for m in (*self.reading, *self.writing, *self.all_norms)}
        known |= {id(n) for a in self.attentions for n in a.norms}
        known |= {id(m) for outer in self.aside.get(unit, ()) for m in outer.modules()}
        strange = {id(m) for m in self.module.modules() if _has_own(m) and id(m) not in known}
        for name, module in self.module.named_modules():  # parents first: an unknown mixer, not its first layer
            inside = {id(m) for m in module.modules()}
            if id(module) in strange or (inside & strange and not inside & known):
                return name, module
        return None


# They hold, beside layers of their own, a second name of a layer's bias.
_BIAS_HOLDERS = ("BertLMPredictionHead",)


def _has_own(module: nn.Module) -> bool:
    own = any(p is not None for p in module._parameters.values())
    return own and type(module).__name__ not in _BIAS_HOLDERS


def once(things: Iterable[Any]) -> list[Any]:
    """Each of them once, by identity."""
    return list({id(thing): thing for thing in things}.values())


def backbone(net: Any) -> Any:
    """What a Hugging Face model has below its head; a model without a head is its own."""
    return getattr(net, net.base_model_prefix, net)


# Outside of the backbone, by their names.
_READERS = ("lm_head", "score", "classifier", "qa_outputs", "cls.predictions.decoder", "cls.seq_relationship")
_THROUGH = ("cls.predictions.transform.dense", "head_dense")
_NORMS = ("cls.predictions.transform.LayerNorm", "head_norm")


def around(net: Any, base: nn.Module) -> dict[str, Any]:
    """What stands around the backbone."""
    modules = dict(net.named_modules()) if net is not base else {}
    found = {"readers": _READERS, "through": _THROUGH, "norms": _NORMS}
    return {role: tuple(modules[name] for name in names if name in modules) for role, names in found.items()}
