"""Hugging Face's families and ours: which module plays which role.

Everything else about structured pruning (`structure`, `gates`, `shrink`) is the same for all of them. A new family is
one function here, from its network to `Network`, and a line in `FAMILIES`.
"""

# Letters: H = query heads, K = key-value heads, d = head width, D = width of the residual stream.

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_slm.pruning.structure_roles import (
    AttentionRoles,
    BlockRoles,
    FeedForwardRoles,
    Network,
    Rows,
    around,
    backbone,
)
from lightning_slm.pruning.structure_slm import slm_network


def network_in(model: nn.Module) -> Network:
    """The network of a known family that ``model`` is, or holds.

    Raises:
        ValueError: there is none, or there are several.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer, _ in found)
        # Of the class: wrappers (PEFT's) pass the attributes of what they wrap on as their own.
        is_model = hasattr(type(module), "base_model_prefix") and hasattr(module, "config")
        if is_model and module.config.model_type in FAMILIES and not inside:  # type: ignore[union-attr]
            found.append((name, module))
    known = ", ".join(FAMILIES)
    if not found:
        raise ValueError(
            f"A {type(model).__name__} holds no model whose heads, feed-forward units and residual stream are known; "
            f"there are the families {known} (by config.model_type)."
        )
    if len(found) > 1:
        names = " and ".join(repr(name) for name, _ in found)
        raise ValueError(f"A {type(model).__name__} holds several networks, {names}; give the one that is meant.")
    net: Any = found[0][1]
    return FAMILIES[net.config.model_type](net)


def _llama(net: Any) -> Network:
    """Llama, Mistral, Qwen2 (biases on q, k, v) and Qwen3 (norms over heads)."""
    base, config = backbone(net), net.config

    def block(module: Any) -> BlockRoles:
        a, f = module.self_attn, module.mlp
        norms = tuple(n for n in (getattr(a, "q_norm", None), getattr(a, "k_norm", None)) if n is not None)
        sizes = (config.num_attention_heads, config.num_key_value_heads, a.head_dim)
        attention = AttentionRoles(a, Rows(a.q_proj), Rows(a.k_proj), Rows(a.v_proj), a.o_proj, *sizes, norms)
        feed_forward = FeedForwardRoles(f, (Rows(f.gate_proj), Rows(f.up_proj)), f.down_proj, config.intermediate_size)
        return BlockRoles(module, attention, feed_forward, (module.input_layernorm, module.post_attention_layernorm))

    outside = around(net, base)
    norms = (base.norm, *outside.pop("norms"))
    roles = [block(m) for m in base.layers]
    return Network(net, config, base.layers, roles, True, (base.embed_tokens,), norms, _fields, **outside)


def _gpt2(net: Any) -> Network:
    base, config = backbone(net), net.config
    D, H = config.hidden_size, config.num_attention_heads

    def block(module: Any) -> BlockRoles:
        a, f = module.attn, module.mlp
        q, k, v = (Rows(a.c_attn, offset) for offset in (0, D, 2 * D))
        width = 4 * D if config.n_inner is None else config.n_inner
        feed_forward = FeedForwardRoles(f, (Rows(f.c_fc),), f.c_proj, width)
        return BlockRoles(
            module, AttentionRoles(a, q, k, v, a.c_proj, H, H, D // H), feed_forward, (module.ln_1, module.ln_2)
        )

    why = "scale_attn_by_inverse_layer_idx=True makes a block's scores depend on how many are below it"
    refusals = {"layer": why} if config.scale_attn_by_inverse_layer_idx else {}
    outside = around(net, base)
    norms = (base.ln_f, *outside.pop("norms"))
    parts = (base.h, [block(m) for m in base.h], False, (base.wte, base.wpe), norms)
    return Network(net, config, *parts, _fields, refusals=refusals, **outside)


def _bert(net: Any) -> Network:
    base, config = backbone(net), net.config
    D, H = config.hidden_size, config.num_attention_heads

    def block(module: Any) -> BlockRoles:
        a, out, f = module.attention.self, module.attention.output, module.output
        attention = AttentionRoles(a, Rows(a.query), Rows(a.key), Rows(a.value), out.dense, H, H, D // H)
        feed_forward = FeedForwardRoles(f, (Rows(module.intermediate.dense),), f.dense, config.intermediate_size)
        return BlockRoles(module, attention, feed_forward, (out.LayerNorm, f.LayerNorm))

    e, blocks = base.embeddings, base.encoder.layer
    outside = around(net, base)
    norms = (e.LayerNorm, *outside.pop("norms"))
    if base.pooler is not None:
        outside["through"] += (base.pooler.dense,)
    embeddings = (e.word_embeddings, e.position_embeddings, e.token_type_embeddings)
    return Network(net, config, blocks, [block(m) for m in blocks], False, embeddings, norms, _fields, **outside)


def _fields(network: Network, kept: list[int] | None, hidden: int | None) -> dict[str, Any]:
    config, fields = network.config, dict[str, Any]()
    if kept is None:
        return fields
    fields[getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if getattr(config, "layer_types", None):
        fields["layer_types"] = [config.layer_types[i] for i in kept]
    if getattr(config, "max_window_layers", None) is not None:
        fields["max_window_layers"] = sum(i < config.max_window_layers for i in kept)
    return fields


FAMILIES: dict[str, Callable[[Any], Network]] = {
    "slm": slm_network, "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama,
    "gpt2": _gpt2, "bert": _bert,
}  # fmt: skip
