"""A corpus that is small, has several kinds of documents in it, and is the same every time."""

import random
from pathlib import Path

import pytest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 Python-like files of different lengths, some shorter than a window."""
    random.seed(5)
    words = ["def", "return", "self", "class", "import", "for", "in", "range", "len", "value", "index", "None", "True"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        text = " ".join(random.choices(words, k=random.choice([3, 60, 200])))
        (folder / f"{number:02}.py").write_text(f"# {number}\n{text}\n")
    return folder
