"""What every mixer of an encoder promises: it looks both ways; padding and neighbours in the batch change nothing."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from mixers import ENCODERS, V, close, config_of, tokens

from lightning_slm.models import SLMConfig, SLMModel
from lightning_slm.models.registry import TOKEN_MIXERS

B, T = 2, 13


def encoder(tiny, **values):
    return SLMModel(config_of(tiny, causal=False, **values)).eval()


@pytest.fixture(params=ENCODERS)
def tiny(request):
    return ENCODERS[request.param]


@pytest.fixture
def model(tiny):
    with torch.no_grad():
        yield encoder(tiny)


def hidden(model, ids_BT, **how):
    return model(ids_BT, **how).last_hidden_state


def test_every_mixer_that_looks_both_ways_is_tried_here():
    assert set(ENCODERS) == {name for name, mixer in TOKEN_MIXERS.items() if mixer.bidirectional}


@pytest.mark.parametrize("name", [name for name, mixer in TOKEN_MIXERS.items() if not mixer.bidirectional])
def test_a_mixer_that_reads_one_way_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"{name}' cannot stand in an encoder.*: {TOKEN_MIXERS[name].refusal}"):
        SLMConfig(pattern=f"{name}/mlp", causal=False)


def test_earlier_tokens_see_later_ones(model):
    ids_BT = tokens()
    changed_BT = ids_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 7) % V
    before, after = hidden(model, ids_BT), hidden(model, changed_BT)
    assert not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)
    assert not torch.allclose(before[:, 8], after[:, 8], atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 13, 40])
def test_any_length_works_in_training_too(tiny, length):
    model = encoder(tiny).train()
    out = hidden(model, tokens(B, length))
    out.square().mean().backward()
    assert out.shape == (B, length, 32)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    ids_BT, pad = tokens(), torch.zeros(B, 5, dtype=torch.long)
    padded = torch.cat((pad, ids_BT) if side == "left" else (ids_BT, pad), 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = hidden(model, padded, attention_mask=mask, position_ids=positions)
    close(out[mask.bool()].view(B, T, -1), hidden(model, ids_BT))


def test_rows_of_different_lengths_are_what_each_is_alone(model):
    ids_BT = tokens(3)
    mask = (torch.arange(T) < torch.tensor([13, 9, 2])[:, None]).long()
    out = hidden(model, ids_BT * mask, attention_mask=mask)
    for row, length in enumerate((13, 9, 2)):
        close(out[row : row + 1, :length], hidden(model, ids_BT[row : row + 1, :length]))


def test_training_in_bfloat16_stays_near_float32(tiny):
    model, ids_BT = encoder(tiny, initializer_range=0.05).train(), tokens(2, 40)
    weight = torch.randn(2, 40, 32)

    def gradients():
        model.zero_grad()
        hidden(model, ids_BT).mul(weight).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98


def test_every_parameter_learns(tiny):
    model, ids_BT = encoder(tiny).train(), tokens(2, 40)
    hidden(model, ids_BT).mul(torch.randn(2, 40, 32)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_saved_and_loaded_it_is_bit_identical(model, tmp_path):
    ids_BT = tokens()
    model.save_pretrained(tmp_path)
    again = SLMModel.from_pretrained(tmp_path).eval()
    assert torch.equal(hidden(again, ids_BT), hidden(model, ids_BT))
