"""Every mixer of the registry at tiny size, and how to build a model around it; what the mixers' tests share."""

# Shape letters: B = batch, T = tokens, V = vocabulary.

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_slm.models import SLMConfig, SLMForCausalLM

V = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Tiny:
    """A pattern that shows a mixer, with the values of the configuration that it needs.

    Args:
        pattern: blocks.
        values: further arguments of ``SLMConfig``.
        flat_state: whether its cache stops growing with the text.
        packs: whether it keeps packed documents apart; False: it refuses them.
    """

    pattern: str
    values: dict[str, Any] = field(default_factory=dict)
    flat_state: bool = False
    packs: bool = True


# Token mixers that decoders can use; the name is the registry's.
DECODERS = {
    "attn": Tiny("attn/mlp*2"),
    "swa": Tiny("swa/mlp*2", {"sliding_window": 4}, flat_state=True),
}
# Token mixers that encoders can use.
ENCODERS = {
    "attn": Tiny("attn/mlp*2"),
}
# Channel mixers, behind attention.
CHANNELS = {
    "mlp": Tiny("attn/mlp*2"),
    "smooth_mlp": Tiny("attn/smooth_mlp*2"),
}


def config_of(tiny: Tiny, **values: Any) -> SLMConfig:
    # Large weights: with the usual small ones, early tokens hardly matter and a wrong mask would not show.
    common = {"vocab_size": V, "max_position_embeddings": 128, "initializer_range": 0.3, **SIZES}
    return SLMConfig(**{**common, "pattern": tiny.pattern, **tiny.values, **values})


def decoder(tiny: Tiny, **values: Any) -> SLMForCausalLM:
    """A decoder around the mixer, with random weights that all matter."""
    return SLMForCausalLM(config_of(tiny, **values)).eval()


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(1, V, (batch, length))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Logits here are of size 10, so this is near float32's own rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
