import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lightning_slm.data.readers import PASSAGE, read_documents
from lightning_slm.data.sources import find_corpus, standard_library_files

TEXTS = ["first, with a comma", 'second\nover two "lines"', "drittes: äöü 東京"]


def read(file: Path, column: str = "text") -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    return list(read_documents(file, column, skipped)), dict(skipped)


def quoted(texts: list[str], delimiter: str) -> str:
    cells = ['"' + text.replace('"', '""') + '"' for text in texts]
    return f"id{delimiter}text\n" + "".join(f"{i}{delimiter}{cell}\n" for i, cell in enumerate(cells))


def content(kind: str, folder: Path) -> bytes:
    if kind == "parquet":
        parquet.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), folder / "table")
        return (folder / "table").read_bytes()
    return {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
        "csv": quoted(TEXTS, ","),
        "tsv": quoted(TEXTS, "\t"),
        "txt": "\n<|endoftext|>\n".join(TEXTS),
    }[kind].encode()


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt", "parquet"])
def test_every_kind_of_file_gives_the_same_documents_also_compressed(kind, ending, tmp_path):
    data = content(kind, tmp_path)
    file = tmp_path / f"corpus.{kind}{ending}"
    file.write_bytes(gzip.compress(data) if ending else data)
    assert read(file) == (TEXTS, {})


@pytest.mark.parametrize("name", ["a.py", "a.md", "a.py.gz", "LICENSE"])
def test_a_source_file_is_one_document_byte_for_byte(name, tmp_path):
    text = "x = 1\r\n\n\n" + "y\n\n" * PASSAGE
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    documents, _ = read(tmp_path / name)
    if name == "LICENSE":  # of no known kind: read as one text
        assert "".join(documents) == text
    else:
        assert documents == [text]


def test_a_long_text_is_cut_into_passages_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{number} " + "word " * 150 + "\n\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    documents, _ = read(tmp_path / "a.txt")
    assert "".join(documents) == "".join(paragraphs)
    assert len(documents) > 5
    assert all(document.endswith("\n\n") for document in documents)
    assert all(PASSAGE <= len(document) <= 2 * PASSAGE for document in documents[:-1])


def test_what_is_no_text_is_counted_and_skipped(tmp_path):
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:30])
    (tmp_path / "no.gz.txt.gz").write_bytes(b"not compressed")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "good"}\n{"text": null}\n{"other": 1}\nnot json\n[1]\n{"text": "\\ud800"}\n'
    )
    skipped: Counter[str] = Counter()
    documents = [text for file in sorted(tmp_path.iterdir()) for text in read_documents(file, "text", skipped)]
    assert documents == ["good"]
    assert skipped == {
        "binary files": 1,
        "files that are not UTF-8": 1,
        "unreadable files": 3,
        "files or rows without text": 3,
        "lines that are not a JSON object": 2,
        "rows that are not UTF-8": 1,
    }


def test_a_file_that_may_not_be_opened_is_counted(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(Path, "open", refuse)
    assert read(tmp_path / "a.py") == ([], {"unreadable files": 1})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_not_there_is_refused_with_near_names(kind, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(content(kind, tmp_path))
    with pytest.raises(ValueError, match=r"no column text_column='texts'. Near names: 'text'"):
        read(tmp_path / f"a.{kind}", "texts")


def test_a_field_longer_than_pythons_limit_is_read_and_the_limit_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert read(tmp_path / "a.csv") == (["x" * 200_000], {})
    assert csv.field_size_limit() == before


def test_a_folder_a_glob_and_a_file_are_found_in_a_fixed_order(tmp_path):
    for name in ("b.py", "a/c.txt.gz", "a/d.png", ".git/e.py", "a/.hidden.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda corpus: [str(file.relative_to(tmp_path)) for file in corpus.files]  # noqa: E731
    assert names(find_corpus(tmp_path)) == ["a/c.txt.gz", "b.py"]
    assert names(find_corpus(f"{tmp_path}/**/*.py")) == ["b.py"]
    assert names(find_corpus(tmp_path / "a/d.png")) == ["a/d.png"]  # asked for by name: the reader judges it


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/*.jsonl", "holds no file that we read"),
        ("{}/empty", "holds no file that we read"),
        ("{}/corpse", r"does not exist. Near names: 'corpus'"),
        ("corpus.txt", "does not exist"),
        ("someone/no-such-data", "no data set of that name could be loaded .* Without a network, pass a local path"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_a_way_out(path, message, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_corpus(path.format(tmp_path))


def test_a_data_set_on_disk_gives_its_training_split(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"test": Dataset.from_dict({"text": ["seen by nobody"]}), "train": Dataset.from_dict({"text": TEXTS})}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(find_corpus(tmp_path / "saved").data_set["text"]) == TEXTS


def test_of_the_standard_library_only_sources_that_a_person_wrote_are_taken(tmp_path):
    kept = ["ast.py", "json/decoder.py", "unittest/case.py"]
    left = [
        "test/test_ast.py", "unittest/test/x.py", "idlelib/idle_test/x.py", "encodings/cp037.py", "json/data.json",
        "site-packages/torch/x.py", "pydoc_data/topics.py", "lib2to3/tests/x.py", "config-3.11-x86/python-config.py",
        "html/entities.py", "_sysconfigdata__linux_.py", "__pycache__/ast.py",
    ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    assert [str(file.relative_to(tmp_path)) for file in standard_library_files(tmp_path)] == kept
    with pytest.raises(ValueError, match="pass path="):
        standard_library_files(tmp_path / "json" / "none")


def test_the_standard_library_of_this_python_is_a_real_corpus():
    names = [file.name for file in find_corpus(None).files]
    assert len(names) > 300
    assert {"argparse.py", "inspect.py", "csv.py"} <= set(names)
