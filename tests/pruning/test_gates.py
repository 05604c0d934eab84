"""The masked view of a model: gates against formulas written out by hand, and their gradients."""

import pytest
import torch
from pruning_families import FAMILIES, answer, close, family, keeps, some, tokens
from support import tiny_llama, tiny_slm
from torch import nn

from lightning_slm.pruning import fold_, gated, structure_of

UNITS = ["head", "kv_group", "ffn", "hidden", "layer"]


def all_gates(model, value=1.0, units=UNITS):
    return {g.name: torch.full((g.size,), value) for g in structure_of(model, units)}


@pytest.mark.parametrize("name", FAMILIES)
def test_gates_of_one_change_nothing(name):
    model, ids = family(name), tokens()
    plain = answer(model, ids)
    with gated(model, all_gates(model)):
        assert close(answer(model, ids), plain)
    assert torch.equal(answer(model, ids), plain)


def test_gates_of_heads_and_feed_forward_units_scale_what_the_next_layer_reads():
    model, ids = family("llama"), tokens()
    head, ffn = torch.rand(8), torch.rand(128)
    with gated(model, {"model.layers.1.self_attn/head": head, "model.layers.1.mlp/ffn": ffn}):
        masked = answer(model, ids)
    block = model.model.layers[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight *= head.repeat_interleave(8)
        block.mlp.down_proj.weight *= ffn
    assert close(masked, answer(model, ids))


def test_a_layer_gate_lies_between_the_layer_and_none():
    model, ids = family("llama"), tokens()
    block = model.model.layers[1]
    seen = []
    block.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with gated(model, {"layer": torch.tensor([1.0, 0.3, 1.0])}):
        block.register_forward_hook(lambda _, args, output: seen.append(output))  # after the gate
        answer(model, ids)
    x, y = seen[0]
    torch.testing.assert_close(seen[1], x + 0.3 * (y - x))


def test_a_soft_gate_on_the_residual_stream_follows_the_rule_of_sheared_llama():
    """Where z is what is written there, the norm takes its mean over z != 0 and multiplies by z again."""
    model = tiny_llama()
    norm, z = model.model.layers[0].input_layernorm, torch.rand(64) * (torch.rand(64) > 0.3)
    norm.weight.data.uniform_(0.5, 1.5)
    with torch.no_grad(), gated(model, {"hidden": z}):
        x = model.model.embed_tokens(tokens())
        y = norm(x)
    written = model.model.embed_tokens.weight.detach()
    assert torch.equal(x[..., z == 0], torch.zeros_like(x[..., z == 0]))
    assert any(torch.equal(x[0, 0], row * z) for row in written)
    mean_square = x[..., z != 0].square().mean(-1, keepdim=True)
    torch.testing.assert_close(y, norm.weight * x / (mean_square + norm.variance_epsilon).sqrt() * z)


def test_a_gated_layer_norm_is_the_norm_of_what_is_kept():
    model = family("gpt2")
    norm, kept, x = model.transformer.ln_f, some(64, 40), torch.randn(3, 5, 64)
    with torch.no_grad(), gated(model, {"hidden": kept.float()}):
        y = norm(x)
    small = nn.LayerNorm(40, eps=norm.eps)
    small.weight.data, small.bias.data = norm.weight.data[kept], norm.bias.data[kept]
    torch.testing.assert_close(y[..., kept], small(x[..., kept]).detach())
    assert not y[..., ~kept].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert masked", "slm shared", "slm hybrid"])
def test_gradients_of_gates_are_those_of_finite_differences(name):
    model, ids = family(name).double(), tokens()
    gates = {n: (0.5 + torch.rand(g.shape)).double().requires_grad_() for n, g in all_gates(model).items()}

    def loss():
        with gated(model, gates):
            return model(ids).logits.square().mean()

    grads = dict(zip(gates, torch.autograd.grad(loss(), list(gates.values()))))
    assert all(g.any() for g in grads.values())
    for name_, gate in gates.items():
        step = torch.zeros_like(gate)
        step[gate.numel() // 2] = 1e-3  # the norms of Hugging Face's Llama are float32 inside
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                gate += sign * step
                ends.append(loss())
                gate -= sign * step
        estimate = (ends[0] - ends[1]) / 2e-3
        torch.testing.assert_close(grads[name_][gate.numel() // 2], estimate, rtol=2e-2, atol=1e-5)


def test_the_gradient_of_a_head_gate_is_that_of_michel():
    """At 1: the sum over the head of what it says times the gradient of it (Michel et al. 2019, eq. 2)."""
    model, ids = family("llama"), tokens()
    gate, seen = torch.ones(8, requires_grad=True), []
    out = model.model.layers[1].self_attn.o_proj
    out.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), seen.append(args[0]))[1])
    with gated(model, {"model.layers.1.self_attn/head": gate}):
        model(ids).logits.square().mean().backward()
    said = seen[0]  # before the gate: that hook came first
    by_hand = (said * said.grad).view(-1, 8, 8).sum((0, 2))
    torch.testing.assert_close(gate.grad, by_hand, rtol=1e-4, atol=1e-6)


def test_gates_are_looked_up_in_each_forward_pass():
    model, ids = tiny_slm(), tokens()
    gates = all_gates(model, units=["ffn"])
    with gated(model, gates):
        before = answer(model, ids)
        gates["model.layers.0.channel_mixer/ffn"] = torch.zeros(128)
        assert not torch.equal(answer(model, ids), before)


def test_nothing_is_left_behind_by_an_error():
    model, ids = tiny_llama(), tokens()
    plain = answer(model, ids)
    with pytest.raises(RuntimeError, match="stop"), gated(model, all_gates(model, 0.5)):
        raise RuntimeError("stop")
    assert torch.equal(answer(model, ids), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gates_survive_gradient_checkpointing():
    model, ids = tiny_llama().train(), tokens()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        gates = {n: (g * 0.7).requires_grad_() for n, g in all_gates(model).items()}
        with gated(model, gates):
            model(ids).logits.square().mean().backward()
        grads.append([g.grad for g in gates.values()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_gates_do_what_they_did(name):
    model, ids = family(name), tokens()
    gates = {
        n: 0.5 + torch.rand(g.shape) for n, g in all_gates(model, units=["head", "kv_group", "ffn", "hidden"]).items()
    }
    with gated(model, gates):
        masked = answer(model, ids)
    fold_(model, gates)
    assert close(answer(model, ids), masked)


def test_a_soft_gate_on_a_layer_cannot_be_folded():
    model = tiny_llama()
    fold_(model, {"layer": torch.tensor([1.0, 0.0])})
    with pytest.raises(ValueError, match="only folded if it is 0 or 1"):
        fold_(model, {"layer": torch.tensor([1.0, 0.5])})


def test_names_and_shapes_that_do_not_fit_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp/fn' is no group.*'model.layers.0.mlp/ffn'"):
        gated(model, {"model.layers.0.mlp/fn": torch.ones(128)}).__enter__()
    with pytest.raises(ValueError, match=r"'hidden' has 64 units; a gate of shape \(32,\) does not fit"):
        gated(model, {"hidden": torch.ones(32)}).__enter__()


def test_all_units_gated_at_once_are_like_one_after_the_other():
    model, ids = family("qwen3"), tokens()
    masks = {name: keep.float() for name, keep in keeps(model, UNITS).items()}
    with gated(model, masks):
        at_once = answer(model, ids)
    one, rest = {"hidden": masks.pop("hidden")}, masks
    with gated(model, rest), gated(model, one):
        assert close(answer(model, ids), at_once)
