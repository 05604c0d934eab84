"""From a file to documents: plain text, JSON lines, tables; what cannot be read is counted, never guessed.

What a document is: a .md or .py file; a row of a table; of a .txt file, what stands between two ``<|endoftext|>``, and
without those, passages of 4,096 to 8,192 characters that end at a blank line where there is one. (Else a corpus
of one file, as Tiny Shakespeare is, would be one document, and nothing would be left to validate on.)
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_slm.errors import near

END_OF_TEXT = "<|endoftext|>"
NO_TEXT = "files or rows without text"
PASSAGE = 4096  # characters at least; twice as many at most, where no place to cut comes earlier
_PLACES_TO_CUT = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"\s")]


class _Unusable(Exception):
    """A file or row that is skipped; its message is the reason under which it is counted."""


def kind_of(file: Path) -> str:
    """``"csv"`` of ``table.csv.gz``: the last suffix but .gz, in lower case, without its dot."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1][1:] if suffixes else ""


def read_documents(file: Path, text_column: str, skipped: Counter[str]) -> Iterator[str]:
    """The documents of one file, in order; a kind we do not know is read as plain text.

    Args:
        text_column: the column, or key, that holds the text of tables and of JSON lines.
        skipped: reason -> how often a file, or a row, was skipped for it; added to.
    Raises: ValueError: there is no such column; the message lists near names.
    """
    read = READABLE.get(kind_of(file), _read_whole)
    try:
        with opened(file) as stream:
            yield from usable(read(stream, f"{file}", text_column), skipped)
    except _Unusable as reason:
        skipped[str(reason)] += 1
    except UnicodeDecodeError:
        skipped["files that are not UTF-8"] += 1
    except (OSError, EOFError, zlib.error):
        skipped["unreadable files"] += 1


def usable(values: Iterable[Any], skipped: Counter[str]) -> Iterator[str]:
    """Of a column's values, those that are text; the others are counted."""
    for value in values:
        if isinstance(value, _Unusable):
            skipped[str(value)] += 1
        elif not isinstance(value, str) or not value.strip():
            skipped[NO_TEXT] += 1
        elif not _is_unicode(value):
            skipped["rows that are not UTF-8"] += 1
        else:
            yield value


def check_column(column: str, columns: Iterable[str], where: str) -> None:
    """Refuse a column that is not there."""
    names = list(columns)
    if column not in names:
        raise ValueError(f"{where} has no column text_column={column!r}. {near(column, names)}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return False
    return True


def opened(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _decoded(stream: IO[bytes]) -> io.TextIOWrapper:
    """The stream as text; a byte that no text has (NUL) near its beginning says that it is none."""
    if b"\0" in stream.peek(1 << 13):  # type: ignore[attr-defined]
        raise _Unusable("binary files")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _read_whole(stream: IO[bytes], where: str, text_column: str) -> Iterator[str]:
    with _decoded(stream) as text:
        yield text.read()


def _read_text(stream: IO[bytes], where: str, text_column: str) -> Iterator[str]:
    with _decoded(stream) as lines:
        text = lines.read()
    if END_OF_TEXT in text:
        yield from (part.strip("\r\n") for part in text.split(END_OF_TEXT) if part.strip())
    else:
        yield from _passages(text)


def _passages(text: str) -> Iterator[str]:
    """All of the text, cut at the first blank line after each 4,096 characters; else at a line, a space, or anywhere.

    >>> [len(passage) for passage in _passages("x" * 5_000 + " " + "y" * 5_000)]
    [5001, 5000]
    """
    start = 0
    while len(text) - start > 2 * PASSAGE:
        low, high = start + PASSAGE, start + 2 * PASSAGE
        found = (place.search(text, low, high) for place in _PLACES_TO_CUT)
        cut = next((match.end() for match in found if match), high)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read_json_lines(stream: IO[bytes], where: str, text_column: str) -> Iterator[Any]:
    first = True
    with _decoded(stream) as lines:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                yield _Unusable("lines that are not a JSON object")
                continue
            if first:  # later rows may leave a key out, as a database does for an empty field
                check_column(text_column, row, where)
                first = False
            yield row.get(text_column)


def _read_table(delimiter: str) -> Callable[[IO[bytes], str, str], Iterator[Any]]:
    def read(stream: IO[bytes], where: str, text_column: str) -> Iterator[Any]:
        with long_fields(), _decoded(stream) as lines:
            rows = csv.DictReader(lines, delimiter=delimiter)
            if rows.fieldnames is not None:
                check_column(text_column, rows.fieldnames, where)
                yield from (row[text_column] for row in rows)

    return read


@contextmanager
def long_fields() -> Iterator[None]:
    """A field may hold a book; Python's own limit is 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(stream: IO[bytes], where: str, text_column: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    source = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
    try:
        table = parquet.ParquetFile(source)
        check_column(text_column, table.schema_arrow.names, where)
        for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


READABLE: dict[str, Callable[[IO[bytes], str, str], Iterator[Any]]] = {
    "txt": _read_text,
    "md": _read_whole,
    "py": _read_whole,
    "jsonl": _read_json_lines,
    "csv": _read_table(","),
    "tsv": _read_table("\t"),
    "parquet": _read_parquet,
}
