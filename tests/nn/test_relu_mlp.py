"""Feed-forward layers without a gate, and with a gate that can be shut: against ``transformers`` and by definition."""

# Shape letters: B = batch, T = tokens, D = model width, I = width between.

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, GPTNeoXConfig
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.models.registry import CHANNEL_MIXERS
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.relu_mlp import GeluMLP, ReluGLU, ReluMLP, SquaredReluMLP, zeros_among_activations
from lightning_slm.nn.swiglu import SwiGLU

B, T, D, I = 2, 7, 16, 40
SIZES = {"hidden_size": D, "intermediate_size": I, "num_attention_heads": 2}
HIDDEN_ACT = {ReluMLP: "relu", SquaredReluMLP: "relu2", GeluMLP: "gelu"}


def run(layer, x_BTD):
    return layer(x_BTD, Context(), 0)


@pytest.mark.parametrize("kind", HIDDEN_ACT)
def test_outputs_and_gradients_are_those_of_transformers(kind):
    ours = kind(D, I, bias=True)
    theirs = GPTNeoXMLP(GPTNeoXConfig(**SIZES, hidden_act=HIDDEN_ACT[kind]))
    theirs.dense_h_to_4h.load_state_dict(ours.up_proj.state_dict())
    theirs.dense_4h_to_h.load_state_dict(ours.down_proj.state_dict())
    x_BTD, grad_BTD = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    results = []
    for layer, y_BTD in ((ours, run(ours, x_BTD)), (theirs, theirs(x_BTD))):
        results.append([y_BTD, *torch.autograd.grad(y_BTD, [x_BTD, *layer.parameters()], grad_BTD)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gelu_is_berts():
    ours, theirs = GeluMLP(D, I, bias=True), BertIntermediate(BertConfig(hidden_size=D, intermediate_size=I))
    theirs.dense.load_state_dict(ours.up_proj.state_dict())
    x_BTD = torch.randn(B, T, D)
    torch.testing.assert_close(ours.activations(x_BTD), theirs(x_BTD), rtol=1e-6, atol=1e-6)


def test_the_relu_gate_has_swiglus_weights_and_another_activation():
    ours, swiglu = ReluGLU(D, I), SwiGLU(D, I)
    ours.load_state_dict(swiglu.state_dict())
    x_BTD = torch.randn(B, T, D)
    gate, up = F.linear(x_BTD, swiglu.gate_up_proj.weight).split(I, -1)
    expected = F.linear(gate.clamp(min=0) * up, swiglu.down_proj.weight)
    torch.testing.assert_close(run(ours, x_BTD), expected, rtol=1e-6, atol=1e-6)
    assert ours.fused_rows() == {"gate_up_proj": (I, I)}


@pytest.mark.parametrize("kind", [ReluMLP, SquaredReluMLP, ReluGLU])
def test_what_is_zero_need_not_be_multiplied(kind):
    layer, x_11D = kind(D, I), torch.randn(1, 1, D)
    some_I = layer.activations(x_11D)[0, 0] != 0
    assert zeros_among_activations(layer, x_11D) == pytest.approx(1 - some_I.float().mean())
    assert 0.2 < zeros_among_activations(layer, torch.randn(B, T, D)) < 0.8  # half, as initialised
    cut = layer.activations(x_11D)[..., some_I] @ layer.down_proj.weight[:, some_I].t()
    torch.testing.assert_close(cut, run(layer, x_11D), rtol=1e-5, atol=1e-6)


def test_gelu_leaves_nothing_out():
    assert zeros_among_activations(GeluMLP(D, I), torch.randn(B, T, D)) == 0


@pytest.mark.parametrize("name", ["relu_mlp", "relu2_mlp", "gelu_mlp", "relu_glu"])
def test_a_model_of_it_costs_its_matrices(name):
    model = SLMForCausalLM(SLMConfig(**SIZES, vocab_size=32, pattern=f"attn/{name}"))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert flops_per_token(model, 1) == 2 * (sum(p.numel() for p in matrices) + 32 * D) + 4 * D


@pytest.mark.parametrize(("name", "expected"), [("relu_mlp", False), ("gelu_mlp", True)])
def test_biases_are_as_usual_unless_told(name, expected):
    config = SLMConfig(**SIZES)
    kind = CHANNEL_MIXERS[name]
    assert (kind.from_config(config).up_proj.bias is not None) == expected
    assert (kind.from_config(config, bias=not expected).down_proj.bias is not None) == (not expected)
