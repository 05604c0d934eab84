"""The formula against PyTorch's counter, which sees the matrix products that really run."""

import pytest
import torch
from support import Demo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM


def counted(model, tokens):
    """By PyTorch: a whole text at once, of which each token is multiplied with all the others before masking."""
    # The fused CPU kernel is not in PyTorch's list of formulas; the written-out one is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return counter.get_total_flops()


def slm(**kwargs):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return SLMForCausalLM(SLMConfig(**{**sizes, "num_key_value_heads": 2, **kwargs}))


def llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2))


@pytest.mark.parametrize(
    "make",
    [llama, lambda: slm(pattern="attn/mlp*2"), lambda: slm(repeat=2), lambda: slm(pattern="attn/mlp@one*3")],
    ids=["llama-gqa", "slm", "slm-repeated-blocks", "slm-one-mlp-for-all"],
)
def test_the_formula_counts_what_pytorch_counts(make):
    model = make().eval()
    assert flops_per_token(model, context=16) * 16 == counted(model, 16)


def test_a_sliding_window_caps_the_context():
    model = slm(pattern="swa/mlp*2", sliding_window=8)
    assert flops_per_token(model, context=1000) == flops_per_token(model, context=8)
    assert flops_per_token(model, 8) - flops_per_token(model, 7) == 2 * 4 * 32


def test_a_model_without_configuration_is_refused_with_a_way_out():
    demo = Demo().model
    demo.forward = lambda input_ids, use_cache: None
    with pytest.raises(ValueError, match="FlopCounterMode"):
        flops_per_token(demo, 8)
