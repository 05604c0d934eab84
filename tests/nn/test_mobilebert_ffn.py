"""The feed-forward part of MobileBERT in ``transformers`` is the oracle."""

# Shape letters: B = batch, T = tokens, D = model width, b = width of the bottleneck.

import pytest
import torch
from torch import nn
from transformers import MobileBertConfig
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLayer

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.mobilebert_ffn import MobileBertFFN, NoNorm

B, T, D, b = 2, 5, 32, 8
SIZES = {"hidden_size": D, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 32}


def pair(stack):
    """Theirs, and ours with its weights; nothing is at its first value."""
    sizes = {"hidden_size": D, "true_hidden_size": b, "intra_bottleneck_size": b, "intermediate_size": 12}
    config = MobileBertConfig(**sizes, num_attention_heads=2, num_feedforward_networks=stack)
    theirs, ours = MobileBertLayer(config), MobileBertFFN(D, b, stack, 12)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours.in_proj.load_state_dict(theirs.bottleneck.input.dense.state_dict())
    ours.in_norm.load_state_dict(theirs.bottleneck.input.LayerNorm.state_dict())
    ours.out_proj.load_state_dict(theirs.output.bottleneck.dense.state_dict())
    inner = [(f.intermediate.dense, f.output.dense, f.output.LayerNorm) for f in getattr(theirs, "ffn", ())]
    inner.append((theirs.intermediate.dense, theirs.output.dense, theirs.output.LayerNorm))
    for mine, (up, down, norm) in zip(ours.ffn, inner, strict=True):
        mine.up_proj.load_state_dict(up.state_dict())
        mine.down_proj.load_state_dict(down.state_dict())
        mine.norm.load_state_dict(norm.state_dict())
    return theirs, ours


def their_ffn(theirs, x_BTD):
    """Their layer without its attention; its last norm is the identity, which leaves the residual outside, as ours."""
    h_BTb = theirs.bottleneck.input(x_BTD)
    for ffn in getattr(theirs, "ffn", ()):
        h_BTb = ffn(h_BTb)
    theirs.output.bottleneck.LayerNorm = nn.Identity()
    return theirs.output(theirs.intermediate(h_BTb), h_BTb, x_BTD)


@pytest.mark.parametrize("stack", [1, 2, 4])
def test_with_the_residual_it_is_the_feed_forward_part_of_their_layer(stack):
    theirs, ours = pair(stack)
    x_BTD, grad_BTD = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    mine, expected = x_BTD + ours(x_BTD, Context(), 0), their_ffn(theirs, x_BTD)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y, x_BTD, grad_BTD, retain_graph=True)[0] for y in (mine, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    mine.backward(grad_BTD)
    expected.backward(grad_BTD)
    for a, e in (
        (ours.in_proj.weight, theirs.bottleneck.input.dense.weight),
        (ours.ffn[-1].norm.weight, theirs.output.LayerNorm.weight),
        (ours.ffn[0].up_proj.bias, (theirs.ffn[0].intermediate if stack > 1 else theirs.intermediate).dense.bias),
        (ours.out_proj.weight, theirs.output.bottleneck.dense.weight),
    ):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-5, atol=1e-5)


def test_the_sizes_that_are_not_given_follow_from_the_width():
    mixer = MobileBertFFN.from_config(SLMConfig(**SIZES))
    assert (mixer.in_proj.out_features, len(mixer.ffn), mixer.ffn[0].up_proj.out_features) == (D // 4, 4, D)
    mixer = MobileBertFFN.from_config(SLMConfig(**SIZES), bottleneck=6, stack=1, inner_size=10)
    assert (mixer.in_proj.out_features, len(mixer.ffn), mixer.ffn[0].up_proj.out_features) == (6, 1, 10)


def test_the_norm_that_is_none_begins_as_the_identity_and_keeps_the_precision():
    norm, x_BTb = NoNorm(b), torch.randn(B, T, b, dtype=torch.bfloat16)
    assert torch.equal(norm(x_BTb), x_BTb)


def test_its_cost_is_that_of_its_matrices():
    plain = SLMForCausalLM(SLMConfig(**SIZES, pattern="attn/-"))
    model = SLMForCausalLM(SLMConfig(**SIZES, pattern="attn/mobilebert_ffn"))
    mixer = model.model.layers[0].channel_mixer
    matrices = sum(p.numel() for p in mixer.parameters() if p.ndim == 2)
    assert matrices == 2 * D * b + 4 * 2 * b * 4 * b
    assert flops_per_token(model, 4) - flops_per_token(plain, 4) == 2 * matrices


@pytest.mark.parametrize("values", [{"bottleneck": 0}, {"stack": 0}, {"inner_size": -1}], ids=str)
def test_sizes_below_one_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        MobileBertFFN.from_config(SLMConfig(**SIZES), **values)
