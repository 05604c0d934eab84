"""What a model costs and what it is worth: size, sparsity, FLOPs, latency, memory, perplexity, bits per byte."""

from lightning_slm.measure.flops import flops_per_token
from lightning_slm.measure.measured import QUANTITIES, Measured, Method, Quantity, measure_model
from lightning_slm.measure.memory import PeakMemory, peak_memory
from lightning_slm.measure.quality import BitsPerByte, Nats, Perplexity, bits_per_byte, perplexity, summed_nats
from lightning_slm.measure.report import Report, compare
from lightning_slm.measure.size import (
    ParameterCount,
    count_parameters,
    file_bytes,
    sparsity,
    sparsity_by_layer,
    weight_bytes,
)
from lightning_slm.measure.speed import Latency, greedy_stream, latency

__all__ = [
    "QUANTITIES",
    "BitsPerByte",
    "Latency",
    "Measured",
    "Method",
    "Nats",
    "ParameterCount",
    "PeakMemory",
    "Perplexity",
    "Quantity",
    "Report",
    "bits_per_byte",
    "compare",
    "count_parameters",
    "file_bytes",
    "flops_per_token",
    "greedy_stream",
    "latency",
    "measure_model",
    "peak_memory",
    "perplexity",
    "sparsity",
    "sparsity_by_layer",
    "summed_nats",
    "weight_bytes",
]
