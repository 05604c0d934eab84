"""`ClassificationData`: texts and their classes from a table, tokenised, as batches for training and evaluation."""

import logging
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_slm.data import cache as caches
from lightning_slm.data.labelled import LabelledTexts, ShuffledByLength, encode_examples
from lightning_slm.data.loading import ResumableData
from lightning_slm.data.split import check_fractions, split_of
from lightning_slm.data.tables import Columns, Example, read_examples
from lightning_slm.data.tokenizer import end_of_document, load_tokenizer, train_tokenizer, trained_tokenizer
from lightning_slm.errors import near

log = logging.getLogger(__name__)

_USED_BY = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: ()}
_NAMES = {"train": "training", "val": "validation", "test": "test"}


class ClassificationData(ResumableData):
    """Labelled texts, or pairs of texts, for a `SequenceClassifier`: read, split, tokenised, padded, resumed exactly.

    A batch is a dict of int64 tensors: ``input_ids`` and ``attention_mask`` (batch_size, tokens of the longest of the
    batch, rounded up to 8), ``labels`` (batch_size,), and ``token_type_ids`` where the tokenizer tells them. In
    training, texts of about one length come together.

    Args:
        path: the training rows, a .csv, .tsv or .jsonl file, each also .gz.
        val_path: those to validate on; None: a fraction of the training rows.
        test_path: those to test on; None: a fraction of the training rows.
        text: the column with the text, by name, or in a .csv or .tsv file by its number from 0.
        text_pair: the column with a second text, for pairs; None: there is none.
        label: the column with the class.
        header: whether the first line names the columns; None: it does if a column is given by name.
        quoting: whether quotes enclose a field; None: in .csv they do, in .tsv they are text like any other.
        class_names: the classes, in the order of their numbers; None: those of the training rows, sorted.
        tokenizer: a tokenizer.json, BERT's vocab.txt, a folder with a tokenizer, a checkpoint of ours, or a name of
            the hub. None: a byte-level BPE is trained on the training texts, once, and kept in the cache.
        vocab_size: how many tokens a tokenizer trained here has at most; without effect on a given one.
        max_length: tokens of a text at most; what is longer is cut, and counted in a warning.
        batch_size: texts per step and rank.
        val_fraction: part of the training rows to validate on, chosen by a hash of the text; not with a val_path.
        test_fraction: part of the training rows to test on, chosen likewise; not with a test_path.
        num_workers: processes that load batches; 0 is enough.
        seed: of the order of the training texts, and of nothing else.
        cache_dir: folder of trained tokenizers. None: $LIGHTNING_SLM_CACHE, else ~/.cache/lightning-slm.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        text: int | str = "text",
        text_pair: int | str | None = None,
        label: int | str = "label",
        header: bool | None = None,
        quoting: bool | None = None,
        class_names: list[str] | None = None,
        tokenizer: str | Path | None = None,
        vocab_size: int = 4096,
        max_length: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_fractions(val_fraction, test_fraction)
        if len(set(class_names or ())) < len(class_names or ()):
            raise ValueError(f"class_names={class_names} has a name twice.")
        self.path, self.paths = path, {"train": path, "val": val_path, "test": test_path}
        self.columns = Columns(text, text_pair, label, header, quoting)
        self._given_names, self.tokenizer_source, self.vocab_size = class_names, tokenizer, vocab_size
        self.max_length = max_length
        self.fractions = {"val": 0.0 if val_path else val_fraction, "test": 0.0 if test_path else test_fraction}
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else caches.default_cache_dir()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._texts: dict[str, LabelledTexts] = {}
        self._names: list[str] = []

    # What is known once the data is prepared.

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer; None until `prepare_data` or `setup` was called."""
        return self._tokenizer

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of their numbers."""
        self.prepare_data()
        return self._names

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> class -> how many texts."""
        self.prepare_data()
        counted = {split: Counter(texts.labels_N.tolist()) for split, texts in self._texts.items()}
        return {split: {name: n[i] for i, name in enumerate(self._names)} for split, n in counted.items()}

    # The hooks of Lightning.

    def prepare_data(self) -> None:
        """Read, split and encode all texts; nothing if that is done. Every process does it for itself."""
        if self._texts:
            return
        rows = self._read()
        self._names = self._given_names or sorted({e.label for e in rows["train"]}, key=_natural)
        numbers = {name: number for number, name in enumerate(self._names)}
        self._check_labels(rows, numbers)
        self._tokenizer = self._make_tokenizer(rows["train"])
        pad = self._tokenizer.pad_token_id
        pad = end_of_document(self._tokenizer) if pad is None else pad
        encoded = {split: encode_examples(found, self._tokenizer, self.max_length) for split, found in rows.items()}
        self._texts = {
            split: LabelledTexts(encoded[split], [numbers[e.label] for e in found], pad or 0, self.max_length)
            for split, found in rows.items()
        }
        for split, counts in self.counts.items():
            if sum(counts.values()):
                log.info("%s", _balance(_NAMES[split], counts))
        if cut := sum(part.cut for part in encoded.values()):
            total = sum(map(len, rows.values()))
            warnings.warn(
                f"{cut} of {total} texts are longer than max_length={self.max_length} tokens and were cut.",
                stacklevel=2,
            )

    def setup(self, stage: str | None = None) -> None:
        """Check that what the stage needs is there."""
        stage = str(getattr(stage, "value", stage)) if stage is not None else None
        self.prepare_data()
        for split in _USED_BY.get(stage, ()):
            if split == "train" or stage != "fit" or self._expected(split):
                self._check_size(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled texts; its state is its place, so that Lightning resumes it exactly."""
        texts = self._split("train")
        return self.shuffled(texts, partial(ShuffledByLength, texts), texts.digest)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation texts in order; none without ``val_path`` where ``val_fraction`` is 0."""
        return self.in_order(self._split("val")) if self._expected("val") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test texts in order."""
        return self.in_order(self._split("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test texts in order."""
        return self.in_order(self._split("test"))

    # How it is done.

    def _read(self) -> dict[str, list[Example]]:
        """The rows of every split."""
        if self.path is None:
            raise ValueError("ClassificationData: path is not set; give a .csv, .tsv or .jsonl file of labelled texts.")
        rows = {
            split: read_examples(Path(place).expanduser(), self.columns) if place else []
            for split, place in self.paths.items()
        }
        everything, rows["train"] = rows["train"], []
        for example in everything:
            key = example.text if example.pair is None else f"{example.text}\n{example.pair}"
            rows[split_of(key, self.fractions["val"], self.fractions["test"])].append(example)
        return rows

    def _check_labels(self, rows: dict[str, list[Example]], numbers: dict[str, int]) -> None:
        for split, examples in rows.items():
            for name in dict.fromkeys(example.label for example in examples):
                if name not in numbers:
                    known = "class_names" if self._given_names else "the training rows"
                    raise ValueError(
                        f"The {_NAMES[split]} rows have the label {name!r}, which is not in {known}. "
                        f"{near(name, numbers)}"
                    )
        missing = set(numbers) - {example.label for example in rows["train"]}
        if len(numbers) < 2 or missing:
            raise ValueError(
                f"The training rows have no text of {sorted(missing)}; take it out of class_names."
                if missing
                else f"All training rows have the label {next(iter(numbers), None)!r}, so there is nothing to tell "
                f"apart; is label={self.columns.label!r} the right column?"
            )

    def _make_tokenizer(self, training: list[Example]) -> PreTrainedTokenizerFast:
        if self.tokenizer_source is not None:
            return load_tokenizer(str(self.tokenizer_source))
        texts = [text for example in training for text in (example.text, example.pair) if text is not None]
        key = caches.digest("classification", texts, self.vocab_size)
        with caches.locked(self.cache_dir / "tokenizers", key):
            kept = self.cache_dir / "tokenizers" / f"{key}.json"
            return trained_tokenizer(kept, lambda: train_tokenizer(texts, self.vocab_size))

    def _expected(self, split: str) -> bool:
        return self.paths[split] is not None or self.fractions[split] > 0

    def _split(self, split: str) -> LabelledTexts:
        self.prepare_data()
        self._check_size(split)
        return self._texts[split]

    def _check_size(self, split: str) -> None:
        needed = (self.batch_size if split == "train" else 1) * self.rank_and_ranks()[1]
        if len(self._texts[split]) < needed:
            hint = f"{split}_path, or raise {split}_fraction" if split != "train" else "more, or lower batch_size"
            raise ValueError(
                f"There are {len(self._texts[split])} {_NAMES[split]} texts, and one step takes {needed}: give {hint}."
            )


def _natural(label: str) -> tuple[int, int, str]:
    """Numbers by their value, then everything else by its letters."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def _balance(name: str, counts: dict[str, int]) -> str:
    total = sum(counts.values())
    parts = ", ".join(f"{label} {100 * n / total:.1f} %" for label, n in list(counts.items())[:20])
    return f"{name}: {total} texts ({parts})"
