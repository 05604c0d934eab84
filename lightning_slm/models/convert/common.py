"""What the converters share: values that go by the same name in both, refusals, and the shell of the two Mambas."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig

ANY_LENGTH = 1_048_576  # a state does not mind: tokens that the configuration allows
_EVERYWHERE = ("vocab_size", "hidden_size", "tie_word_embeddings", "bos_token_id", "eos_token_id")
# Of every architecture here but RWKV.
MOST = ("initializer_range", "pad_token_id")
# Of those with attention and feed-forward layers.
TRANSFORMER = (
    *MOST, "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
# Ours outside of the blocks -> that of Mamba and Mamba-2.
_BACKBONE = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.norm.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}


def same_values(config: PreTrainedConfig, *more: str) -> dict[str, Any]:
    """What has the same name and meaning in both: for every architecture, and ``more``."""
    return {name: getattr(config, name) for name in (*_EVERYWHERE, *more)}


def refuse_variants(kind: str, **variants: tuple[Any, Any]) -> None:
    """Say no to what would need layers that ours does not have.

    Args:
        kind: the architecture, for the message.
        variants: by the name of theirs, what was given and the one value that ours has.

    Raises:
        ValueError: some were given otherwise; names them all.

    >>> refuse_variants("Llama", hidden_act=("gelu", "silu"), mlp_bias=(False, False))
    Traceback (most recent call last):
    ValueError: from_hf: ours has no such variant of Llama: hidden_act='gelu' (must be 'silu').
    """
    unknown = [f"{name}={given!r} (must be {ours!r})" for name, (given, ours) in variants.items() if given != ours]
    if unknown:
        raise ValueError(f"from_hf: ours has no such variant of {kind}: {', '.join(unknown)}.")


def state_space_config(theirs: PreTrainedConfig, mixer: str, options: dict[str, Any]) -> SLMConfig:
    """The configuration of a Mamba or Mamba-2: one mixer in every block, nothing behind it, and no end of the text."""
    return SLMConfig(
        **same_values(theirs, *MOST),
        pattern=f"{mixer}/-*{theirs.num_hidden_layers}",
        mixers={mixer: options},
        num_attention_heads=1,  # there is none, but the width is divided by it
        positions="none",
        max_position_embeddings=ANY_LENGTH,
        rms_norm_eps=theirs.layer_norm_epsilon,
    )


def state_space_names(name: str, inside: Mapping[str, str]) -> list[str]:
    """The parameter of a Mamba or Mamba-2 that one of ours is.

    Args:
        inside: ours within a block -> theirs within a layer.
    """
    if name in _BACKBONE:
        return [_BACKBONE[name]]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return [f"backbone.layers.{layer}.{inside[rest]}"]
