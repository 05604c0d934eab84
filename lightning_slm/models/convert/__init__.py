"""From Hugging Face's models to ours and back: the same function, its matrices stacked or split, and other names."""

from lightning_slm.models.convert.from_hf import CONVERTERS, Converter, from_hf
from lightning_slm.models.convert.llama import to_llama, to_llama_config
from lightning_slm.models.convert.rwkv import from_rwkv_cpp

__all__ = ["CONVERTERS", "Converter", "from_hf", "from_rwkv_cpp", "to_llama", "to_llama_config"]
