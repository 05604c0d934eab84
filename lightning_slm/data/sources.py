"""Where text comes from: a file, a folder, a glob, a data set by name, or the standard library of this Python."""

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_slm.data.readers import READABLE, kind_of
from lightning_slm.errors import near

# Of the standard library: tests, what pip installed, and tables that a program wrote are no code a person would write.
_NOT_SOURCE_FOLDERS = {
    "__pycache__", "config-*", "dist-packages", "encodings", "idle_test", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests",
}  # fmt: skip
_NOT_SOURCE_FILES = {"_casefix.py", "_sysconfigdata_*.py", "entities.py", "stringprep.py"}
_DATA_SET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SAVED_BY_DATASETS = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Corpus:
    """Files of this machine in a fixed order, or a data set of the `datasets` library, never both."""

    name: str
    files: tuple[Path, ...] = ()
    data_set: Any = None


def find_corpus(path: str | Path | None) -> Corpus:
    """What ``path`` stands for; None is the standard library of the running interpreter.

    A folder is read with all below it, except hidden names and kinds of files that we do not read. A folder written by
    `Dataset.save_to_disk` is a data set. A data set's configuration follows a colon: ``"wikitext:wikitext-2-raw-v1"``.

    Raises:
        ValueError: there is no such thing, or nothing in it that we read.
    """
    if path is None:
        return Corpus("the Python standard library", standard_library_files())
    name, place = str(path), Path(path).expanduser()
    if place.is_file():
        return Corpus(name, (place,))
    if place.is_dir():
        if any((place / marker).is_file() for marker in _SAVED_BY_DATASETS):
            return Corpus(name, data_set=_data_set_on_disk(place))
        below = (file for file in _walk(place, [".*"], [".*"]) if kind_of(file) in READABLE)
        return Corpus(name, _files_found(name, below))
    if has_magic(name):
        return Corpus(name, _files_found(name, (Path(match) for match in glob(str(place), recursive=True))))
    if not _DATA_SET_NAME.fullmatch(name) or kind_of(place) in READABLE:
        siblings = (file.name for file in place.parent.glob("*"))
        raise ValueError(f"path={name!r} does not exist. {near(place.name, siblings)}")
    return Corpus(name, data_set=_data_set_by_name(name))


def standard_library_files(folder: Path | None = None) -> tuple[Path, ...]:
    """The sources of the standard library, without tests, installed packages and generated tables."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    sources = _walk(folder, _NOT_SOURCE_FOLDERS, _NOT_SOURCE_FILES)
    files = tuple(sorted(file for file in sources if file.suffix == ".py"))
    if not files:
        raise ValueError(f"This Python has no sources of its standard library in {folder}: pass path=<your texts>.")
    return files


def _walk(folder: Path, skip_folders: Iterable[str], skip_files: Iterable[str]) -> Iterator[Path]:
    """All files below a folder whose own name, and whose folders' names, match no pattern."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _matches(name, skip_folders)]  # so that os.walk leaves them out
        yield from (Path(root, name) for name in files if not _matches(name, skip_files))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _files_found(name: str, candidates: Iterator[Path]) -> tuple[Path, ...]:
    files = tuple(sorted(file for file in candidates if file.is_file()))
    if not files:
        kinds = " ".join(f".{kind}" for kind in READABLE)
        raise ValueError(f"path={name!r} holds no file that we read ({kinds}, each also .gz); look for a typing error.")
    return files


def _data_set_on_disk(folder: Path) -> Any:
    from datasets import load_from_disk

    return _training_split(load_from_disk(str(folder)))


def _data_set_by_name(name: str) -> Any:
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        return _training_split(load_dataset(repository, configuration or None))
    except Exception as error:  # the hub raises a dozen unrelated types: offline, unknown, gated, needs a configuration
        raise ValueError(
            f"path={name!r} is no file, folder or glob here, and no data set of that name could be loaded "
            f"({type(error).__name__}: {error}). Without a network, pass a local path."
        ) from error


def _training_split(data_set: Any) -> Any:
    """Of a data set with published splits only ``train``: its test split stays unseen. Without one, all of it."""
    if not isinstance(data_set, dict):
        return data_set
    if "train" in data_set:
        return data_set["train"]
    from datasets import concatenate_datasets

    return concatenate_datasets([data_set[split] for split in sorted(data_set)])
