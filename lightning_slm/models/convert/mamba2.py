"""From Hugging Face's Mamba-2."""

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common

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


def from_mamba2_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Mamba-2 as a pattern of ours; its chunks are ours, since they change nothing but speed.

    Raises:
        ValueError: a variant that ours does not have, by name.
    """
    common.refuse_variants(
        "Mamba-2",
        hidden_act=(theirs.hidden_act, "silu"),
        use_bias=(theirs.use_bias, False),
        time_step_limit=(tuple(theirs.time_step_limit), (0.0, float("inf"))),
    )
    options = {
        "state_size": theirs.state_size,
        "head_dim": theirs.head_dim,
        "groups": theirs.n_groups,
        "conv_size": theirs.conv_kernel,
        "expand": theirs.expand,
        "conv_bias": theirs.use_conv_bias,
    }
    return common.state_space_config(theirs, "mamba2", options)


def names(name: str, config: SLMConfig) -> list[str]:
    """Mamba-2's parameter that one of ours is."""
    return common.state_space_names(name, _LAYER)
