import json
import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from lightning_slm.data import TextData
from lightning_slm.data.cache import build_cache, content_of, open_cache
from lightning_slm.data.sources import find_corpus

DOCUMENTS = {"train": [[1, 2, 3], [4], [5, 6]], "val": [[7, 8]]}


def built(folder, vocab_size=10):
    groups = [(split, documents, 10 * len(documents)) for split, documents in DOCUMENTS.items()]
    return build_cache(folder, groups, vocab_size=vocab_size, skipped=Counter({"binary files": 1}))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(10, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_what_was_written_is_read_back(vocab_size, dtype, tmp_path):
    made = built(tmp_path / "cache", vocab_size)
    cache = open_cache(tmp_path / "cache")
    assert cache == made
    assert cache.ids("train").dtype == dtype
    assert cache.ids("train").tolist() == [1, 2, 3, 4, 5, 6]
    assert cache.starts("train").tolist() == [0, 3, 4]
    assert cache.ids("test").tolist() == []
    assert (cache.splits["train"].documents, cache.splits["train"].text_bytes, cache.splits["train"].tokens) == (
        3,
        30,
        6,
    )
    assert cache.skipped == {"binary files": 1}


def test_ids_of_several_groups_follow_one_another_with_the_right_starts(tmp_path):
    groups = [("train", [[1, 2]], 2), ("val", [[9]], 1), ("train", [[3], [4, 5]], 3)]
    cache = build_cache(tmp_path / "cache", groups, vocab_size=10, skipped=Counter())
    assert cache.ids("train").tolist() == [1, 2, 3, 4, 5]
    assert cache.starts("train").tolist() == [0, 2, 3]


def test_an_id_out_of_range_is_refused_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="the id 8, beyond its own vocabulary of 8"):
        built(tmp_path / "cache", vocab_size=8)
    assert list(tmp_path.iterdir()) == []


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
@pytest.mark.parametrize("name", ["train.ids", "val.starts", "meta.json"])
def test_a_damaged_cache_is_not_opened(damage, name, tmp_path):
    built(tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    assert open_cache(tmp_path / "cache") is None


def test_a_damaged_cache_is_built_again_with_the_same_ids(corpus, tmp_path):
    make = lambda: TextData(corpus, vocab_size=300, cache_dir=tmp_path / "cache")  # noqa: E731
    before = np.array(make().cache.ids("train"))
    file = make().cache.folder / "train.ids"
    truncate(file)
    assert np.array_equal(make().cache.ids("train"), before)
    assert open_cache(file.parent) is not None


def test_a_build_that_is_interrupted_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    data = TextData(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr("lightning_slm.data.cache._length_and_checksum", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.prepare_data()
    left = [file for file in (tmp_path / "cache" / "tokens").iterdir() if file.suffix != ".lock"]
    assert left == []
    assert data.cache.splits["train"].tokens > 0


BUILD = """
import sys, time
from pathlib import Path
from lightning_slm.data import TextData, text_data
corpus, cache, builds, go = map(Path, sys.argv[1:])
slow = text_data.encode_documents
def counted(*args):
    (builds / str(time.time_ns())).touch()
    time.sleep(1.0)
    yield from slow(*args)
text_data.encode_documents = counted
data = TextData(corpus, vocab_size=300, cache_dir=cache)
(builds.parent / f"ready{time.time_ns()}").touch()
while not go.exists():
    time.sleep(0.01)
print(data.cache.ids("train").sum())
"""


@pytest.mark.slow
def test_of_processes_that_start_together_one_builds_and_the_others_wait(corpus, tmp_path):
    (tmp_path / "builds").mkdir()
    arguments = [corpus, tmp_path / "cache", tmp_path / "builds", tmp_path / "go"]
    command = [sys.executable, "-c", BUILD, *map(str, arguments)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while len(list(tmp_path.glob("ready*"))) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    sums = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list((tmp_path / "builds").iterdir())) == 1
    assert sums[0] == sums[1] != ""


def test_a_second_start_reads_no_text_and_takes_less_than_a_second(corpus, tmp_path, monkeypatch):
    for file in corpus.iterdir():
        os.utime(file, (1e9, 1e9))  # long ago: what changed within two seconds may change again unseen
    TextData(corpus, vocab_size=300, cache_dir=tmp_path / "cache").prepare_data()
    monkeypatch.setattr("lightning_slm.data.text_data.read_documents", lambda *_: 1 / 0)
    monkeypatch.setattr("lightning_slm.data.cache._content_of_file", lambda *_: 1 / 0)
    begin = time.perf_counter()
    TextData(corpus, vocab_size=300, cache_dir=tmp_path / "cache").prepare_data()
    assert time.perf_counter() - begin < 1.0


def test_a_changed_document_makes_another_cache_and_a_moved_corpus_does_not(corpus, tmp_path):
    folder = TextData(corpus, vocab_size=300, cache_dir=tmp_path / "cache").cache.folder
    moved = corpus.rename(tmp_path / "moved")
    assert TextData(moved, vocab_size=300, cache_dir=tmp_path / "cache").cache.folder == folder
    file = moved / "00.py"
    stat = file.stat()
    file.write_text(file.read_text().replace("e", "a"))  # of the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TextData(moved, vocab_size=300, cache_dir=tmp_path / "cache").cache.folder != folder


def test_a_file_changed_a_moment_ago_is_read_again_at_the_next_start(corpus, tmp_path):
    """Within the clock's grain a second change could keep both size and time."""
    found = find_corpus(corpus)
    before = content_of(found, tmp_path / "cache")
    file = corpus / "00.py"
    stat = file.stat()
    file.write_text(file.read_text().replace("e", "a"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_of(found, tmp_path / "cache") != before


def test_fractions_and_tokenizers_have_caches_of_their_own(corpus, tmp_path):
    variants = [{}, {"val_fraction": 0.2}, {"test_fraction": 0.2}, {"vocab_size": 280}, {"text_column": "body"}]
    make = lambda kwargs: TextData(corpus, **{"vocab_size": 300, "cache_dir": tmp_path, **kwargs})  # noqa: E731
    assert len({make(variant).cache.folder for variant in variants}) == len(variants)
    assert make({"window": 64}).cache.folder == make({}).cache.folder  # windows are cut when they are read


def test_the_cache_is_where_it_was_asked_to_be(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SLM_CACHE", str(tmp_path / "from_environment"))
    assert TextData(corpus, vocab_size=300).cache.folder.parents[1] == tmp_path / "from_environment"
    monkeypatch.delenv("LIGHTNING_SLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TextData(corpus).cache_dir == tmp_path / ".cache" / "lightning-slm"


def test_the_record_of_a_cache_is_readable_by_a_person(tmp_path):
    built(tmp_path / "cache")
    meta = json.loads((tmp_path / "cache" / "meta.json").read_text())
    assert meta["splits"]["val"] == {"documents": 1, "text_bytes": 10, "tokens": 2}
