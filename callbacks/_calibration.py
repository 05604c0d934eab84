"""Calibration data for a callback: a few training batches of its own, which training does not notice."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_slm.calibration import run_model
from lightning_slm.callbacks._find import network_of


def calibration_batches(trainer: Any, pl_module: Any, wanted: int | Iterable[Any], seed: int) -> list[Any]:
    """The batches to calibrate on, those of this rank.

    Args:
        wanted: how many batches of the training data, drawn with ``seed`` and not in the order of training, in a
            loader of its own where there is a data set to draw from; or the batches themselves.

    Raises:
        ValueError: there is no training data.
    """
    if not isinstance(wanted, int):
        return list(wanted)
    with isolate_rng():
        loader = _train_loader(trainer, pl_module)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            loader = _drawn(loader, wanted, seed, trainer.global_rank, trainer.world_size)
        found = list(itertools.islice(loader, wanted))
    if not found:
        raise ValueError("the training data gave no batch to calibrate on.")
    return found


def forward(trainer: Any, pl_module: Any, batch: Any) -> Any:
    """The network's forward pass on a batch, in the precision of the run."""
    with trainer.precision_plugin.forward_context():
        return _through(pl_module, lambda: run_model(network_of(pl_module), batch))


def _through(pl_module: Any, work: Callable[[], Any]) -> Any:
    """Do ``work``; where FSDP2 shards the whole module, as its forward, around which the weights are gathered."""
    if not isinstance(pl_module, FSDPModule):
        return work()
    module: Any = pl_module

    def forward_once(*_: Any) -> Any:
        del module.forward  # at once: the pass may wait inside for others, which come this way, too
        return work()

    module.forward = forward_once
    return module()


def _train_loader(trainer: Any, pl_module: Any) -> Any:
    loader = trainer.train_dataloader
    data = trainer.datamodule
    if loader is None and data is not None:
        data.setup("fit")  # a run that only validates has set up its own part
        loader = data.train_dataloader()
    elif loader is None and type(pl_module).train_dataloader.__module__.partition(".")[0] not in (
        "lightning",
        "pytorch_lightning",
    ):
        loader = pl_module.train_dataloader()
    if loader is None:
        raise ValueError(
            "there is no training data to calibrate on: run with a datamodule that has some, or give the batches "
            "themselves, calibration=[...]."
        )
    if isinstance(loader, Mapping | list | tuple):
        loaders = list(loader.values()) if isinstance(loader, Mapping) else list(loader)
        loader = loaders[0]
    return loader


def _drawn(loader: DataLoader[Any], wanted: int, seed: int, rank: int, ranks: int) -> DataLoader[Any]:
    """A loader of the same data set, in an order of its own; every rank gets other batches."""
    count = len(loader.dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    mine = order[rank::ranks][: count // ranks]  # as many for each, since sharded ranks run together
    if loader.batch_sampler is not None:  # one of the user's (or Lightning's, for several ranks) leaves batch_size None
        size: Any = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
        batches = [mine[i : i + size] for i in range(0, min(size * wanted, len(mine)), size)]
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
    # A sampler of batches (ours), or a data set whose examples are batches.
    size = getattr(loader.sampler, "batch_size", None)
    if size is None:
        parts: list[Any] = mine[:wanted]
    else:
        parts = [mine[i : i + size] for i in range(0, min(size * wanted, len(mine)), size)]
    return DataLoader(loader.dataset, batch_size=None, sampler=parts)  # type: ignore[arg-type]
