"""Int8Precision: what is its own; the rest stands in test_precision_contract.py, for all."""

import torch
from support import ForeignLlama

from lightning_slm.quantization.int8 import Int8, Int8Linear
from lightning_slm.strategies.int8_precision import Int8Precision


def test_its_settings_are_those_of_the_layers():
    plugin = Int8Precision("blockwise", block=16)
    module = plugin.convert_module(ForeignLlama())
    assert {m.settings for m in module.modules() if isinstance(m, Int8Linear)} == {Int8("blockwise", 16)}
    assert plugin.multiplies is torch.int8
