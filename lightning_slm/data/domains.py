"""Text of several domains, mixed in shares that may change while training (Sheared LLaMA's dynamic batch loading).

Xia et al. 2024 (https://arxiv.org/abs/2310.06694), algorithm 1: what is pruned recovers faster on some domains than on
others, so that domains whose loss is still far above what it should come to get a larger share of the batches.
"""

# Shape letters: B = windows in a batch, T = tokens in a window. Letters: K = domains.

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_slm.data import cache as caches
from lightning_slm.data.loading import ShuffledWindows
from lightning_slm.data.packed import PackedWindows
from lightning_slm.data.sources import Corpus, find_corpus
from lightning_slm.data.text_data import TextData
from lightning_slm.data.tokenizer import vocabulary_needed


def exponential_ascent(
    shares: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """New shares of the domains: each times ``exp(max(loss - reference, 0))``, and divided by their sum.

    >>> exponential_ascent({"code": 0.5, "wiki": 0.5}, {"code": 2.0, "wiki": 3.0}, {"code": 2.0, "wiki": 3.0})
    {'code': 0.5, 'wiki': 0.5}
    """
    grown = {name: share * math.exp(max(losses[name] - reference[name], 0.0)) for name, share in shares.items()}
    return {name: weight / sum(grown.values()) for name, weight in grown.items()}


class DomainOrder(ShuffledWindows):
    """Window numbers of several domains, one domain after the other in shares, each domain in an order of its own.

    Every next window is of the domain that lacks most of its share so far. So the sequence does not depend on the batch
    size or on ranks, and is a function of seed, epoch and ``updates``. A domain that runs out begins anew; an epoch has
    as many windows as there are.

    Args:
        sizes: windows of each domain; their numbers follow each other.
        shares: of the domains, at first; they sum to 1.
        updates: further shares, each with its place: {"epoch", "windows", "shares"}; more may come while it runs.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        updates: list[dict[str, Any]],
        batch_size: int,
        *,
        rank: int,
        ranks: int,
        seed: int,
    ) -> None:
        super().__init__(sum(sizes), batch_size, rank=rank, ranks=ranks, seed=seed)
        self.sizes, self.shares, self.updates = sizes, shares, updates
        self.drawn = 0  # windows of this epoch that have been asked for: workers are ahead of the training

    def __iter__(self) -> Iterator[list[int]]:
        step, seen, windows = self.batch_size * self.ranks, self.seen, self.sequence()
        for start in range(0, self.windows - step + 1, step):
            self.drawn = start + step
            numbers = [next(windows) for _ in range(step)]
            if start >= seen:
                yield numbers[self.rank * self.batch_size :][: self.batch_size]

    def sequence(self) -> Iterator[int]:
        """The window numbers of this epoch, without end."""
        K, epoch = len(self.sizes), self.epoch
        first = [0, *accumulate(self.sizes)]
        orders = [self._of_domain(epoch, k) for k in range(K)]
        lacking, n = [0.0] * K, 0
        while True:
            shares = self.shares_at(epoch, n)
            lacking = [missing + share for missing, share in zip(lacking, shares)]
            k = max(range(K), key=lacking.__getitem__)
            lacking[k] -= 1
            n += 1
            yield first[k] + next(orders[k])

    def shares_at(self, epoch: int, window: int) -> Sequence[float]:
        """By which the window of this number is chosen."""
        for update in reversed(self.updates):
            if (update["epoch"], update["windows"]) <= (epoch, window):
                return update["shares"]
        return self.shares

    def _of_domain(self, epoch: int, k: int) -> Iterator[int]:
        turn = 0
        while True:
            yield from np.random.default_rng([self.seed, epoch, k, turn]).permutation(self.sizes[k]).tolist()
            turn += 1


class DomainWindows(Dataset[dict[str, Tensor]]):
    """The windows of several domains as one data set; an item is a whole batch, for a list of window numbers."""

    def __init__(self, domains: Sequence[PackedWindows]) -> None:
        self.domains = domains
        self.first = [0, *accumulate(len(domain) for domain in domains)]

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, windows: int | list[int]) -> dict[str, Tensor]:
        rows = [self._row(int(number)) for number in np.atleast_1d(windows)]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def _row(self, number: int) -> dict[str, Tensor]:
        k = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.domains[k][number - self.first[k]]


class DomainData(TextData):
    """`TextData` of several domains, whose shares of the training batches are chosen, and may change in the run.

    Validation and test hold every window of every domain. ``DynamicBatchLoading`` changes the shares; they are kept in
    checkpoints.

    Args:
        domains: name -> path, each as `TextData` takes one.
        shares: name -> part of the training windows, in any unit; None: by size.
        kwargs: the further arguments of `TextData`; one tokenizer serves all domains.
    """

    def __init__(self, domains: dict[str, str], shares: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        if not domains:
            raise ValueError("domains={} names nothing; give, for example, {'code': 'src/', 'prose': 'docs/'}.")
        if shares is not None and (shares.keys() != domains.keys() or min(shares.values()) <= 0):
            raise ValueError(f"shares={shares} must have a number above 0 for each of {', '.join(domains)}.")
        self.domains, self.first_shares, self.path = domains, shares, ", ".join(map(str, domains.values()))
        self.updates: list[dict[str, Any]] = []  # as `DomainOrder` takes them, and the optimizer step of each
        self._caches: dict[str, caches.TokenCache] = {}
        self._order: DomainOrder | None = None

    # What is known once the data is prepared.

    @property
    def shares(self) -> dict[str, float]:
        """Of the next training batches; they sum to 1."""
        if self.updates:
            return dict(zip(self.domains, self.updates[-1]["shares"]))
        return self._shares_at_first()

    @property
    def cache(self) -> caches.TokenCache:
        """There is one for each domain."""
        raise AttributeError(f"DomainData has a token cache for each of {', '.join(self.domains)}, and none for all.")

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many files or rows were skipped for it, in all domains."""
        self.prepare_data()
        return dict(sum((Counter(cache.skipped) for cache in self._caches.values()), Counter()))

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of a split's documents / its tokens, in all domains."""
        self.prepare_data()
        counts = [cache.splits[split] for cache in self._caches.values()]
        return sum(c.text_bytes for c in counts) / sum(c.tokens for c in counts)

    def update_shares(self, shares: Mapping[str, float], step: int) -> None:
        """Mix what has not been asked for yet in these shares; ``step`` is noted beside them."""
        assert self._order is not None, "there is no training loader"
        place = {"epoch": self._order.epoch, "windows": self._order.drawn}
        self.updates.append({**place, "shares": [shares[name] for name in self.domains], "step": step})

    def domain_loader(self, name: str, split: str = "val") -> DataLoader[Any]:
        """The windows of one domain, in order."""
        return self.in_order(self._by_domain(split)[name])

    # The hooks of Lightning.

    def prepare_data(self) -> None:
        """Make one tokenizer for all domains, and a token cache for each."""
        if self._caches:
            return
        corpora = {name: find_corpus(path) for name, path in self.domains.items()}
        contents = {name: caches.content_of(corpus, self.cache_dir) for name, corpus in corpora.items()}
        self._corpora = list(corpora.values())
        all_of_them = Corpus(f"the domains {', '.join(corpora)}")
        self._tokenizer = self._make_tokenizer(all_of_them, caches.digest(*contents.values()))
        self._caches = {name: self._tokens(corpora[name], contents[name]) for name in corpora}
        self.vocab_size = vocabulary_needed(self._tokenizer)

    def train_dataloader(self) -> DataLoader[Any]:
        """Windows of all domains in their shares; its state is its place."""
        sizes = [len(windows) for windows in self._by_domain("train").values()]
        order = partial(self._make_order, sizes, list(self._shares_at_first().values()))
        names = ",".join(cache.folder.name for cache in self._caches.values())
        return self.shuffled(self._windows("train"), order, f"{names}/{self.window}")

    def state_dict(self) -> dict[str, Any]:
        """All changes of the shares, from which the order of the windows follows."""
        return {"updates": [dict(update) for update in self.updates]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with these shares."""
        self.updates[:] = state_dict["updates"]

    # How it is done.

    def _make_order(
        self, sizes: list[int], shares: list[float], windows: int, *args: Any, **kwargs: Any
    ) -> DomainOrder:
        self._order = DomainOrder(sizes, shares, self.updates, *args, **kwargs)
        return self._order

    def _documents(self, corpus: Corpus, skipped: Counter[str]) -> Iterator[str]:
        for one in [corpus] if corpus in self._corpora else self._corpora:
            yield from super()._documents(one, skipped)

    def _shares_at_first(self) -> dict[str, float]:
        sizes = {name: float(len(windows)) for name, windows in self._by_domain("train").items()}
        given = sizes if self.first_shares is None else {name: self.first_shares[name] for name in sizes}
        return {name: share / sum(given.values()) for name, share in given.items()}

    def _check_windows(self, split: str) -> None:
        ranks = self.rank_and_ranks()[1]
        found = {name: cache.splits[split].tokens // self.window for name, cache in self._caches.items()}
        advice = "give more text, another fraction, or lower window or batch_size."
        for name, windows in found.items():
            if windows < ranks:
                raise ValueError(
                    f"The domain {name!r} has {windows} x window={self.window} tokens in its {split} split, for "
                    f"{ranks} ranks: {advice}"
                )
        if split == "train" and sum(found.values()) < self.batch_size * ranks:
            raise ValueError(
                f"The domains have {sum(found.values())} x window={self.window} tokens to train on, and one step takes "
                f"{self.batch_size * ranks}: {advice}"
            )

    def _by_domain(self, split: str) -> dict[str, PackedWindows]:
        self.prepare_data()
        self._check_windows(split)
        return {
            name: PackedWindows(cache, split, self.window, self.document_mask) for name, cache in self._caches.items()
        }

    def _windows(self, split: str) -> Any:
        return DomainWindows(list(self._by_domain(split).values()))
