"""Labelled texts as ids, and batches of them that are as wide as their longest."""

# Shape letters: B = texts in a batch, T = tokens of the longest of them, N = texts, M = tokens of all of them.

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from lightning_slm.data.loading import ShuffledWindows
from lightning_slm.data.tables import Example
from lightning_slm.data.tokenizer import end_of_document

_ROUND = 8  # rows are as long as the longest, rounded up to this: fewer shapes, and what tensor cores like
_POOL = 64  # steps whose texts are sorted by length together
_GROUP = 8192  # texts encoded at once


@dataclass(frozen=True)
class Encoded:
    """Texts as ids.

    Args:
        ids_M: the ids of all texts, one after another.
        types_M: which of a pair each token is of, where the tokenizer tells.
        ends_N: where each text ends in them.
        cut: how many texts were longer than allowed.
    """

    ids_M: np.ndarray
    types_M: np.ndarray | None
    ends_N: np.ndarray
    cut: int

    @property
    def lengths_N(self) -> np.ndarray:
        return np.diff(self.ends_N, prepend=0)


def encode_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Encoded:
    """Texts, or pairs, as the tokenizer frames them ([CLS] text [SEP]); where it does not, each ends with its
    end-of-document token. What is too long loses tokens at the end, of a pair the longer text first.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)  # whose own settings stay as they are
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    paired = bool(examples) and examples[0].pair is not None
    framed = backend.num_special_tokens_to_add(paired)
    end = None if framed else end_of_document(tokenizer)
    closing = [] if end is None else [end]
    room = max_length - (framed or len(closing) * (1 + paired))
    if room < 1 + paired:
        raise ValueError(f"max_length={max_length} leaves no room for text beside {max_length - room} special tokens.")
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    cut = 0
    for start in range(0, len(examples), _GROUP):
        group = examples[start : start + _GROUP]
        columns = [[e.text for e in group], *([[str(e.pair) for e in group]] if paired else [])]
        for parts in zip(*(backend.encode_batch(texts, add_special_tokens=False) for texts in columns)):
            keep = _longest_first([len(part) for part in parts], room)
            cut += sum(keep) < sum(len(part) for part in parts)
            for part, length in zip(parts, keep):
                part.truncate(length)
            if framed:
                whole = backend.post_process(parts[0], parts[1] if paired else None, True)
                ids.append(np.array(whole.ids, "int32"))
                types.append(np.array(whole.type_ids, "int8"))
            else:
                ids.append(np.array([i for part in parts for i in [*part.ids, *closing]], "int32"))
    ends_N = np.cumsum([len(row) for row in ids], dtype="int64")
    told = framed and "token_type_ids" in tokenizer.model_input_names
    return Encoded(_joined(ids, "int32"), _joined(types, "int8") if told else None, ends_N, cut)


def _joined(parts: list[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """How much of each text is kept, where together they have so much room.

    >>> _longest_first([9, 2], 6), _longest_first([9, 8], 6), _longest_first([3, 2], 6)
    ([4, 2], [3, 3], [3, 2])
    """
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    short = min(min(lengths), room // 2)
    return [room - short if length > lengths[1 - i] or (length == lengths[1 - i] and i == 0) else short
            for i, length in enumerate(lengths)]  # fmt: skip


class LabelledTexts(Dataset[dict[str, Tensor]]):
    """Texts and the numbers of their classes; an item is a whole batch, for a list of text numbers.

    A batch is a dict of int64 tensors: ``input_ids`` and ``attention_mask`` (B, T), ``labels`` (B,), and
    ``token_type_ids`` where the tokenizer tells them. Padding is on the right.
    """

    def __init__(self, encoded: Encoded, labels: Sequence[int], pad_id: int, max_length: int) -> None:
        self.encoded, self.labels_N = encoded, np.array(labels, "int64")
        self.pad_id, self.max_length = pad_id, max_length
        self.lengths_N = encoded.lengths_N

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def digest(self) -> str:
        """Equal for the same texts with the same labels, as the same ids, in the same order."""
        parts = (self.encoded.ids_M, self.encoded.ends_N, self.labels_N)
        return blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).hexdigest()

    def __getitem__(self, texts: int | list[int]) -> dict[str, Tensor]:
        numbers_B = np.atleast_1d(texts)
        ends_B, lengths_B = self.encoded.ends_N[numbers_B], self.lengths_N[numbers_B]
        T = min(-(-int(lengths_B.max()) // _ROUND) * _ROUND, self.max_length)
        mask_BT = np.arange(T) < lengths_B[:, None]
        places_BT = np.where(mask_BT, (ends_B - lengths_B)[:, None] + np.arange(T), 0)
        batch: dict[str, Any] = {
            "input_ids": np.where(mask_BT, self.encoded.ids_M[places_BT], self.pad_id),
            "attention_mask": mask_BT,
            "labels": self.labels_N[numbers_B],
        }
        if self.encoded.types_M is not None:
            batch["token_type_ids"] = np.where(mask_BT, self.encoded.types_M[places_BT], 0)
        return {name: torch.from_numpy(value.astype("int64")) for name, value in batch.items()}


class ShuffledByLength(ShuffledWindows):
    """Batches of texts of about one length, so that little is padding, in an order that seed and epoch decide.

    The texts of the epoch are shuffled, those of a few dozen steps sorted by length, cut into steps, and these
    shuffled again.
    """

    def __init__(self, texts: LabelledTexts, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths_N = texts.lengths_N

    def order(self, random: np.random.Generator) -> np.ndarray:
        step = self.batch_size * self.ranks
        order = random.permutation(self.windows)[: self.windows // step * step]
        pools = [order[at : at + _POOL * step] for at in range(0, len(order), _POOL * step)]
        sorted_ = np.concatenate([pool[np.argsort(self._lengths_N[pool], kind="stable")] for pool in pools] or [order])
        steps = sorted_.reshape(-1, step)
        return steps[random.permutation(len(steps))].reshape(-1)
