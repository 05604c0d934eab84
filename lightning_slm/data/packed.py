"""Documents one after another, cut into windows of equal length; nothing is padded and nothing overlaps."""

# Shape letters: B = windows in a batch, T = tokens in a window.

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_slm.data.cache import TokenCache

NO_LOSS = -100  # the label that every loss leaves out


class PackedWindows(Dataset[dict[str, Tensor]]):
    """The windows of one split; an item is a whole batch, for a list of window numbers.

    ``labels`` are the ids unshifted (position t is to predict the label at t + 1). With ``document_mask`` a model can
    keep documents apart: ``position_ids`` restart at 0 where a document, or the window, begins, and the label of a
    document's first token is -100, for nothing before it foretells it.

    Args:
        window: T, tokens per window; what is left at the end of the split is dropped.
    """

    def __init__(self, cache: TokenCache, split: str, window: int, document_mask: bool = False) -> None:
        self.cache, self.split, self.window, self.document_mask = cache, split, window, document_mask
        self._map()

    def __len__(self) -> int:
        return len(self.ids) // self.window

    def __getitem__(self, windows: int | list[int]) -> dict[str, Tensor]:
        rows_B = np.atleast_1d(windows) * self.window
        ids_BT = np.stack([self.ids[row : row + self.window] for row in rows_B]).astype("int64")
        batch = {"input_ids": torch.from_numpy(ids_BT), "labels": torch.from_numpy(ids_BT.copy())}
        if self.document_mask:
            positions_BT, first_BT = self._positions(rows_B)
            batch["position_ids"] = torch.from_numpy(positions_BT)
            batch["labels"][torch.from_numpy(first_BT)] = NO_LOSS
        return batch

    def _positions(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance to the beginning of the document (or window), and whether a token is its document's first."""
        token_BT = rows_B[:, None] + np.arange(self.window)
        start_BT = self.starts[np.searchsorted(self.starts, token_BT, side="right") - 1]
        return token_BT - np.maximum(start_BT, rows_B[:, None]), token_BT == start_BT

    def _map(self) -> None:
        self.ids, self.starts = self.cache.ids(self.split), self.cache.starts(self.split)

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is spawned maps the files itself; pickling a map would copy the corpus."""
        return {k: v for k, v in self.__dict__.items() if k not in ("ids", "starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
