"""The token cache: every split as one memory-mapped file of ids, made once for a corpus and a tokenizer.

    <cache_dir>/contents/<files>.json     size and time of every file -> digest of their content
    <cache_dir>/tokenizers/<key>.json     tokenizers trained here
    <cache_dir>/tokens/<key>/             train.ids val.ids test.ids, *.starts of documents, meta.json

The key is the digest of the content, the tokenizer, the split and the format's version. A folder is written under
another name and renamed when it is whole; a lock lets one process write while the others, ranks or not, wait for it.
Every start compares length and checksum, and rebuilds what is damaged.
"""

import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lightning_slm.data.sources import Corpus
from lightning_slm.data.split import SPLITS

_VERSION = 1
_RACY_SECONDS = 2.0  # a file changed this recently may change again without its time or size telling
_META = "meta.json"


@dataclass(frozen=True)
class Split:
    """What one split holds. ``text_bytes`` are of its documents in UTF-8; ``tokens`` count ends of documents too."""

    documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class TokenCache:
    """A finished cache folder.

    Args:
        files: name -> (length in bytes, CRC-32).
        skipped: reason -> how many files or rows were skipped for it when the cache was made.
    """

    folder: Path
    dtype: str
    splits: dict[str, Split]
    files: dict[str, list[int]]
    skipped: dict[str, int] = field(default_factory=dict)

    def ids(self, split: str) -> np.ndarray:
        """All ids of a split, mapped from disk."""
        return _mapped(self.folder / f"{split}.ids", self.dtype)

    def starts(self, split: str) -> np.ndarray:
        """Where each document of a split begins, in tokens, ascending."""
        return _mapped(self.folder / f"{split}.starts", "int64")


def default_cache_dir() -> Path:
    """``$LIGHTNING_SLM_CACHE``, else ~/.cache/lightning-slm."""
    return Path(os.environ.get("LIGHTNING_SLM_CACHE") or "~/.cache/lightning-slm").expanduser()


def digest(*parts: Any) -> str:
    """A short name for plain values."""
    return blake2b(json.dumps([_VERSION, *parts]).encode(), digest_size=16).hexdigest()


def locked(cache_dir: Path, name: str) -> FileLock:
    """The lock under which one process makes ``name`` while the others wait."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    return FileLock(cache_dir / f"{name}.lock")


def content_of(corpus: Corpus, cache_dir: Path) -> str:
    """The digest of all that a corpus holds, in order.

    Files are read for it once, and again only when a path, a size or a time of change is another. Their names do not
    count, only their kinds: a corpus that moved keeps its cache.
    """
    if corpus.data_set is not None:
        return digest("data set", corpus.data_set._fingerprint)
    stats = [(file, file.stat()) for file in map(Path.absolute, corpus.files)]
    known = cache_dir / "contents" / f"{digest([[str(f), s.st_size, s.st_mtime_ns] for f, s in stats])}.json"
    try:
        return json.loads(known.read_text())["content"]
    except (OSError, ValueError, KeyError, TypeError):
        content = digest([[file.suffixes[-2:], _content_of_file(file)] for file in corpus.files])
    if time.time() - max(stat.st_mtime for _, stat in stats) > _RACY_SECONDS:
        _write_json(known, {"content": content, "name": corpus.name})
    return content


def open_cache(folder: Path) -> TokenCache | None:
    """The cache in a folder; None if it is absent, incomplete or damaged."""
    try:
        meta = json.loads((folder / _META).read_text())
        splits = {name: Split(**split) for name, split in meta["splits"].items()}
        cache = TokenCache(folder, meta["dtype"], splits, meta["files"], meta["skipped"])
        whole = all([*_length_and_checksum(folder / name)] == wanted for name, wanted in cache.files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return cache if whole else None


def build_cache(
    folder: Path,
    encoded: Iterable[tuple[str, list[list[int]], int]],
    *,
    vocab_size: int,
    skipped: Counter[str],
) -> TokenCache:
    """Write a cache folder, whole or not at all; one process at a time, see `cached`.

    Args:
        encoded: groups of documents of one split: its name, their ids, their length together in UTF-8 bytes.
        vocab_size: every id must be below it; it also chooses 2 or 4 bytes per id.
        skipped: filled while ``encoded`` is read.
    Raises: ValueError: an id is out of range.
    """
    unfinished = folder.with_name(f"{folder.name}.writing")  # left there if the process is killed; then overwritten
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    try:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_SplitWriter(unfinished, name, dtype, vocab_size)) for name in SPLITS}
            for split, documents, text_bytes in encoded:
                writers[split].write(documents, text_bytes)
        splits = {name: Split(writer.documents, writer.text_bytes, writer.tokens) for name, writer in writers.items()}
        files = {file.name: [*_length_and_checksum(file)] for file in sorted(unfinished.iterdir())}
        cache = TokenCache(folder, dtype, splits, files, dict(skipped))
        _write_json(unfinished / _META, {k: v for k, v in asdict(cache).items() if k != "folder"})
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one; who has it mapped keeps its pages
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return cache


class _SplitWriter:
    """Appends documents to the two files of one split."""

    def __init__(self, folder: Path, split: str, dtype: str, vocab_size: int) -> None:
        self.ids, self.starts = (folder / f"{split}.ids").open("wb"), (folder / f"{split}.starts").open("wb")
        self.dtype, self.vocab_size = dtype, vocab_size
        self.documents = self.text_bytes = self.tokens = 0

    def write(self, documents: list[list[int]], text_bytes: int) -> None:
        lengths = np.fromiter(map(len, documents), "int64", len(documents))
        ids = np.fromiter(chain.from_iterable(documents), "int64", int(lengths.sum()))
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"The tokenizer made the id {ids.max()}, beyond its own vocabulary of {self.vocab_size}: its files do "
                f"not belong together."
            )
        (self.tokens + np.cumsum(lengths) - lengths).tofile(self.starts)
        ids.astype(self.dtype).tofile(self.ids)
        self.documents += len(documents)
        self.text_bytes += text_bytes
        self.tokens += ids.size

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.ids.close()
        self.starts.close()


def cached(folder: Path, build: Callable[[Path], TokenCache]) -> TokenCache:
    """The cache in ``folder``, built there by the first process that asks for it while the others wait."""
    with locked(folder.parent, folder.name):
        return open_cache(folder) or build(folder)


def _mapped(file: Path, dtype: str) -> np.ndarray:
    if file.stat().st_size == 0:  # the operating system maps no empty file
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            yield chunk


def _length_and_checksum(file: Path) -> tuple[int, int]:
    length = checksum = 0
    for chunk in _chunks(file):
        length, checksum = length + len(chunk), zlib.crc32(chunk, checksum)
    return length, checksum


def _content_of_file(file: Path) -> str:
    content = blake2b(digest_size=16)
    try:
        for chunk in _chunks(file):
            content.update(chunk)
    except OSError as error:  # it will be skipped; the reason is part of what the corpus is
        return f"unreadable: {type(error).__name__}"
    return content.hexdigest()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.writing")
    unfinished.write_text(json.dumps(value, indent=1))
    unfinished.replace(file)
