"""Sharding strategies and precision plugins: one module and one card each."""

from lightning_slm.strategies.bitnet_precision import BitNetPrecision
from lightning_slm.strategies.float8_precision import Float8Precision
from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy
from lightning_slm.strategies.int4_precision import Int4Precision
from lightning_slm.strategies.int8_precision import Int8Precision
from lightning_slm.strategies.llm_int8_precision import LLMInt8Precision
from lightning_slm.strategies.nf4_precision import NF4Precision
from lightning_slm.strategies.zero1_strategy import ZeRO1Strategy

__all__ = [
    "BitNetPrecision",
    "FSDP2Strategy",
    "Float8Precision",
    "Int4Precision",
    "Int8Precision",
    "LLMInt8Precision",
    "NF4Precision",
    "ZeRO1Strategy",
]

if __name__ != "lightning_slm.strategies":
    raise ImportError("import lightning_slm.strategies, not strategies: a second copy of every class would be made")
