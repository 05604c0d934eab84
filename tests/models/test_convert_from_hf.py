"""Models of ``transformers`` are the oracles: the same weights give the same logits, losses, gradients and text."""

# Shape letters: B = batch, T = tokens.

import copy

import pytest
import torch
from hf_models import KINDS, SHAPES, hf_model
from mixers import tokens

from lightning_slm.models import SLMForCausalLM
from lightning_slm.models.convert import CONVERTERS
from lightning_slm.models.decode import generate_stream

T = 21
REFUSED = [(name, *variant) for name, kind in KINDS.items() for variant in kind.refused]


@pytest.fixture(params=SHAPES, ids="-".join)
def theirs(request):
    return hf_model(*request.param)


def of(theirs):
    return KINDS[theirs.config.model_type]


def assert_same_logits(ours, theirs, ids_BT, **inputs):
    rtol, atol = of(theirs).logits
    ours_BTV = ours(ids_BT, **inputs).logits
    theirs_BTV = theirs(input_ids=ids_BT, **inputs, **of(theirs).how).logits
    if "attention_mask" in inputs:
        ours_BTV, theirs_BTV = (x[inputs["attention_mask"].bool()] for x in (ours_BTV, theirs_BTV))
    torch.testing.assert_close(ours_BTV, theirs_BTV, rtol=rtol, atol=atol)


def test_every_architecture_that_from_hf_reads_is_tried_here():
    assert set(KINDS) == set(CONVERTERS)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_the_configuration_tells_what_it_is(name, shape):
    config = CONVERTERS[name].config(hf_model(name, shape).config)
    assert config.pattern == KINDS[name].shapes[shape][1]
    assert {value: getattr(config, value) for value in KINDS[name].ours} == KINDS[name].ours


def test_every_weight_is_read(theirs):
    ours = SLMForCausalLM.from_hf(theirs)
    names = CONVERTERS[theirs.config.model_type].names
    parts = [part for name in ours.state_dict() for part in names(name, ours.config)]
    assert {part if isinstance(part, str) else part[0] for part in parts} == set(theirs.state_dict())
    assert ours.num_parameters() == theirs.num_parameters()


def test_logits_are_theirs(theirs):
    assert_same_logits(SLMForCausalLM.from_hf(theirs), theirs, tokens(2, T))


@pytest.mark.parametrize(("name", "shape"), [pair for pair in SHAPES if KINDS[pair[0]].pads])
def test_the_logits_of_a_text_padded_on_the_left_are_theirs(name, shape):
    theirs, ids_BT = hf_model(name, shape), tokens(2, T)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :6] = 0
    assert_same_logits(SLMForCausalLM.from_hf(theirs), theirs, ids_BT, attention_mask=mask_BT)


@pytest.mark.parametrize(
    ("name", "shape", "training"), [(name, shape, mode) for name, shape in SHAPES for mode in KINDS[name].modes]
)
def test_loss_and_gradients_are_theirs(name, shape, training):
    kind, theirs, ids_BT = KINDS[name], hf_model(name, shape).train(training), tokens(2, T)
    ours = SLMForCausalLM.from_hf(theirs)
    assert ours.training is training
    our_loss, their_loss = (model(input_ids=ids_BT, labels=ids_BT).loss for model in (ours, theirs))
    torch.testing.assert_close(our_loss, their_loss, rtol=kind.loss, atol=kind.loss)
    our_loss.backward()
    their_loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for ours_name, p in ours.named_parameters():
        parts = CONVERTERS[name].names(ours_name, ours.config)
        expected = torch.cat([grads[part] if isinstance(part, str) else grads[part[0]][part[1]] for part in parts])
        atol = min(kind.gradients, 5e-5 * expected.abs().max().item() + 1e-8)  # small ones count, too
        torch.testing.assert_close(p.grad, expected.view_as(p), rtol=5e-5, atol=atol)


@pytest.mark.parametrize("end", [0, None])
def test_greedy_text_is_theirs(theirs, end):
    ids_BT = tokens(2, T)
    ours = SLMForCausalLM.from_hf(theirs)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    expected = theirs.generate(ids_BT, **how, **of(theirs).how)
    assert torch.equal(ours.generate(ids_BT, **how), expected)
    new = expected[0, T:].tolist()
    if end in new:
        new = new[: new.index(end) + 1]
    assert list(generate_stream(ours, ids_BT[:1], 20, eos_token_id=end)) == new


def test_a_folder_of_theirs_loads_and_a_folder_of_ours_too(theirs, tmp_path):
    ids_BT = tokens(2, T)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SLMForCausalLM.from_hf(tmp_path / "theirs").eval()
    assert_same_logits(ours, theirs, ids_BT)
    ours.save_pretrained(tmp_path / "ours")
    # Both into fresh memory: sums over weights that lie otherwise than on 64 bytes, as in a file, may round otherwise.
    ours, again = (copy.deepcopy(model) for model in (ours, SLMForCausalLM.from_hf(tmp_path / "ours").eval()))
    assert torch.equal(again(ids_BT).logits, ours(ids_BT).logits)


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_a_variant_that_ours_lacks_is_refused_by_name(name, values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM.from_hf(hf_model(name, **values))
