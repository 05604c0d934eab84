"""`TextData`: any text, tokenised once, as packed windows for training and evaluation."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_slm.data import cache as caches
from lightning_slm.data.loading import ResumableData, ShuffledWindows
from lightning_slm.data.packed import PackedWindows
from lightning_slm.data.readers import NO_TEXT, check_column, read_documents, usable
from lightning_slm.data.sources import Corpus, find_corpus
from lightning_slm.data.split import check_fractions, split_of
from lightning_slm.data.tokenizer import (
    check_vocabulary,
    encode_documents,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    trained_tokenizer,
    vocabulary_needed,
    with_mask_token,
)

log = logging.getLogger(__name__)

_USED_BY = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",), None: ()}
_NAMES = {"train": "training", "val": "validation", "test": "test"}


class TextData(ResumableData):
    """Text for a language model: found, split, tokenised, cached, packed into windows, resumed exactly.

    A batch is a dict of int64 tensors of shape (batch_size, window): ``input_ids``; ``labels``, a copy of them, not
    shifted, -100 where no loss is wanted; with ``document_mask`` also ``position_ids``, which restart with a document.

    Args:
        path: a file, a folder, a glob, or the name of a Hugging Face data set, with its configuration after a colon.
            Read are .txt .md .py .jsonl .csv .tsv .parquet, each also .gz. None: the Python standard library of the
            running interpreter, sources only.
        tokenizer: a tokenizer.json, a folder with a tokenizer, or a name of the hub. None: a byte-level BPE is trained
            on the training split, once, and kept in the cache.
        vocab_size: how many tokens a tokenizer trained here has at most; without effect on a given one.
        window: tokens per row of a batch.
        batch_size: windows per step and rank.
        text_column: the column, or key, with the text, in tables, JSON lines and data sets.
        document_mask: say in every batch where documents begin, so that a model can keep them apart.
        val_fraction: part of the documents to validate on, chosen by a hash of their content.
        test_fraction: part of the documents to test on, chosen likewise.
        num_workers: processes that load batches; 0 is enough where one step takes milliseconds.
        seed: of the order of the training windows, and of nothing else.
        cache_dir: folder of the token cache. None: $LIGHTNING_SLM_CACHE, else ~/.cache/lightning-slm.
        mask_token: whether the tokenizer must have a mask token, as MaskedLM needs one. It is added to one that has
            none; one that is trained here learns a token less for it.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        vocab_size: int = 4096,
        window: int = 256,
        batch_size: int = 16,
        text_column: str = "text",
        document_mask: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        mask_token: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_fractions(val_fraction, test_fraction)
        if window < 2:
            raise ValueError(f"window={window} is below 2.")
        self.path, self.tokenizer_source, self.vocab_size = path, tokenizer, vocab_size
        self.window, self.text_column, self.document_mask = window, text_column, document_mask
        self.val_fraction, self.test_fraction, self.mask_token = val_fraction, test_fraction, mask_token
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else caches.default_cache_dir()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._cache: caches.TokenCache | None = None

    # What is known once the data is prepared.

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer; None until `prepare_data` or `setup` was called."""
        return self._tokenizer

    @property
    def cache(self) -> caches.TokenCache:
        """Counts, files and skips of the token cache, which is made if it is not there."""
        self.prepare_data()
        assert self._cache is not None
        return self._cache

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many files or rows of the corpus were skipped for it."""
        return self.cache.skipped

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of a split's documents / its tokens, for bits per byte = nats per token / ln 2 / this.

        A token that ends a document is a token like any other, for the model predicts it, and carries no bytes.
        """
        counts = self.cache.splits[split]
        return counts.text_bytes / counts.tokens

    # The hooks of Lightning.

    def prepare_data(self) -> None:
        """Make the tokenizer and the token cache, or wait for the process that does; nothing if they are there."""
        if self._cache is not None:
            return
        corpus = find_corpus(self.path)
        content = caches.content_of(corpus, self.cache_dir)
        self._tokenizer = self._make_tokenizer(corpus, content)
        self._cache = self._tokens(corpus, content)
        self.vocab_size = vocabulary_needed(self._tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Check what the stage will need: whole windows in its splits, and a model with a row for every id."""
        stage = str(getattr(stage, "value", stage)) if stage is not None else None
        self.prepare_data()
        for split in _USED_BY.get(stage, ()):
            if split == "train" or self._fraction(split) > 0 or stage != "fit":
                self._check_windows(split)
        module = getattr(self.trainer, "lightning_module", None)
        rows = _embedding_rows(module) if module is not None else None
        if rows is not None and self._tokenizer is not None:
            check_vocabulary(self._tokenizer, rows)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled windows; its state is its place, so that Lightning resumes it exactly."""
        windows = self._windows("train")
        return self.shuffled(windows, ShuffledWindows, f"{self.cache.folder.name}/{self.window}")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation windows in order; none where ``val_fraction`` is 0."""
        return self.in_order(self._windows("val")) if self.val_fraction > 0 else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test windows in order."""
        return self.in_order(self._windows("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test windows in order."""
        return self.in_order(self._windows("test"))

    # How it is done.

    def _make_tokenizer(self, corpus: Corpus, content: str) -> PreTrainedTokenizerFast:
        if self.tokenizer_source is not None:
            given = load_tokenizer(str(self.tokenizer_source))
            return with_mask_token(given) if self.mask_token else given
        size = self.vocab_size - 1 if self.mask_token else self.vocab_size
        key = caches.digest(content, *self._split_key(), size)

        def train() -> PreTrainedTokenizerFast:
            log.info("Training a byte-level BPE of %d tokens on %s", size, corpus.name)
            documents = self._documents(corpus, Counter())
            return train_tokenizer((text for text in documents if self._split_of(text) == "train"), size)

        with caches.locked(self.cache_dir / "tokenizers", key):
            trained = trained_tokenizer(self.cache_dir / "tokenizers" / f"{key}.json", train)
        return with_mask_token(trained) if self.mask_token else trained

    def _tokens(self, corpus: Corpus, content: str) -> caches.TokenCache:
        assert self._tokenizer is not None
        key = caches.digest(content, *self._split_key(), fingerprint(self._tokenizer))
        cache = caches.cached(self.cache_dir / "tokens" / key, lambda folder: self._encode(corpus, folder))
        _check_corpus(corpus, cache)
        return cache

    def _encode(self, corpus: Corpus, folder: Path) -> caches.TokenCache:
        assert self._tokenizer is not None
        skipped: Counter[str] = Counter()
        with _progress(corpus) as shown:
            documents = shown(self._documents(corpus, skipped))
            encoded = encode_documents(documents, self._tokenizer, self._split_of)
            made = caches.build_cache(folder, encoded, vocab_size=vocabulary_needed(self._tokenizer), skipped=skipped)
        if set(skipped) - {NO_TEXT}:  # an empty __init__.py is nothing to worry about
            warnings.warn(f"Of {corpus.name} was skipped: {_listed(skipped)}.", stacklevel=2)
        return made

    def _documents(self, corpus: Corpus, skipped: Counter[str]) -> Iterator[str]:
        for file in corpus.files:
            yield from read_documents(file, self.text_column, skipped)
        if corpus.data_set is not None:
            check_column(self.text_column, corpus.data_set.column_names, corpus.name)
            rows = corpus.data_set.select_columns([self.text_column]).iter(batch_size=1024)
            yield from usable((value for batch in rows for value in batch[self.text_column]), skipped)

    def _check_windows(self, split: str) -> None:
        rank_windows = 1 if split != "train" else self.batch_size
        needed = rank_windows * self.rank_and_ranks()[1]
        counts = self.cache.splits[split]
        if counts.tokens // self.window < needed:
            fraction = f"raise {split}_fraction={self._fraction(split)}, " if split != "train" else "lower batch_size, "
            raise ValueError(
                f"The {_NAMES[split]} split has {counts.tokens} tokens in {counts.documents} documents, and "
                f"one step takes {needed} x window={self.window}. Give more text, {fraction}or lower window."
            )

    def _windows(self, split: str) -> PackedWindows:
        self._check_windows(split)
        return PackedWindows(self.cache, split, self.window, self.document_mask)

    def _split_of(self, text: str) -> str:
        return split_of(text, self.val_fraction, self.test_fraction)

    def _split_key(self) -> tuple[Any, ...]:
        return self.text_column, self.val_fraction, self.test_fraction

    def _fraction(self, split: str) -> float:
        return {"val": self.val_fraction, "test": self.test_fraction}[split]


def _check_corpus(corpus: Corpus, cache: caches.TokenCache) -> None:
    if not sum(split.tokens for split in cache.splits.values()):
        reasons = f" Skipped: {_listed(cache.skipped)}." if cache.skipped else ""
        raise ValueError(f"{corpus.name} has no text: {len(corpus.files)} files were read.{reasons}")


def _embedding_rows(module: Any) -> int | None:
    """The vocabulary of a module's model, by its configuration; None if it has none (or not yet)."""
    for owner in (module, getattr(module, "model", None)):
        rows = getattr(getattr(owner, "config", None), "vocab_size", None)
        if isinstance(rows, int):
            return rows
    return None


def _listed(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())


@contextmanager
def _progress(corpus: Corpus) -> Iterator[Any]:
    """A bar over the bytes of a corpus, on the terminal's error stream; of unknown length for what is compressed."""
    plain = corpus.files and all(file.suffix not in (".gz", ".parquet") for file in corpus.files)
    total = sum(file.stat().st_size for file in corpus.files) if plain else None
    columns = (TextColumn("Tokenising {task.fields[name]}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, name=corpus.name)

        def shown(documents: Iterable[str]) -> Iterator[str]:
            for text in documents:
                yield text
                bar.advance(task, len(text.encode()))

        yield shown
