"""Our own models: which module plays which role. What a block holds may be shared with others, and then stands in
``shared``; mixers of many kinds stand beside each other.
"""

# Letters: H = query heads, K = key-value heads, d = head width, D = width of the residual stream.

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from lightning_slm.pruning.structure_roles import (
    AttentionRoles,
    BlockRoles,
    FeedForwardRoles,
    Network,
    OtherRoles,
    Rows,
    around,
    backbone,
)


def slm_network(net: Any) -> Network:
    """The roles in a model of ours, under any head."""
    base, config, roles = backbone(net), net.config, dict[int, Any]()
    for _, name, mixer in _mixers(base.layers, base.shared):
        if id(mixer) not in roles:  # a shared one has one role
            roles[id(mixer)] = _MAKE[name](mixer) if name in _MAKE else None

    def block(module: Any) -> BlockRoles:
        norms = tuple(n for n in (module.token_norm, module.channel_norm) if n is not None)
        has = [roles[id(m)] for _, _, m in _mixers([module], base.shared)]
        attention = next((r for r in has if isinstance(r, AttentionRoles)), None)
        feed_forward = next((r for r in has if isinstance(r, FeedForwardRoles)), None)
        others = tuple(r for r in has if isinstance(r, OtherRoles))
        return BlockRoles(module, attention, feed_forward, norms, others)

    outside = around(net, base)
    norms = (*(n for n in (base.embed_norm,) if n is not None), base.norm, *outside.pop("norms"))
    embeddings = tuple(e for e in (base.embed_tokens, base.embed_positions) if e is not None)
    parts = (base.layers, [block(m) for m in base.layers], True, embeddings, norms)
    aside, refusals = _aside(base), _refusals(base, config)
    return Network(net, config, *parts, _fields, aside=aside, refusals=refusals, tidy=_tidy, **outside)


def _fused_attention(a: Any) -> AttentionRoles:
    H, K, d = a.num_heads, a.num_kv_heads, a.head_dim
    q, k, v = (Rows(a.qkv_proj, offset) for offset in (0, H * d, (H + K) * d))
    return AttentionRoles(a, q, k, v, a.o_proj, H, K, d)


def _fused_glu(f: Any) -> FeedForwardRoles:
    width = f.down_proj.in_features
    return FeedForwardRoles(f, (Rows(f.gate_up_proj), Rows(f.gate_up_proj, width)), f.down_proj, width)


def _mlp(f: Any) -> FeedForwardRoles:
    return FeedForwardRoles(f, (Rows(f.up_proj),), f.down_proj, f.down_proj.in_features)


def _other(m: Any) -> OtherRoles:
    return OtherRoles(m, m.in_proj, m.out_proj)


_MAKE: dict[str, Callable[[Any], Any]] = {
    "attn": _fused_attention, "swa": _fused_attention,
    "mlp": _fused_glu, "smooth_mlp": _fused_glu, "relu_glu": _fused_glu,
    "relu_mlp": _mlp, "relu2_mlp": _mlp, "gelu_mlp": _mlp,
    "mamba": _other, "mamba2": _other, "mobilebert_ffn": _other,
}  # fmt: skip
# Mixers whose sizes do not follow from the number of heads, or from the intermediate size.
_HEADLESS = ("mamba", "mamba2", "rwkv4")
_OWN_WIDTH = ("mobilebert_ffn",)
# Mixers that read what one in an earlier block has left for them.
_LINKED = ("hymba_reuse", "hymba_swa_reuse", "rwkv7", "rwkv7_first")


def _mixers(layers: Iterable[Any], shared: Any) -> Iterator[tuple[str, str, Any]]:
    """Kind, name and module of every mixer of these blocks."""
    for block in layers:
        for kind in ("token", "channel"):
            spec, module = getattr(block.spec, kind), getattr(block, f"{kind}_mixer")
            if spec is not None:
                yield kind, spec.name, shared[_written(spec)] if module is None else module


def _aside(base: Any) -> dict[str, list[nn.Module]]:
    mixers = list(_mixers(base.layers, base.shared))
    meta = [base.meta_tokens] if base.meta_tokens is not None else []
    no_heads = [m for kind, name, m in mixers if kind == "channel" or name in _HEADLESS]
    no_width = [m for kind, name, m in mixers if kind == "token" or name in _OWN_WIDTH]
    others = [m for _, name, m in mixers if _MAKE.get(name) is _other]
    return {"head": no_heads + meta, "kv_group": no_heads + meta, "ffn": no_width + meta, "hidden": others}


def _refusals(base: Any, config: Any) -> dict[str, str]:
    if config.reversible:
        return dict.fromkeys(("head", "kv_group", "ffn", "hidden", "layer"), "reversible=True runs blocks in parts")
    linked = [name for _, name, _ in _mixers(base.layers, base.shared) if name in _LINKED]
    return {"layer": f"{linked[0]!r} reads what another block has left for it"} if linked else {}


def _fields(network: Network, kept: list[int] | None, hidden: int | None) -> dict[str, Any]:
    config, base = network.config, backbone(network.module)
    layers: list[Any] = [network.blocks[i] for i in (range(len(network.blocks)) if kept is None else kept)]
    mixers = {name: mixer for _, name, mixer in _mixers(layers, base.shared)}
    options = {name: given for name, given in (config.mixers or {}).items() if name in mixers}
    if hidden is not None:
        options |= {name: config.options(name) | _own_width(name, m, hidden) for name, m in mixers.items()}
    fields: dict[str, Any] = {"mixers": {name: given for name, given in options.items() if given} or None}
    if kept is not None:
        windowed = any("sliding" in str(getattr(mixer, "cache_type", None)) for mixer in mixers.values())
        fields["pattern"] = _run_lengths([f"{_written(b.spec.token)}/{_written(b.spec.channel)}" for b in layers])
        fields["sliding_window"] = config.sliding_window if windowed else None
        fields |= {"num_hidden_layers": None, "layer_types": None}  # these follow from the pattern
    return fields


def _own_width(name: str, mixer: Any, hidden: int) -> dict[str, Any]:
    """Options that keep a mixer's inside as it is, where it would follow from the model's width."""
    if name == "mobilebert_ffn":
        return {"bottleneck": mixer.in_proj.out_features}
    if name == "mamba":
        return {"expand": mixer.out_proj.in_features / hidden, "dt_rank": mixer.ssm.dt_rank}
    if name == "mamba2":
        expand = mixer.intermediate_size / hidden
        if expand * hidden / mixer.head_dim != mixer.num_heads:
            raise ValueError(
                f"mamba2: no expand makes {mixer.num_heads} heads of {mixer.head_dim} from a width of {hidden}; "
                "keep another number of channels."
            )
        return {"expand": expand}
    return {}


def _tidy(network: Network) -> None:
    shared = backbone(network.module).shared
    specs: list[Any] = [block.spec for block in network.blocks]
    used = {_written(s) for spec in specs for s in (spec.token, spec.channel) if s is not None}
    for key in shared.keys() - used:
        del shared[key]


def _written(spec: Any) -> str:
    """As it stands in a pattern."""
    return "-" if spec is None else spec.name if spec.label is None else f"{spec.name}@{spec.label}"


def _run_lengths(names: list[str]) -> str:
    """The pattern of these blocks.

    >>> _run_lengths(["attn/mlp", "attn/mlp", "swa/mlp"])
    'attn/mlp*2 swa/mlp'
    """
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return " ".join(name if n == 1 else f"{name}*{n}" for name, n in runs)
