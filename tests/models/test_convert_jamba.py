"""Jamba in ``transformers`` is the oracle: the same weights give the same logits, losses, gradients and text."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert import CONVERTERS

V = 61
TINY = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4}
TINY |= {"mamba_d_state": 8, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
# What differs from that, and the pattern that it is.
SHAPES = {
    "experts in every other": ({}, "mamba/mlp mamba/moe attn/mlp mamba/moe"),
    "two periods, tied": (
        {"num_hidden_layers": 8, "tie_word_embeddings": True},
        "(mamba/mlp mamba/moe attn/mlp mamba/moe)*2",
    ),
    "no experts": ({"num_experts": 1}, "mamba/mlp mamba/mlp attn/mlp mamba/mlp"),
    "attention only": ({"attn_layer_period": 1, "attn_layer_offset": 0}, "(attn/mlp attn/moe)*2"),
    "other sizes": (
        {"mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 5, "mamba_conv_bias": False, "num_experts_per_tok": 3},
        "mamba/mlp mamba/moe attn/mlp mamba/moe",
    ),
}


def jamba(**values):
    config = JambaConfig(**{**TINY, **values})
    config._experts_implementation = "eager"
    theirs = JambaForCausalLM(config)
    for name, p in theirs.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)  # ones would not show a norm in the wrong place
    return theirs.eval()


def tokens():
    return torch.randint(1, V, (2, 13))


@pytest.fixture(params=SHAPES)
def theirs(request):
    return jamba(**SHAPES[request.param][0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pattern_tells_what_it_is(shape):
    values, pattern = SHAPES[shape]
    config = CONVERTERS["jamba"].config(jamba(**values).config)
    assert config.pattern == pattern
    assert config.positions == "none"


def test_every_weight_is_read(theirs):
    config = CONVERTERS["jamba"].config(theirs.config)
    ours = SLMForCausalLM(config)
    parts = [part for name in ours.state_dict() for part in CONVERTERS["jamba"].names(name, config)]
    assert {part if isinstance(part, str) else part[0] for part in parts} == set(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_logits_are_jambas(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_jambas(theirs, training):
    ids_BT = tokens()
    theirs.train(training)
    ours = SLMForCausalLM.from_hf(theirs)
    our_loss, their_loss = ours(ids_BT, labels=ids_BT).loss, theirs(ids_BT, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    their_loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        parts = CONVERTERS["jamba"].names(name, ours.config)
        expected = torch.cat([grads[part] if isinstance(part, str) else grads[part[0]][part[1]] for part in parts])
        torch.testing.assert_close(p.grad, expected.view_as(p), rtol=1e-4, atol=1e-5)


def test_the_balance_loss_of_one_layer_is_jambas():
    theirs = jamba(num_hidden_layers=3, output_router_logits=True, router_aux_loss_coef=0.5).train()
    ours, ids_BT = SLMForCausalLM.from_hf(theirs), tokens()
    our_loss, their_loss = ours(ids_BT, labels=ids_BT).loss, theirs(ids_BT, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)


def test_greedy_text_is_jambas(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(ids_BT, **how), theirs.generate(ids_BT, **how))


def test_a_folder_of_a_jamba_loads(tmp_path):
    theirs, ids_BT = jamba(), tokens()
    theirs.save_pretrained(tmp_path)
    ours = SLMForCausalLM.from_hf(tmp_path).eval()
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"mamba_proj_bias": True}, "mamba_proj_bias.*True"), ({"hidden_act": "gelu"}, "hidden_act.*gelu")],
)
def test_a_variant_that_ours_lacks_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(jamba(**values))
