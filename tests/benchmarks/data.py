"""Tokenising the default corpus against ``encode_batch`` alone, and a second start from the cache."""

import tempfile
from collections import Counter
from pathlib import Path

from harness import Goal, Results, alternate, ratio, timed

from lightning_slm import TextData
from lightning_slm.data.readers import read_documents
from lightning_slm.data.sources import find_corpus


def run(results: Results) -> None:
    folder = tempfile.TemporaryDirectory()
    first = TextData(cache_dir=folder.name)
    first.prepare_data()
    assert first.tokenizer is not None
    file = Path(folder.name) / "tokenizer"
    first.tokenizer.save_pretrained(file)
    documents = [text for source in find_corpus(None).files for text in read_documents(source, "text", Counter())]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as empty:
            TextData(tokenizer=file, cache_dir=empty).prepare_data()

    variants = {
        "ours": lambda: timed(ours),
        "encode_batch": lambda: timed(lambda: first.tokenizer.backend_tokenizer.encode_batch(documents)),
    }
    times = alternate(variants, rounds=5)
    megabytes = sum(len(t.encode()) for t in documents) / 1e6
    size = f"{megabytes:.1f} MB in {min(times['ours']):.1f} s, reading and writing included"
    value = ratio(times, "ours", "encode_batch")
    results.add(Goal("tokenising the standard library / encode_batch", value, 1.10, at_least=False, detail=size))

    def again() -> None:
        data = TextData(cache_dir=folder.name)
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))

    value = min(timed(again) for _ in range(3))
    results.add(Goal("second start from the cache, to the first batch", value, 1.0, at_least=False, unit="s"))
    folder.cleanup()
