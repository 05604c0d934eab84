"""Published configurations, each with its source and its exact number of parameters."""

from dataclasses import dataclass
from typing import Any

from lightning_slm.models.configuration import SLMConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """One published configuration.

    Attributes:
        config: arguments of ``SLMConfig``.
        parameters: number of parameters, those shared counted once.
        source: where the configuration comes from.
    """

    config: dict[str, Any]
    parameters: int
    source: str

    def build_config(self, **overrides: Any) -> SLMConfig:
        """The configuration, with single values replaced."""
        return SLMConfig(**{**self.config, **overrides})


PRESETS: dict[str, Preset] = {
    "slm-5m": Preset(
        dict(
            vocab_size=4096, hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=4,
            pattern="attn/mlp*5", max_position_embeddings=1024, rms_norm_eps=1e-6, tie_word_embeddings=True,
        ),
        5_065_472,
        "ours: what two cores train in minutes",
    ),
}  # fmt: skip
