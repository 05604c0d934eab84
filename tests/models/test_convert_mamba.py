"""Mamba in ``transformers`` is the oracle: the same weights give the same logits, gradients and text."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert.mamba import names
from lightning_slm.models.decode import generate_stream

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3}
SHAPES = {
    "tied": {"tie_word_embeddings": True},
    "untied, narrow state": {"tie_word_embeddings": False, "state_size": 5, "time_step_rank": 3},
    "no bias of the convolution": {"use_conv_bias": False, "conv_kernel": 3},
    "other width and epsilon": {"expand": 3, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
}


def mamba(shape):
    values = {**SIZES, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    model = MambaForCausalLM(MambaConfig(**{**values, **SHAPES[shape]})).eval()
    with torch.no_grad():  # weights that all matter
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 4)
    return model


def tokens(length=21):
    return torch.randint(1, V, (2, length))


@pytest.fixture(params=SHAPES)
def theirs(request):
    return mamba(request.param)


def test_logits_are_theirs_within_1e_4(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_text_padded_on_the_left_are_theirs():
    theirs, ids_BT = mamba("tied"), tokens()
    mask = torch.ones_like(ids_BT)
    mask[0, :6] = 0
    ours = SLMForCausalLM.from_hf(theirs)
    a, b = (model(ids_BT, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_are_theirs(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    our_loss, their_loss = (model(ids_BT, labels=ids_BT).loss for model in (ours, theirs))
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    seen = set()
    for name, p in ours.named_parameters():
        (their_name,) = names(name, ours.config)
        seen.add(their_name)
        difference = (p.grad - gradients[their_name].view(p.shape)).abs().max()
        assert difference <= 1e-4 * p.grad.abs().max()
    assert seen == set(gradients)


def test_greedy_text_is_theirs(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False}
    expected = theirs.generate(ids_BT, **how)
    assert torch.equal(ours.generate(ids_BT, **how), expected)
    first = expected[0, 21:].tolist()
    assert (
        list(generate_stream(ours, ids_BT[0], 20, eos_token_id=0)) == first[: first.index(0) + 1 if 0 in first else 20]
    )


def test_a_folder_of_theirs_loads_and_a_folder_of_ours_too(tmp_path):
    theirs, ids_BT = mamba("untied, narrow state"), tokens()
    theirs.save_pretrained(tmp_path / "mamba")
    ours = SLMForCausalLM.from_hf(tmp_path / "mamba").eval()
    assert ours.config.pattern == "mamba/-*3"
    assert ours.config.max_position_embeddings == 1_048_576
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(SLMForCausalLM.from_hf(tmp_path / "ours").eval()(ids_BT).logits, ours(ids_BT).logits)


@pytest.mark.parametrize(("values", "message"), [({"use_bias": True}, "use_bias"), ({"hidden_act": "gelu"}, "gelu")])
def test_what_ours_does_not_have_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(MambaForCausalLM(MambaConfig(**SIZES, **values)))
