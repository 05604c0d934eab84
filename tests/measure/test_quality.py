"""Perplexity and bits per byte against Hugging Face's own loss and against sums by hand."""

import math

import pytest
import torch
from support import VOCABULARY, Demo, ForeignLlama, batches

from lightning_slm.measure import BitsPerByte, Perplexity, bits_per_byte, perplexity, summed_nats


@pytest.fixture
def net():
    return ForeignLlama().net


def test_perplexity_is_exp_of_hugging_faces_mean_loss(net):
    batch = next(iter(batches()))
    with torch.no_grad():
        expected = math.exp(net.eval()(**batch).loss)
    assert perplexity(net, [batch]) == pytest.approx(expected, rel=1e-6)


def test_batches_of_unequal_length_weigh_by_their_tokens(net):
    ids_BT = torch.randint(VOCABULARY, (3, 12))
    whole = summed_nats(net, [ids_BT])
    parts = summed_nats(net, [ids_BT[:1], ids_BT[1:]])
    assert (whole.tokens, whole.windows, whole.window) == (33, 3, 12)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)


def test_masked_and_padded_tokens_are_not_predicted(net):
    ids_BT = torch.randint(VOCABULARY, (2, 8))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    padded = summed_nats(net, [{"input_ids": ids_BT, "attention_mask": mask_BT}])
    alone = summed_nats(net, [ids_BT[:1], ids_BT[1:, :5]])
    assert padded.tokens == alone.tokens == 7 + 4
    assert padded.nats == pytest.approx(alone.nats, rel=1e-5)


def test_bits_per_byte_divide_by_the_bytes_that_the_tokens_stand_for(net):
    batch = next(iter(batches()))
    sums = summed_nats(net, [batch])
    assert bits_per_byte(net, [batch], 3.5) == pytest.approx(sums.nats / math.log(2) / (sums.tokens * 3.5))


def test_the_demo_of_lightning_which_takes_pairs_has_a_perplexity():
    demo = Demo().eval()
    inputs, targets = batch = next(iter(batches(pairs=True)))
    with torch.no_grad():
        loss = torch.nn.functional.nll_loss(demo(inputs, targets), targets.flatten()).item()
    assert perplexity(demo, [batch]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_every_submodule_is_in_its_old_mode_afterwards(net):
    net.train()
    net.model.layers[0].eval()
    perplexity(net, [torch.randint(VOCABULARY, (1, 8))])
    assert net.training
    assert not net.model.layers[0].mlp.training
    assert net.model.layers[1].mlp.training


def test_nothing_to_predict_and_unknown_batches_are_refused(net):
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(net, [])
    with pytest.raises(ValueError, match="not str"):
        perplexity(net, ["text"])


def test_the_metrics_add_up_over_ranks_and_restart_after_a_reset():
    ranks = [Perplexity(), Perplexity()]
    ranks[0].update(torch.tensor(6.0), torch.tensor(3))
    ranks[1].update(2.0, 5)
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().item() == pytest.approx(math.exp(8 / 8))
    ranks[0].reset()
    ranks[0].update(0.0, 1)
    assert ranks[0].compute() == 1.0
    metric = BitsPerByte()
    metric.update(torch.tensor(8 * math.log(2)), 2.0)
    metric.update(torch.tensor(8 * math.log(2)), 6.0)
    assert metric.compute().item() == pytest.approx(2.0)
