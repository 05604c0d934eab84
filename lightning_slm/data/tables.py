"""Labelled texts from tables and JSON lines: what is missing or does not fit is refused, with its file and row."""

import csv
import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_slm.data.readers import kind_of, long_fields, opened
from lightning_slm.errors import near

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_KINDS = (*_DELIMITERS, "jsonl")


class Example(NamedTuple):
    """One row: a text, what it is paired with (None: nothing), and its label."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class Columns:
    """Where in a row what stands; each a name, or, of a CSV or TSV file, a number from 0.

    Args:
        header: whether the first line names the columns; None: it does if a column is given by name.
        quoting: whether quotes enclose a field; None: in CSV they do, in TSV they are text like any other.
    """

    text: int | str = "text"
    pair: int | str | None = None
    label: int | str = "label"
    header: bool | None = None
    quoting: bool | None = None

    @property
    def all(self) -> dict[str, int | str]:
        """Argument's name -> column."""
        given = {"text": self.text, "text_pair": self.pair, "label": self.label}
        return {argument: column for argument, column in given.items() if column is not None}

    @property
    def named(self) -> bool:
        """Whether there is a header."""
        return self.header if self.header is not None else any(isinstance(c, str) for c in self.all.values())


@dataclass
class _Wrong:
    """Rows that lack something: the first of each kind, and how many."""

    file: Path
    first: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, row: int) -> None:
        self.first.setdefault(what, row)
        self.count[what] = self.count.get(what, 0) + 1

    def check(self, quoted: bool) -> None:
        """Raises: ValueError: there was one."""
        if not self.count:
            return
        listed = "; ".join(f"row {self.first[what]} has {what} ({n} such rows)" for what, n in self.count.items())
        hint = " If quotes are part of the text, quoting=False reads them so." if quoted else ""
        raise ValueError(f"{self.file}: {listed}. Correct or remove them.{hint}")


def read_examples(file: Path, columns: Columns) -> list[Example]:
    """The rows of one .csv, .tsv or .jsonl file, each also .gz.

    Raises:
        ValueError: the file does not exist, is of another kind, not UTF-8 or empty; a column is not there; a row has no
            text or no label (empty, null, NaN), or fewer fields than columns are asked for.
    """
    kind = kind_of(file)
    if not file.is_file():
        siblings = [sibling.name for sibling in file.parent.glob("*")] if file.parent.is_dir() else []
        raise ValueError(f"{str(file)!r} is no file. {near(file.name, siblings)}")
    if kind not in _KINDS:
        raise ValueError(f"{str(file)!r} is no file of labelled texts; wanted: .csv .tsv .jsonl, each also .gz.")
    wrong = _Wrong(file)
    try:
        with opened(file) as stream, long_fields():
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            rows = _json_rows(lines, file, columns) if kind == "jsonl" else _table_rows(lines, file, columns, wrong)
            examples = [example for row, values in rows if (example := _example(values, row, wrong)) is not None]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}); wanted: UTF-8.") from error
    wrong.check(quoted=kind in _DELIMITERS and _quoting(kind, columns))
    if not examples:
        raise ValueError(f"{file} has no rows.")
    return examples


def _quoting(kind: str, columns: Columns) -> bool:
    return kind == "csv" if columns.quoting is None else columns.quoting


def _table_rows(
    lines: io.TextIOWrapper, file: Path, columns: Columns, wrong: _Wrong
) -> Iterator[tuple[int, dict[str, Any]]]:
    kind = kind_of(file)
    how: Any = csv.QUOTE_MINIMAL if _quoting(kind, columns) else csv.QUOTE_NONE
    rows = csv.reader(lines, delimiter=_DELIMITERS[kind], quoting=how)
    places: dict[str, int] | None = None
    names = next(rows, []) if columns.named else None
    for row in filter(None, rows):
        if places is None:
            places = {argument: _place(argument, c, names, len(row), file) for argument, c in columns.all.items()}
        if len(row) <= max(places.values()):
            wrong.add(f"only {len(row)} fields", rows.line_num)
        else:
            yield rows.line_num, {argument: row[place] for argument, place in places.items()}


def _place(argument: str, column: int | str, names: list[str] | None, width: int, file: Path) -> int:
    if isinstance(column, str):
        if column not in (names or ()):
            raise ValueError(f"{file} has no column {argument}={column!r}. {near(column, names or ())}")
        return (names or []).index(column)
    if not 0 <= column < width:
        raise ValueError(f"{file} has no column {argument}={column}: its rows have the columns 0 to {width - 1}.")
    return column


def _json_rows(lines: io.TextIOWrapper, file: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    if numbers := {argument: c for argument, c in columns.all.items() if not isinstance(c, str)}:
        raise ValueError(f"{file}: JSON lines have names, no numbers; {numbers} must be keys.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}: line {number} is a {type(row).__name__}, no object with keys.")
        for argument, column in columns.all.items():
            if column not in row:
                raise ValueError(f"{file}: line {number} has no key {argument}={column!r}. {near(str(column), row)}")
        yield number, {argument: row[column] for argument, column in columns.all.items()}


def _example(values: dict[str, Any], row: int, wrong: _Wrong) -> Example | None:
    label = _label(values["label"])
    texts = [values["text"], *([values["text_pair"]] if "text_pair" in values else [])]
    if label is None:
        wrong.add("no label", row)
    elif not all(isinstance(text, str) and text.strip() for text in texts):
        wrong.add("no text", row)
    else:
        return Example(texts[0], texts[1] if len(texts) > 1 else None, label)
    return None


def _label(value: Any) -> str | None:
    """The label as text; None where there is none, which tables write as an empty field or as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    return None if text == "" or text.lower() == "nan" else text
