import json
import shutil

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from transformers import LlamaConfig

from lightning_slm.data import TextData, split_of

SMALL = {"vocab_size": 300, "window": 16, "batch_size": 2, "val_fraction": 0.2, "test_fraction": 0.2}


class Reader(LightningModule):
    """Keeps the batches it sees in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[list[int]]]] = {"fit": [], "val": [], "test": [], "predict": []}

    def _keep(self, stage, batch):
        self.seen[stage].append(batch["input_ids"].tolist())
        return self.weight * 0

    def training_step(self, batch):
        return self._keep("fit", batch)

    def validation_step(self, batch):
        return self._keep("val", batch)

    def test_step(self, batch):
        return self._keep("test", batch)

    def predict_step(self, batch):
        return self._keep("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**kwargs):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=1, **kwargs,
    )  # fmt: skip


def rows(batches):
    return [row for batch in batches for row in batch]


def test_a_folder_becomes_batches_of_ids_and_labels(corpus, tmp_path):
    data = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")
    assert data.tokenizer is None
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
    }
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
    assert data.vocab_size == len(data.tokenizer) <= 300


def test_the_ids_of_a_split_are_its_documents_and_their_ends(corpus, tmp_path):
    data = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    for split in ("train", "val", "test"):
        expected = [text for text in texts if split_of(text, 0.2, 0.2) == split]
        end = "<|endoftext|>"
        assert data.tokenizer is None or data.tokenizer.eos_token == end
        assert data.cache.splits[split].documents == len(expected)
        assert data.tokenizer.decode(data.cache.ids(split)).split(end) == [*expected, ""]
        assert data.bytes_per_token(split) == sum(len(t.encode()) for t in expected) / len(data.cache.ids(split))


def test_the_tokenizer_never_sees_what_it_is_evaluated_on(corpus, tmp_path):
    for file in corpus.iterdir():
        if split_of(file.read_text(), 0.2, 0.2) != "train":
            file.write_text(file.read_text() + "zyzzyva " * 50)  # may move it, but the word stays out of most documents
    texts = [file.read_text() for file in corpus.iterdir()]
    held_out = [text for text in texts if "zyzzyva" in text and split_of(text, 0.2, 0.2) != "train"]
    for file in corpus.iterdir():
        if "zyzzyva" in file.read_text() and file.read_text() not in held_out:
            file.unlink()
    assert held_out
    data = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")
    data.prepare_data()
    assert len(data.tokenizer.tokenize("zyzzyva")) == 7


def test_all_stages_of_a_trainer_run_and_evaluation_is_in_order_and_complete(corpus, tmp_path):
    data, module = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache"), Reader()
    trainer(num_sanity_val_steps=0).fit(module, data)
    trainer().test(module, data, verbose=False)
    trainer().predict(module, data)
    for split, stage in (("val", "val"), ("test", "test"), ("test", "predict")):
        ids = data.cache.ids(split).tolist()
        assert rows(module.seen[stage]) == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert len({str(row) for row in rows(module.seen["fit"])}) == len(rows(module.seen["fit"]))


def test_overfitting_a_batch_repeats_that_batch(corpus, tmp_path):
    module = Reader()
    run = trainer(overfit_batches=1)
    run.fit_loop.max_epochs = 3
    run.fit(module, TextData(corpus, **SMALL, cache_dir=tmp_path / "cache"))
    assert len(module.seen["fit"]) == 3
    assert module.seen["fit"][0] == module.seen["fit"][1] == module.seen["fit"][2]


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # Lightning asks; it is meant so
def test_without_a_validation_fraction_there_is_no_validation(corpus, tmp_path):
    module = Reader()
    data = TextData(corpus, **{**SMALL, "val_fraction": 0.0}, cache_dir=tmp_path / "cache")
    trainer().fit(module, data)
    assert module.seen["fit"]
    assert not module.seen["val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 0.001}, r"validation split has 0 tokens .* raise val_fraction=0.001"),
        ({"window": 5000}, r"training split has \d+ tokens in \d+ documents, and one step takes 2 x window=5000"),
        ({"batch_size": 5000}, "lower batch_size"),
    ],
)
def test_a_split_without_a_whole_window_says_what_to_do(change, message, corpus, tmp_path):
    data = TextData(corpus, **{**SMALL, **change}, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_documents_shorter_than_a_window_are_packed_together(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(2000)))
    data = TextData(tmp_path / "a.jsonl", vocab_size=300, window=64, cache_dir=tmp_path / "cache", document_mask=True)
    batch = next(iter(data.train_dataloader()))
    ends = (batch["input_ids"] == data.tokenizer.eos_token_id)[:, :-1]
    assert ends.sum(1).min() > 5
    assert torch.equal(batch["position_ids"][:, 1:] == 0, ends)
    assert torch.equal(batch["labels"][:, 1:] == -100, ends)


def test_copies_of_a_document_do_not_leak_between_splits(corpus, tmp_path):
    for file in list(corpus.iterdir()):
        shutil.copy(file, corpus / f"copy_of_{file.name}")
    data = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")
    data.prepare_data()
    texts = {
        split: data.tokenizer.decode(data.cache.ids(split)).split("<|endoftext|>")[:-1] for split in data.cache.splits
    }
    assert not set(texts["train"]) & set(texts["val"]) | set(texts["train"]) & set(texts["test"])
    assert all(len(found) == 2 * len(set(found)) for found in texts.values())


def test_skipped_files_are_warned_of_once_and_counted_for_ever(corpus, tmp_path):
    (corpus / "binary.py").write_bytes(b"\0\1\2")
    make = lambda: TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")  # noqa: E731
    with pytest.warns(UserWarning, match="skipped: 1 binary files"):
        make().prepare_data()
    assert make().skipped == {"binary files": 1}


@pytest.mark.parametrize("content", [b"", b"\0\0", b"\xff\xfe"])
def test_a_corpus_without_any_text_is_refused_with_the_reason(content, tmp_path, recwarn):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"has no text: 1 files were read. Skipped: 1 (files or|binary|files that)"):
        TextData(tmp_path / "a.txt", cache_dir=tmp_path / "cache").prepare_data()


def test_a_model_too_small_for_the_tokenizer_is_refused_before_it_trains(corpus, tmp_path):
    data = TextData(corpus, **SMALL, cache_dir=tmp_path / "cache")
    module = Reader()
    module.model = torch.nn.Identity()
    module.model.config = LlamaConfig(vocab_size=280)
    with pytest.raises(ValueError, match="the model's vocab_size is 280"):
        trainer().fit(module, data)
    module.model.config = LlamaConfig(vocab_size=300)
    trainer().fit(module, data)
    assert module.seen["fit"]


@pytest.mark.parametrize("wrong", [{"window": 1}, {"batch_size": 0}, {"seed": -1}, {"val_fraction": 1.0}])
def test_values_that_mean_nothing_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TextData(**wrong)


def test_every_argument_survives_yaml(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cli"])
    quiet = {"save_config_callback": None, "seed_everything_default": 1, "trainer_defaults": {"logger": False}}
    wanted = {
        "path": str(corpus), "tokenizer": None, "vocab_size": 300, "window": 16, "batch_size": 2, "text_column": "body",
        "document_mask": True, "val_fraction": 0.1, "test_fraction": 0.2, "num_workers": 1, "seed": 3,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    arguments = [f"--data.{name}={json.dumps(value) if value is None else value}" for name, value in wanted.items()]
    cli = LightningCLI(Reader, TextData, run=False, args=arguments, **quiet)
    (tmp_path / "config.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    again = LightningCLI(Reader, TextData, run=False, args=["--config", str(tmp_path / "config.yaml")], **quiet)
    assert {name: getattr(again.config.data, name) for name in wanted} == wanted
    assert again.datamodule.document_mask


def test_a_data_set_on_disk_is_split_and_read_like_files(tmp_path):
    from datasets import Dataset

    texts = [f"row {i} of a data set" for i in range(500)]
    Dataset.from_dict({"body": texts, "label": [0] * 500}).save_to_disk(tmp_path / "saved")
    data = TextData(tmp_path / "saved", vocab_size=300, window=16, text_column="body", cache_dir=tmp_path / "cache")
    assert sum(split.documents for split in data.cache.splits.values()) == 500
    with pytest.raises(ValueError, match="Near names: 'body'"):
        TextData(tmp_path / "saved", text_column="bodi", cache_dir=tmp_path / "cache").prepare_data()


def test_wikitext_with_gpt2s_tokenizer(shared_data, tmp_path):
    path, tokenizer = shared_data / "wikitext" / "valid.txt.gz", shared_data / "tokenizers" / "gpt2"
    data = TextData(path, tokenizer, window=128, batch_size=4, cache_dir=tmp_path / "cache")
    data.prepare_data()
    data.setup()
    assert data.vocab_size == 50257
    assert 4.0 < data.bytes_per_token("train") < 5.0  # English in GPT-2's tokens: about 4.4
    assert data.cache.splits["val"].documents > 3
    assert " the " in data.tokenizer.decode(next(iter(data.val_dataloader()))["input_ids"][0])


def test_stories_are_documents(shared_data, tmp_path):
    data = TextData(
        shared_data / "tinystories" / "valid.txt.gz", vocab_size=400, window=32, cache_dir=tmp_path / "cache"
    )
    assert sum(split.documents for split in data.cache.splits.values()) == 116  # stories, by the data set's own README


def test_with_nothing_said_the_standard_library_is_the_corpus(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for number in range(80):
        (library / f"package{number % 3}").mkdir(parents=True, exist_ok=True)
        (library / f"package{number % 3}" / f"{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 20)
    (library / "test").mkdir()
    (library / "test" / "test_x.py").write_text("never = 'seen'")
    monkeypatch.setattr("lightning_slm.data.sources.sysconfig.get_path", lambda _: str(library))
    data = TextData(vocab_size=300, window=32, cache_dir=tmp_path / "cache")
    assert sum(split.documents for split in data.cache.splits.values()) == 80


@pytest.mark.slow
def test_the_real_standard_library_is_tokenised_and_found_again(tmp_path):
    data = TextData(cache_dir=tmp_path / "cache")
    data.prepare_data()
    train = data.cache.splits["train"]
    assert train.tokens > 1_000_000
    assert 3.0 < data.bytes_per_token("val") < 4.5
    assert data.vocab_size == 4096
    assert set(data.skipped) <= {"files or rows without text"}
    text = data.tokenizer.decode(data.cache.ids("train")[:20_000])
    assert "import" in text
    assert "def " in text
