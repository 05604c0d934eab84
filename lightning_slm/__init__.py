"""Every technique that makes a language model small, as one line in any PyTorch Lightning Trainer.

Names are imported when they are first used, so that ``import lightning_slm`` costs nothing.
"""

from importlib import import_module

from lightning_slm._registers import register as _register

__version__ = "0.1.0"

# Public name -> the sub-package that exports it. Everything here also is a short name for the command line.
_EXPORTS = {
    "lightning_slm.callbacks": (
        "ADMMPruning",
        "CompressionReport",
        "DynamicBatchLoading",
        "GradualPruning",
        "KnowledgeDistillation",
        "L0Pruning",
        "MagnitudePruning",
        "NMSparseTraining",
        "QuantizationAwareTraining",
        "ShearedPruning",
        "SparseGPTPruning",
        "StructuredPruning",
        "ThroughputMonitor",
        "WandaPruning",
    ),
    "lightning_slm.data": ("ClassificationData", "DomainData", "TextData"),
    "lightning_slm.errors": ("NoEffectWarning",),
    "lightning_slm.models": ("SLMConfig", "SLMForCausalLM", "SLMForMaskedLM", "SLMForSequenceClassification"),
    "lightning_slm.modules": ("CausalLM", "MaskedLM", "MuonAdamW", "SequenceClassifier"),
    "lightning_slm.modules.low_bit_optimizers": ("AdamW4bit", "AdamW8bit", "AdamWFp8"),
    "lightning_slm.strategies": (
        "BitNetPrecision",
        "FSDP2Strategy",
        "Float8Precision",
        "Int4Precision",
        "Int8Precision",
        "LLMInt8Precision",
        "NF4Precision",
        "ZeRO1Strategy",
    ),
}
_HOME = {name: package for package, names in _EXPORTS.items() for name in names}
_PACKAGES = (
    "callbacks", "data", "distillation", "export", "measure", "models", "modules", "nn", "pruning", "quantization",
    "strategies",
)  # fmt: skip

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _PACKAGES:
        return import_module(f"lightning_slm.{name}")
    raise AttributeError(f"module 'lightning_slm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_PACKAGES})


_register()
