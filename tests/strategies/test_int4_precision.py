"""Int4Precision: what is its own; the rest stands in test_precision_contract.py, for all."""

import pytest
import torch
from support import ForeignLlama

from lightning_slm.quantization.int4 import Int4, Int4Linear
from lightning_slm.strategies.int4_precision import Int4Precision


@pytest.mark.parametrize("options", [{}, {"sampled": False}], ids=str)
def test_its_settings_are_those_of_the_layers(options):
    plugin = Int4Precision(**options)
    module = plugin.convert_module(ForeignLlama())
    wanted = Int4(sampled=options.get("sampled", True))
    assert {m.settings for m in module.modules() if isinstance(m, Int4Linear)} == {wanted}
    assert plugin.multiplies is torch.int8
