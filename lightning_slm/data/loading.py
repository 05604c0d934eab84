"""Which windows come when, on which rank, and how a run that was killed goes on with the very next one.

Every step takes the next ``batch_size * ranks`` windows of one global order, and rank r the r-th part of them. So the
state is a place in that order, the same for all ranks (Lightning keeps only rank 0's), in plain numbers.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

# Both samplers are DistributedSamplers, because Lightning replaces every other kind when there are several ranks.


class ShuffledWindows(DistributedSampler):
    """Batches of window numbers for one rank, in an order that the seed and the epoch decide.

    Windows that do not fill a batch on every rank are left out of the epoch; another order leaves out others.
    """

    def __init__(self, windows: int, batch_size: int, *, rank: int, ranks: int, seed: int) -> None:
        self.windows, self.batch_size, self.rank, self.ranks, self.seed = windows, batch_size, rank, ranks, seed
        self.epoch = self.seen = 0  # seen: windows of this epoch that all ranks together are done with

    def set_epoch(self, epoch: int) -> None:
        """Lightning says this at the start of every epoch, and again when it resumes within one."""
        if epoch != self.epoch:
            self.epoch, self.seen = epoch, 0

    def __len__(self) -> int:
        return self.windows // (self.batch_size * self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(np.random.default_rng([self.seed, self.epoch]))
        step = self.batch_size * self.ranks
        for start in range(self.seen, self.windows - step + 1, step):
            mine = start + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()

    def order(self, random: np.random.Generator) -> np.ndarray:
        """The window numbers of one epoch, one step after another."""
        return random.permutation(self.windows)


class WindowsInOrder(DistributedSampler, SequentialSampler):
    """Every window exactly once over all ranks, in as many batches on each rank, none of them empty or repeated.

    (torch's own sampler repeats windows to fill up, which changes a perplexity with the number of ranks. A batch may be
    smaller than asked for, and one larger where ranks would otherwise run dry at different times.)
    """

    def __init__(self, windows: int, batch_size: int, *, rank: int, ranks: int) -> None:
        self.mine = range(rank, windows, ranks)
        self.batches = min(-(-windows // (batch_size * ranks)), windows // ranks)
        self.epoch = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        ends = [len(self.mine) * batch // self.batches for batch in range(self.batches + 1)]
        for start, end in pairwise(ends):
            yield list(self.mine[start:end])


def in_order(dataset: Dataset[Any], sampler: WindowsInOrder, num_workers: int = 0) -> DataLoader[Any]:
    """The loader of an evaluation."""
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=num_workers, generator=_own_randomness())


class TrainingLoader(StatefulDataLoader):
    """A StatefulDataLoader whose state is a place: the epoch, and how many of its windows are done.

    torchdata's own state holds a snapshot of every worker, and neither another number of workers nor of ranks can take
    it up; our windows have no state, so that the place is enough, and can go on anywhere.

    Args:
        data: names text, tokenizer and window; a place in other data is refused.
        unfinished: batches that were handed out but not trained on (1 within a step, as when Ctrl-C stops it there).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ShuffledWindows,
        num_workers: int = 0,
        data: str = "",
        unfinished: Callable[[], int] = lambda: 0,
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
            super().__init__(
                dataset, batch_size=None, sampler=sampler, num_workers=num_workers, generator=_own_randomness()
            )
        self.order, self.data, self.unfinished = sampler, data, unfinished

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begins at the first ``next``: Lightning makes the iterator before it says which epoch it is."""
        order = self.order
        epoch = order.epoch
        for batch in super().__iter__():
            order.seen += order.batch_size * order.ranks
            yield batch
        order.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Place in the data, right after the last batch that was trained on."""
        order = self.order
        done = order.seen - self.unfinished() * order.batch_size * order.ranks
        return {"epoch": order.epoch, "windows": done, "seed": order.seed, "data": self.data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that place.

        Raises:
            ValueError: it is a place in other data, or in another order of it.
        """
        here = {"seed": self.order.seed, "data": self.data}
        there = {name: state_dict.get(name) for name in here}
        if there != here:
            raise ValueError(
                f"The checkpoint stopped within other data: {there}, here {here}. To resume, give the same text, "
                f"tokenizer, window, fractions and seed; to train on other data, start a run from the weights only."
            )
        self.order.epoch, self.order.seen = state_dict["epoch"], state_dict["windows"]


def _own_randomness() -> torch.Generator:
    """A loader draws seeds for its workers; from here, so that loading does not move the run's random numbers."""
    return torch.Generator().manual_seed(0)


class ResumableData(LightningDataModule):
    """Data whose training batches a killed run takes up again where it stopped, on any number of ranks.

    Args:
        batch_size: items per step and rank.
        num_workers: processes that load batches.
        seed: of the order of the training items.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}={value} is below {least}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def shuffled(self, dataset: Any, order: Callable[..., ShuffledWindows], data: str) -> DataLoader[Any]:
        """The loader of a training; its state is its place in ``order(items, batch_size, rank=, ranks=, seed=)``.

        Args:
            dataset: gives a batch for a list of item numbers.
            data: names what the items are; a place in other data is refused.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self.in_order(dataset)  # that asks for the same batches in every epoch
        rank, ranks = self.rank_and_ranks()
        sampler = order(len(dataset), self.batch_size, rank=rank, ranks=ranks, seed=self.seed)
        return TrainingLoader(dataset, sampler, self.num_workers, data, self._batches_in_flight)

    def in_order(self, dataset: Any) -> DataLoader[Any]:
        """The loader of an evaluation: every item once."""
        rank, ranks = self.rank_and_ranks()
        sampler = WindowsInOrder(len(dataset), self.batch_size, rank=rank, ranks=ranks)
        return in_order(dataset, sampler, self.num_workers)

    def rank_and_ranks(self) -> tuple[int, int]:
        """This process's place among those that see different data; of a tensor-parallel group all see the same."""
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (replicas["rank"], replicas["num_replicas"]) if replicas else (0, 1)

    def _batches_in_flight(self) -> int:
        """1 within a training step, whose batch has been fetched and must come again if the run is resumed there."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed  # type: ignore[attr-defined]
