"""One-shot magnitude pruning of whole models, against torch.nn.utils.prune and by counting."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_slm.pruning import magnitude_


def two_layers():
    return nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_one_layer_is_pruned_as_torch_prunes_it():
    ours = nn.Linear(40, 24)
    theirs = copy.deepcopy(ours)
    magnitude_(ours, sparsity=0.3)
    prune.l1_unstructured(theirs, "weight", amount=0.3)
    assert torch.equal(ours.weight, theirs.weight)


def test_a_global_budget_is_spent_as_torch_spends_it():
    ours = two_layers()
    theirs = copy.deepcopy(ours)
    shares = magnitude_(ours, sparsity=0.6, budget="global")
    prune.global_unstructured([(theirs[1], "weight"), (theirs[3], "weight")], prune.L1Unstructured, amount=0.6)
    assert torch.equal(ours[1].weight, theirs[1].weight)
    assert torch.equal(ours[3].weight, theirs[3].weight)
    assert shares["1.weight"] != shares["3.weight"]


def test_what_is_not_targeted_stays_bit_for_bit():
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    assert magnitude_(model, sparsity=0.5, skip="3") == {"1.weight": 0.5}
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["1.weight"]


def test_the_groups_of_a_conv1d_run_along_its_inputs():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    shares = magnitude_(model, sparsity=0.5, group=4)
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    weight_OI = layer.weight.T
    assert weight_OI.shape == (64, 16)
    assert ((weight_OI.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert set(shares.values()) == {0.5}
    assert (model.lm_head.weight != 0).all()  # tied to the embedding: no target


def test_twice_is_once():
    model = two_layers()
    magnitude_(model, sparsity=0.5)
    once = copy.deepcopy(model.state_dict())
    magnitude_(model, sparsity=0.5)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"sparsity": 1.5}, r"sparsity=1.5 must lie between 0 and 1"),
        ({"sparsity": 0.5, "group": 5}, r"'1.weight': sparsity=0.5 of group=5 must be whole weights"),
        ({"sparsity": 0.5, "targets": "layers.*"}, r"matches no weight of the model. .*'1', '3'"),
        ({"sparsity": 0.5, "skip": ["1", "3"]}, r"`skip` leaves no weight to prune"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_weight_is_touched(asked, complaint):
    model = two_layers()
    with pytest.raises(ValueError, match=complaint):
        magnitude_(model, **asked)
    assert all((m.weight != 0).all() for m in model if isinstance(m, nn.Linear))


def test_packed_integers_are_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'weight' holds packed torch.uint8; prune before"):
        magnitude_(model, sparsity=0.5)
