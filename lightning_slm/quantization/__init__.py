"""Fake quantisation while training, and weights in few bits afterwards."""

from lightning_slm.quantization.fake import (
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
)
from lightning_slm.quantization.packed import PackedEmbedding, PackedLinear
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

__all__ = [
    "SCHEMES",
    "LayerQuant",
    "PackedEmbedding",
    "PackedLinear",
    "convert_qat_",
    "dequantize_weight",
    "enable_fake_quant_",
    "fake_quant_layers",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "prepare_qat_",
    "quantize_layer",
    "quantize_weight",
    "unprepare_qat_",
]
