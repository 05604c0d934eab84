"""Sharding strategies and precision plugins: one module and one card each."""

from lightning_slm.strategies.float8_precision import Float8Precision
from lightning_slm.strategies.fsdp2_strategy import FSDP2Strategy
from lightning_slm.strategies.zero1_strategy import ZeRO1Strategy

__all__ = ["FSDP2Strategy", "Float8Precision", "ZeRO1Strategy"]

if __name__ != "lightning_slm.strategies":
    raise ImportError("import lightning_slm.strategies, not strategies: a second copy of every class would be made")
