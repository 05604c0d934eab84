"""From Hugging Face's Jamba (Lieber et al. 2024, https://arxiv.org/abs/2403.19887): state spaces, now and then
attention without positions, and experts in every other layer.
"""

from typing import Any

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common
from lightning_slm.models.convert.mixtral import expert_part, experts

# Ours within a block -> Jamba's within a layer.
_LAYER = {
    "token_norm.weight": ["input_layernorm.weight"],
    "channel_norm.weight": ["pre_ff_layernorm.weight"],
    "token_mixer.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "token_mixer.o_proj.weight": ["self_attn.o_proj.weight"],
    "channel_mixer.gate_up_proj.weight": [f"feed_forward.{part}_proj.weight" for part in ("gate", "up")],
    "channel_mixer.down_proj.weight": ["feed_forward.down_proj.weight"],
}
# Ours within a Mamba -> Jamba's.
_MAMBA = {
    "ssm.conv": "conv1d", "ssm.dt_norm": "dt_layernorm", "ssm.b_norm": "b_layernorm", "ssm.c_norm": "c_layernorm",
}  # fmt: skip
_OUTSIDE = {"model.norm.weight": "model.final_layernorm.weight"}


def from_jamba_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Jamba as a pattern of ours.

    Raises:
        ValueError: a variant that ours does not have.
    """
    common.refuse_variants(
        "Jamba", hidden_act=(theirs.hidden_act, "silu"), mamba_proj_bias=(theirs.mamba_proj_bias, False)
    )
    mambas = [kind == "mamba" for kind in theirs.layers_block_type]
    moes = [number > 1 for number in theirs.layers_num_experts]
    blocks = [f"{'mamba' if a else 'attn'}/{'moe' if b else 'mlp'}" for a, b in zip(mambas, moes)]
    mixers = {"mamba": _mamba(theirs)} if any(mambas) else {}
    if any(moes):
        mixers["moe"] = experts(theirs, sum(moes), normalize_topk=False)
    return SLMConfig(
        **common.same_values(theirs, *common.TRANSFORMER),
        head_dim=getattr(theirs, "head_dim", None),
        pattern=_repeating(blocks),
        mixers=mixers or None,
        positions="none",
    )


def _mamba(theirs: PreTrainedConfig) -> dict[str, Any]:
    return {
        "state_size": theirs.mamba_d_state,
        "conv_size": theirs.mamba_d_conv,
        "expand": theirs.mamba_expand,
        "dt_rank": theirs.mamba_dt_rank,
        "conv_bias": theirs.mamba_conv_bias,
        "norms": True,
    }


def _repeating(blocks: list[str]) -> str:
    """The shortest way to write the pattern as one part that repeats.

    >>> _repeating(["a/b", "c/d"] * 3)
    '(a/b c/d)*3'
    """
    lengths = [n for n in range(1, len(blocks) + 1) if blocks == blocks[:n] * (len(blocks) // n)]
    times, unit = len(blocks) // lengths[0], " ".join(blocks[: lengths[0]])
    return unit if times == 1 else f"({unit})*{times}"


def names(name: str, config: SLMConfig) -> list[Any]:
    """Jamba's parameters that one of ours is stacked from; (name, i): the i-th of a stack."""
    if not name.startswith("model.layers."):
        return [_OUTSIDE.get(name, name)]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    prefix = f"model.layers.{layer}"
    if rest in _LAYER:
        return [f"{prefix}.{part}" for part in _LAYER[rest]]
    mixer, _, inside = rest.partition(".")
    if mixer == "channel_mixer":
        return [expert_part(f"{prefix}.feed_forward", inside, router="router")]
    for ours, part in _MAMBA.items():
        if inside.startswith(f"{ours}."):
            return [f"{prefix}.mamba.{inside.replace(ours, part)}"]
    return [f"{prefix}.mamba.{inside.removeprefix('ssm.')}"]
