"""What a model costs and what it is worth: size, sparsity, FLOPs, latency, memory, perplexity, bits per byte."""

from lightning_slm.measure.quality import BitsPerByte, Perplexity

__all__ = ["BitsPerByte", "Perplexity"]
