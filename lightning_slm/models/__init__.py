"""Architectures as Hugging Face models, and the published configurations."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from lightning_slm.models.cache import SLMCache
from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.encoder_presets import ENCODERS
from lightning_slm.models.encoders import SLMForMaskedLM, SLMForSequenceClassification
from lightning_slm.models.loading import load_causal_lm, load_model
from lightning_slm.models.modeling import SLMForCausalLM, SLMModel
from lightning_slm.models.preset import Preset
from lightning_slm.models.presets import PRESETS

__all__ = [
    "ENCODERS",
    "PRESETS",
    "Preset",
    "SLMCache",
    "SLMConfig",
    "SLMForCausalLM",
    "SLMForMaskedLM",
    "SLMForSequenceClassification",
    "SLMModel",
    "load_causal_lm",
    "load_model",
]

AutoConfig.register("slm", SLMConfig, exist_ok=True)
AutoModel.register(SLMConfig, SLMModel, exist_ok=True)
AutoModelForCausalLM.register(SLMConfig, SLMForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(SLMConfig, SLMForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(SLMConfig, SLMForSequenceClassification, exist_ok=True)
