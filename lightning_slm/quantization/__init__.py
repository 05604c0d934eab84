"""Low-bit numbers: training in them, fake quantisation while training, and weights in few bits afterwards.

What stands on torchao or bitsandbytes is imported when it is first used: importing those takes seconds.
"""

from importlib import import_module

from lightning_slm.quantization.bitnet import BitLinear, bitnet_, set_share_
from lightning_slm.quantization.fake import (
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
)
from lightning_slm.quantization.int4 import int4_
from lightning_slm.quantization.int4_kernel import use_int4_kernel_
from lightning_slm.quantization.int8 import int8_
from lightning_slm.quantization.packed import PackedBitLinear, PackedEmbedding, PackedLinear
from lightning_slm.quantization.qat import (
    SCHEMES,
    LayerQuant,
    convert_qat_,
    enable_fake_quant_,
    fake_quant_layers,
    prepare_qat_,
    quantize_layer,
    unprepare_qat_,
)

_ON_DEMAND = {"float8_": "float8", "llm_int8_": "bnb", "nf4_": "bnb"}  # name -> its module

__all__ = [
    "SCHEMES",
    "BitLinear",
    "LayerQuant",
    "PackedBitLinear",
    "PackedEmbedding",
    "PackedLinear",
    "bitnet_",
    "convert_qat_",
    "dequantize_weight",
    "enable_fake_quant_",
    "fake_quant_layers",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "float8_",
    "int4_",
    "int8_",
    "llm_int8_",
    "nf4_",
    "prepare_qat_",
    "quantize_layer",
    "quantize_weight",
    "set_share_",
    "unprepare_qat_",
    "use_int4_kernel_",
]


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(f"lightning_slm.quantization.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module 'lightning_slm.quantization' has no attribute {name!r}")
