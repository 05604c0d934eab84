"""From Hugging Face's Mamba."""

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig

# Ours within a block -> theirs within a layer.
_LAYER = {
    "token_norm.weight": "norm.weight",
    "token_mixer.in_proj.weight": "mixer.in_proj.weight",
    "token_mixer.ssm.conv.weight": "mixer.conv1d.weight",
    "token_mixer.ssm.conv.bias": "mixer.conv1d.bias",
    "token_mixer.ssm.x_proj.weight": "mixer.x_proj.weight",
    "token_mixer.ssm.dt_proj.weight": "mixer.dt_proj.weight",
    "token_mixer.ssm.dt_proj.bias": "mixer.dt_proj.bias",
    "token_mixer.ssm.A_log": "mixer.A_log",
    "token_mixer.ssm.D": "mixer.D",
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


def from_mamba_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Mamba as a pattern of ours.

    Raises:
        ValueError: a variant that ours does not have, by name.
    """
    variants = {"hidden_act": (theirs.hidden_act, "silu"), "use_bias": (theirs.use_bias, False)}
    if unknown := {name: given for name, (given, ours) in variants.items() if given != ours}:
        raise ValueError(f"from_hf: ours has no such variant of Mamba: {unknown}.")
    options = {
        "state_size": theirs.state_size,
        "conv_size": theirs.conv_kernel,
        "expand": theirs.intermediate_size / theirs.hidden_size,
        "dt_rank": theirs.time_step_rank,
        "conv_bias": theirs.use_conv_bias,
    }
    return SLMConfig(
        **{name: getattr(theirs, name) for name in _SAME_VALUES},
        pattern=f"mamba/-*{theirs.num_hidden_layers}",
        mixers={"mamba": options},
        num_attention_heads=1,  # there is none, but the width is divided by it
        positions="none",
        max_position_embeddings=_ANY_LENGTH,
        rms_norm_eps=theirs.layer_norm_epsilon,
    )


def names(name: str, config: SLMConfig) -> list[str]:
    """Mamba's parameter that one of ours is."""
    if name in _OUTSIDE:
        return [_OUTSIDE[name]]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return [f"backbone.layers.{layer}.{_LAYER[rest]}"]
