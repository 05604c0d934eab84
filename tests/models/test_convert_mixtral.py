"""Mixtral in ``transformers`` is the oracle: the same weights give the same logits, losses, gradients and text."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert import CONVERTERS

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES = {
    "grouped": {},
    "tied, window": {"num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4},
    "wide heads, one of three": {"head_dim": 16, "num_experts_per_tok": 1},
}
TINY = {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
TINY |= {"num_local_experts": 3, "num_key_value_heads": 2}


def mixtral(**values):
    config = MixtralConfig(**{**SIZES, **TINY, **values})
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config).eval()


def tokens():
    return torch.randint(1, V, (2, 13))


def as_ours(theirs, config, values):
    """Their tensors of these names, by our names."""
    names = CONVERTERS["mixtral"].names
    return {
        name: torch.cat([values[p] if isinstance(p, str) else values[p[0]][p[1]] for p in names(name, config)])
        for name in theirs
    }


@pytest.fixture(params=SHAPES)
def theirs(request):
    return mixtral(**SHAPES[request.param])


def test_logits_are_mixtrals(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-5, atol=1e-5)


def test_the_pattern_tells_what_it_is():
    assert SLMForCausalLM.from_hf(mixtral(sliding_window=4)).config.pattern == "swa/moe*3"
    config = SLMForCausalLM.from_hf(mixtral()).config
    assert config.pattern == "attn/moe*3"
    assert config.mixers["moe"]["experts"] == 3
    assert config.mixers["moe"]["normalize_topk"]


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_mixtrals(theirs, training):
    ids_BT = tokens()
    theirs.train(training)
    ours = SLMForCausalLM.from_hf(theirs)
    our_loss, their_loss = ours(ids_BT, labels=ids_BT).loss, theirs(ids_BT, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    their_loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters()}
    for name, expected in as_ours(mine, ours.config, grads).items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_of_one_layer_is_mixtrals(padded):
    theirs = mixtral(num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.5).train()
    ours, ids_BT = SLMForCausalLM.from_hf(theirs), tokens()
    mask = torch.ones_like(ids_BT)
    if padded:
        mask[1, 9:] = 0
    out = theirs(ids_BT, attention_mask=mask, labels=ids_BT)
    our_loss = ours(ids_BT, attention_mask=mask, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, out.loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    out.loss.backward()
    router = ours.model.layers[0].channel_mixer.router.weight.grad
    torch.testing.assert_close(router, theirs.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)


def test_greedy_text_is_mixtrals(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(ids_BT, **how), theirs.generate(ids_BT, **how))


def test_a_folder_of_a_mixtral_loads(tmp_path):
    theirs, ids_BT = mixtral(), tokens()
    theirs.save_pretrained(tmp_path)
    ours = SLMForCausalLM.from_hf(tmp_path).eval()
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"router_jitter_noise": 0.1}, "router_jitter_noise"), ({"hidden_act": "gelu"}, "hidden_act.*gelu")],
)
def test_a_variant_that_ours_lacks_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(mixtral(**values))
