"""Mamba-2's parts against their definitions and against transformers'; the whole is in tests/models."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.nn.mamba2 import GatedRMSNorm, naive_gated_rms_norm


def same_with_gradients(a, b, inputs, tolerance):
    pull = torch.randn_like(b)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for x, y in zip(torch.autograd.grad(a, inputs, pull), torch.autograd.grad(b, inputs, pull), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def small(**values):
    options = {"state_size": 8, "head_dim": 16, **values.pop("options", {})}
    sizes = {"vocab_size": 61, "hidden_size": 32, "pattern": "mamba2/-*2", "positions": "none", **values}
    return SLMForCausalLM(SLMConfig(mixers={"mamba2": options}, **sizes))


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gated_norm_is_that_of_transformers(groups):
    y, z = (torch.randn(2, 5, 32, requires_grad=True) for _ in range(2))
    ours, theirs = GatedRMSNorm(32, groups, 1e-5), MambaRMSNormGated(32, 32 // groups, 1e-5)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    a, b = ours(y, z), theirs(y, z)
    pull = torch.randn_like(a)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(a, (y, z, ours.weight), pull)
    for x, y_ in zip(mine, torch.autograd.grad(b, (y, z, theirs.weight), pull)):
        torch.testing.assert_close(x, y_, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_norm_is_its_twin_in_every_precision(dtype):
    y, z = (torch.randn(2, 5, 32).to(dtype).requires_grad_() for _ in range(2))
    norm = GatedRMSNorm(32, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    twin = naive_gated_rms_norm(y, z, norm.weight, 2, norm.eps)
    same_with_gradients(norm(y, z), twin, (y, z, norm.weight), tolerance)


def test_first_and_second_derivatives_of_the_gated_norm_are_right():
    y, z = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = GatedRMSNorm(8, 2).double()
    assert torch.autograd.gradcheck(lambda y, z, w: norm(y, z), (y, z, norm.weight))
    assert torch.autograd.gradgradcheck(lambda y, z, w: norm(y, z), (y, z, norm.weight))


def test_first_decays_and_time_steps_are_drawn_as_in_the_paper():
    mixer = small(hidden_size=512, options={"head_dim": 4}).model.layers[0].token_mixer
    rates, steps = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 2
    assert 15 < rates.max() <= 16.001
    assert 7.5 < rates.mean() < 9.5
    assert 9e-4 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.1001
    assert -4.8 < steps.log().mean() < -4.4  # log-uniform
    assert torch.equal(mixer.D, torch.ones(256))
    bound = 1024**-0.5 / 2**0.5
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(mixer.in_proj.weight.std() - 0.02) < 1e-3


def test_first_losses_are_those_of_a_uniform_guess():
    model, ids_BT = small(vocab_size=512), torch.randint(0, 512, (4, 64))
    assert abs(model(ids_BT, labels=ids_BT).loss - torch.tensor(512.0).log()) < 0.1


def test_only_the_projections_decay_and_are_compressed():
    model = small()
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    mixer = model.model.layers[0].token_mixer
    inside = {id(p) for p in groups["matrices"]}
    assert {id(mixer.in_proj.weight), id(mixer.out_proj.weight)} < inside
    assert len(inside) == 4
    assert "others" not in groups


def test_the_parts_of_the_projection_are_all_of_it():
    mixer = small(options={"groups": 2}).model.layers[0].token_mixer
    assert mixer.fused_rows() == {"in_proj": (64, 64, 16, 16, 4)}
    assert mixer.in_proj.out_features == 164


def test_its_cost_is_that_of_transformers_model():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "num_heads": 4}
    theirs = Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, n_groups=1))
    cost = flops_per_token(small(), 16)
    assert cost == flops_per_token(theirs, 16)
    layer = 2 * 32 * (64 + 64 + 8 + 8 + 4) + 2 * 64 * 32 + 2 * 4 * 80 + 5 * 64 * 8
    assert cost == 2 * layer + 2 * 32 * 61


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 24}, "head_dim=24 must divide expand"),
        ({"expand": 0.3}, "head_dim=16 must divide expand"),
        ({"groups": 3}, "groups=3 must divide the 4 heads"),
        ({"conv_size": 1}, "conv_size=1 must be at least 2"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"state_size": 0}, "state_size=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        small(options=options)


def test_the_length_of_chunks_changes_nothing():
    ids_BT = torch.randint(0, 61, (2, 37))
    model = small().eval()
    expected = model(ids_BT).logits
    for chunk in (1, 8, 256):
        for layer in model.model.layers:
            layer.token_mixer.chunk = chunk
        torch.testing.assert_close(model(ids_BT).logits, expected, rtol=1e-4, atol=1e-5)
