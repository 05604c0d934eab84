"""To and from Hugging Face's Llama (and Mistral, which is Llama with a window)."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common
from lightning_slm.models.modeling import SLMForCausalLM

# Ours within a block -> Llama's within a layer; several: stacked along the outputs, in this order.
_LAYER = {
    "token_norm": ("input_layernorm",),
    "token_mixer.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "token_mixer.o_proj": ("self_attn.o_proj",),
    "channel_norm": ("post_attention_layernorm",),
    "channel_mixer.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "channel_mixer.down_proj": ("mlp.down_proj",),
}
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_VALUES = (*common.TRANSFORMER, "head_dim")


def to_llama(model: SLMForCausalLM) -> LlamaForCausalLM:
    """The same function as ``LlamaForCausalLM``: what llama.cpp, vLLM and every other runtime reads.

    Raises:
        ValueError: the pattern holds something that Llama does not have.
    """
    theirs = LlamaForCausalLM(to_llama_config(model.config))
    nn.Module.to(theirs, model.dtype)
    target = theirs.state_dict()
    with torch.no_grad():
        for name, source in model.state_dict().items():
            parts = names(name)
            for part, rows in zip(parts, source.split([len(target[part]) for part in parts])):
                target[part].copy_(rows)
    theirs.generation_config = model.generation_config
    return theirs.train(model.training)


def from_llama_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Llama or Mistral as a pattern of ours."""
    rope = dict(theirs.rope_parameters)
    common.refuse_variants(
        "Llama",
        rope_type=(rope.get("rope_type", "default"), "default"),
        hidden_act=(theirs.hidden_act, "silu"),
        attention_bias=(getattr(theirs, "attention_bias", False), False),
        mlp_bias=(getattr(theirs, "mlp_bias", False), False),
    )
    window = getattr(theirs, "sliding_window", None)
    return SLMConfig(
        **common.same_values(theirs, *_VALUES),
        pattern=f"{'attn' if window is None else 'swa'}/mlp*{theirs.num_hidden_layers}",
        sliding_window=window,
        rope_theta=rope["rope_theta"],
    )


def to_llama_config(ours: PreTrainedConfig) -> LlamaConfig:
    """The configuration of a pure ``attn/mlp`` model as Llama's.

    Raises:
        ValueError: another pattern; says which block.
    """
    for i, block in enumerate(ours.blocks):
        held = [None if spec is None else (spec.name, spec.label) for spec in (block.token, block.channel)]
        if held not in ([("attn", None), ("mlp", None)], [("attn", None), ("smooth_mlp", None)]):
            raise ValueError(
                f"to_hf: block {i} of pattern {ours.pattern!r} is no plain attn/mlp of its own, as all of Llama's are; "
                "save_pretrained keeps the model as it is."
            )
    if ours.repeat != 1:
        raise ValueError(f"to_hf: repeat={ours.repeat} runs blocks several times, Llama runs each once.")
    return LlamaConfig(
        **common.same_values(ours, *_VALUES),
        num_hidden_layers=len(ours.blocks),
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
    )


def names(name: str) -> list[str]:
    """Llama's parameters that one of ours is stacked from."""
    if name in _OUTSIDE:
        return [name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, attribute = rest.rpartition(".")
    if not name.startswith("model.layers.") or module not in _LAYER or attribute != "weight":
        raise ValueError(
            f"{name!r} has no place in a Llama; undo what changed the layer (quantisation, adapters) first."
        )
    return [f"model.layers.{prefix}.{part}.weight" for part in _LAYER[module]]
