"""What a preset is: a named configuration, its exact size, and where it comes from."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """One published configuration.

    Attributes:
        config: arguments of ``SLMConfig``; with "model_type", of that configuration of Hugging Face's.
        parameters: number of parameters, those shared counted once.
        source: where the configuration comes from.
    """

    config: dict[str, Any]
    parameters: int
    source: str

    def build_config(self, **overrides: Any) -> PreTrainedConfig:
        """The configuration, with single values replaced."""
        values = {**self.config, **overrides}
        return AutoConfig.for_model(**values) if "model_type" in values else SLMConfig(**values)
