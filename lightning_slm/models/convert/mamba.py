"""From Hugging Face's Mamba."""

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common

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


def from_mamba_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Mamba as a pattern of ours.

    Raises:
        ValueError: a variant that ours does not have, by name.
    """
    common.refuse_variants("Mamba", hidden_act=(theirs.hidden_act, "silu"), use_bias=(theirs.use_bias, False))
    options = {
        "state_size": theirs.state_size,
        "conv_size": theirs.conv_kernel,
        "expand": theirs.intermediate_size / theirs.hidden_size,
        "dt_rank": theirs.time_step_rank,
        "conv_bias": theirs.use_conv_bias,
    }
    return common.state_space_config(theirs, "mamba", options)


def names(name: str, config: SLMConfig) -> list[str]:
    """Mamba's parameter that one of ours is."""
    return common.state_space_names(name, _LAYER)
