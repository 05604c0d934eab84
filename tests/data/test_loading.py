import random
import warnings
from itertools import chain

import numpy as np
import pytest
import torch

from lightning_slm.data import TextData
from lightning_slm.data.loading import ShuffledWindows, TrainingLoader, WindowsInOrder
from lightning_slm.data.packed import PackedWindows


def shuffled(windows=23, batch_size=2, rank=0, ranks=1, seed=0, epoch=0):
    order = ShuffledWindows(windows, batch_size, rank=rank, ranks=ranks, seed=seed)
    order.set_epoch(epoch)
    return list(order)


def test_an_epoch_sees_every_window_once_but_those_that_fill_no_batch():
    seen = [*chain(*shuffled())]
    assert len(seen) == len(set(seen)) == 22
    assert set(seen) < set(range(23))


def test_seed_and_epoch_decide_the_order_and_nothing_else_does():
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    orders = {(seed, epoch): shuffled(seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)}
    assert len({str(order) for order in orders.values()}) == 9  # (seed 0, epoch 1) is not (seed 1, epoch 0)
    random.seed(2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert shuffled(seed=2, epoch=1) == orders[2, 1]


def test_two_ranks_take_together_what_one_rank_takes_with_twice_the_batch():
    one = shuffled(batch_size=4)
    two = [shuffled(batch_size=2, rank=rank, ranks=2) for rank in range(2)]
    assert [a + b for a, b in zip(*two)] == one


def test_two_ranks_can_go_on_where_one_stopped(corpus, tmp_path):
    data = TextData(corpus, vocab_size=300, window=8, cache_dir=tmp_path / "cache")
    windows = PackedWindows(data.cache, "train", 8)

    def loader(batch_size, rank=0, ranks=1):
        return TrainingLoader(windows, ShuffledWindows(len(windows), batch_size, rank=rank, ranks=ranks, seed=0))

    one = loader(4)
    batches = iter(one)
    for _ in range(3):
        next(batches)
    two = [loader(2, rank, 2) for rank in range(2)]
    for rank in two:
        rank.load_state_dict(one.state_dict())
    for batch, halves in zip(batches, zip(*two), strict=True):
        assert torch.equal(batch["input_ids"], torch.cat([half["input_ids"] for half in halves]))
    assert one.state_dict()["epoch"] == 1  # the next iteration is of the next epoch, also without Lightning
    assert two[0].state_dict() == one.state_dict()


@pytest.mark.parametrize("windows", [5, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_window_once_in_as_many_batches_on_every_rank(windows, batch_size, ranks):
    batches = [list(WindowsInOrder(windows, batch_size, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(chain(*chain(*batches))) == list(range(windows))
    assert len({len(rank) for rank in batches}) == 1
    assert len(batches[0]) == len(WindowsInOrder(windows, batch_size, rank=0, ranks=ranks))
    assert all(batch for rank in batches for batch in rank)
    assert max(len(batch) for rank in batches for batch in rank) <= batch_size + 1
    if ranks == 1:
        assert [*chain(*batches[0])] == list(range(windows))


def test_the_loader_says_nothing_and_leaves_the_runs_random_numbers_alone(corpus, tmp_path):
    data = TextData(corpus, vocab_size=300, window=8, cache_dir=tmp_path / "cache", num_workers=1)
    data.prepare_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        before = torch.get_rng_state()
        for loader in (data.train_dataloader(), data.val_dataloader()):
            next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)
