"""From Hugging Face's Mamba-2."""

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig

# Ours within a block -> theirs within a layer.
_LAYER = {
    "token_norm.weight": "norm.weight",
    "token_mixer.in_proj.weight": "mixer.in_proj.weight",
    "token_mixer.conv.weight": "mixer.conv1d.weight",
    "token_mixer.conv.bias": "mixer.conv1d.bias",
    "token_mixer.dt_bias": "mixer.dt_bias",
    "token_mixer.A_log": "mixer.A_log",
    "token_mixer.D": "mixer.D",
    "token_mixer.norm.weight": "mixer.norm.weight",
    "token_mixer.out_proj.weight": "mixer.out_proj.weight",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.norm.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_SAME_VALUES = (
    "vocab_size", "hidden_size", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
_ANY_LENGTH = 1_048_576  # a state does not mind: tokens that the configuration allows


def from_mamba2_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Mamba-2 as a pattern of ours; its chunks are ours, since they change nothing but speed.

    Raises:
        ValueError: a variant that ours does not have, by name.
    """
    variants = {
        "hidden_act": (theirs.hidden_act, "silu"),
        "use_bias": (theirs.use_bias, False),
        "time_step_limit": (tuple(theirs.time_step_limit), (0.0, float("inf"))),
    }
    if unknown := {name: given for name, (given, ours) in variants.items() if given != ours}:
        raise ValueError(f"from_hf: ours has no such variant of Mamba-2: {unknown}.")
    options = {
        "state_size": theirs.state_size,
        "head_dim": theirs.head_dim,
        "groups": theirs.n_groups,
        "conv_size": theirs.conv_kernel,
        "expand": theirs.expand,
        "conv_bias": theirs.use_conv_bias,
    }
    return SLMConfig(
        **{name: getattr(theirs, name) for name in _SAME_VALUES},
        pattern=f"mamba2/-*{theirs.num_hidden_layers}",
        mixers={"mamba2": options},
        num_attention_heads=1,  # there is none, but the width is divided by it
        positions="none",
        max_position_embeddings=_ANY_LENGTH,
        rms_norm_eps=theirs.layer_norm_epsilon,
    )


def names(name: str, config: SLMConfig) -> list[str]:
    """Mamba-2's parameter that one of ours is."""
    if name in _OUTSIDE:
        return [_OUTSIDE[name]]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return [f"backbone.layers.{layer}.{_LAYER[rest]}"]
