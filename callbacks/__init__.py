"""Compression techniques as callbacks: one module and one method card each."""

from lightning_slm.callbacks.compression_report import CompressionReport
from lightning_slm.callbacks.gradual_pruning import GradualPruning
from lightning_slm.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_slm.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_slm.callbacks.throughput_monitor import ThroughputMonitor

__all__ = [
    "CompressionReport",
    "GradualPruning",
    "KnowledgeDistillation",
    "QuantizationAwareTraining",
    "ThroughputMonitor",
]

if __name__ != "lightning_slm.callbacks":
    raise ImportError("import lightning_slm.callbacks, not callbacks: a second copy of every class would be made")
