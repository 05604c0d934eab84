"""Architectures as Hugging Face models, and the published configurations."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_slm.models.cache import SLMCache
from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.loading import load_causal_lm
from lightning_slm.models.modeling import SLMForCausalLM, SLMModel
from lightning_slm.models.presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "SLMCache", "SLMConfig", "SLMForCausalLM", "SLMModel", "load_causal_lm"]

AutoConfig.register("slm", SLMConfig, exist_ok=True)
AutoModel.register(SLMConfig, SLMModel, exist_ok=True)
AutoModelForCausalLM.register(SLMConfig, SLMForCausalLM, exist_ok=True)
