"""Mamba-2 in ``transformers`` is the oracle: the same weights give the same logits, gradients and text."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert.mamba2 import names
from lightning_slm.models.decode import generate_stream

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16, "num_heads": 4, "state_size": 8}
SHAPES = {
    "one group, tied": {"n_groups": 1, "tie_word_embeddings": True},
    "two groups, untied": {"n_groups": 2, "tie_word_embeddings": False},
    "no bias of the convolution": {"n_groups": 1, "use_conv_bias": False, "conv_kernel": 3},
    "other width and epsilon": {"n_groups": 4, "expand": 3, "num_heads": 12, "head_dim": 8, "layer_norm_epsilon": 1e-3},
}


def mamba2(shape):
    values = {**SIZES, "initializer_range": 0.3, "chunk_size": 8, "bos_token_id": 1, "eos_token_id": 0}
    model = Mamba2ForCausalLM(Mamba2Config(**{**values, "pad_token_id": 0, **SHAPES[shape]})).eval()
    with torch.no_grad():  # weights that all matter
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) / 4)
    return model


def tokens(length=21):
    return torch.randint(1, V, (2, length))


@pytest.fixture(params=SHAPES)
def theirs(request):
    return mamba2(request.param)


def test_logits_are_theirs_within_1e_4(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_text_padded_on_the_left_are_theirs():
    theirs, ids_BT = mamba2("two groups, untied"), tokens()
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
    found = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = found[names(name, ours.config)[0]].grad.view_as(p)
        assert (p.grad - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-6, name


def test_greedy_text_is_theirs(theirs):
    ids_BT = tokens()
    ours = SLMForCausalLM.from_hf(theirs)
    a, b = (model.generate(ids_BT, max_new_tokens=20, do_sample=False) for model in (ours, theirs))
    assert torch.equal(a, b)
    new = [int(t) for t in b[0, 21:]]
    new = new[: new.index(0) + 1] if 0 in new else new
    assert list(generate_stream(ours, ids_BT[:1], 20, eos_token_id=0)) == new


def test_a_saved_folder_loads_and_so_does_what_ours_saves(tmp_path):
    theirs, ids_BT = mamba2("two groups, untied"), tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SLMForCausalLM.from_hf(tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(SLMForCausalLM.from_hf(tmp_path / "ours").eval()(ids_BT).logits, ours(ids_BT).logits)


def test_it_has_as_many_parameters_and_no_end_of_its_positions():
    theirs = mamba2("one group, tied")
    ours = SLMForCausalLM.from_hf(theirs)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.config.max_position_embeddings == 1_048_576


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_bias": True}, "use_bias.*True"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"time_step_limit": (0.0, 0.5)}, "time_step_limit.*0.5"),
    ],
)
def test_a_variant_that_ours_lacks_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(Mamba2ForCausalLM(Mamba2Config(**SIZES, n_groups=1, **values)))
