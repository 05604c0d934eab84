"""LLMInt8Precision: products in int8 in training as in evaluation.

What it shares with NF4Precision stands in test_nf4_precision.py, and with all in test_precision_contract.py.
"""

import torch
from support import ForeignLlama, batches

from lightning_slm.quantization.bnb import frozen_layers, llm_int8_
from lightning_slm.strategies.llm_int8_precision import LLMInt8Precision


def test_its_threshold_is_that_of_the_layers():
    plugin = LLMInt8Precision(threshold=3.5)
    module = plugin.convert_module(ForeignLlama())
    assert {layer.settings.threshold for layer in frozen_layers(module).values()} == {3.5}
    assert plugin.multiplies is torch.int8


def test_training_rounds_inputs_as_evaluation_does():
    """Their own layer does not, on a CPU: a loss in training would be another function's."""
    module = ForeignLlama()
    llm_int8_(module, threshold=0.0)
    batch = next(iter(batches()))
    assert torch.equal(module.train().net(**batch).loss, module.eval().net(**batch).loss)
