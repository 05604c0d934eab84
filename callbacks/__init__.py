"""Compression techniques as callbacks: one module and one method card each."""

from lightning_slm.callbacks.admm_pruning import ADMMPruning
from lightning_slm.callbacks.compression_report import CompressionReport
from lightning_slm.callbacks.dynamic_batch_loading import DynamicBatchLoading
from lightning_slm.callbacks.gradual_pruning import GradualPruning
from lightning_slm.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_slm.callbacks.l0_pruning import L0Pruning
from lightning_slm.callbacks.magnitude_pruning import MagnitudePruning
from lightning_slm.callbacks.nm_sparse_training import NMSparseTraining
from lightning_slm.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_slm.callbacks.sheared_pruning import ShearedPruning
from lightning_slm.callbacks.sparsegpt_pruning import SparseGPTPruning
from lightning_slm.callbacks.structured_pruning import StructuredPruning
from lightning_slm.callbacks.throughput_monitor import ThroughputMonitor
from lightning_slm.callbacks.wanda_pruning import WandaPruning

__all__ = [
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
]

if __name__ != "lightning_slm.callbacks":
    raise ImportError("import lightning_slm.callbacks, not callbacks: a second copy of every class would be made")
