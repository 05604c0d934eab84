"""ClassificationData: tables as people have them, batches as wide as they must be, and errors that say which row."""

import gzip
import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from support import Killed, SaveAndDie, trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from lightning_slm.data import ClassificationData
from lightning_slm.data.labelled import ShuffledByLength, encode_examples
from lightning_slm.data.split import split_of
from lightning_slm.data.tables import Columns, Example, read_examples
from lightning_slm.data.tokenizer import load_tokenizer, train_tokenizer, with_mask_token

WORDS = ["good", "fine", "great", "bad", "poor", "awful"]
ROWS = [
    (f"{WORDS[i % 6]} film number {i} " + "and so on " * (i % 5), "pos" if i % 6 < 3 else "neg") for i in range(120)
]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "film", "##s", "good"]


def write(file, rows=ROWS, header=("text", "label")):
    """A table of the kind that the name says."""
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        text = "".join(json.dumps(dict(zip(header, row))) + "\n" for row in rows)
    else:
        between = "\t" if ".tsv" in file.name else ","
        text = "".join(between.join(map(str, row)) + "\n" for row in ([header] if header else []) + list(rows))
    file.write_bytes(gzip.compress(text.encode()) if file.name.endswith(".gz") else text.encode())
    return file


@pytest.fixture
def make(tmp_path):
    def make(file=None, **how):
        sizes = {"vocab_size": 300, "batch_size": 8, "cache_dir": tmp_path / "cache"}
        return ClassificationData(file or write(tmp_path / "train.csv"), **{**sizes, **how})

    return make


def texts_of(data, loader):
    rows = [row[mask.bool()].tolist() for b in loader for row, mask in zip(b["input_ids"], b["attention_mask"])]
    return [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


# Reading


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.csv.gz", "t.tsv.gz", "t.jsonl.gz"])
def test_every_kind_of_table_gives_the_same_rows(name, tmp_path):
    rows = read_examples(write(tmp_path / name), Columns())
    assert rows == [Example(text, None, label) for text, label in ROWS]


def test_columns_go_by_name_or_by_number_with_and_without_a_header(tmp_path):
    rows = [("0", "x", "first"), ("1", "y", "second")]
    plain, named = write(tmp_path / "a.tsv", rows, None), write(tmp_path / "b.tsv", rows, ("class", "", "sentence"))
    expected = [Example("first", None, "0"), Example("second", None, "1")]
    assert read_examples(plain, Columns(text=2, label=0)) == expected
    assert read_examples(named, Columns(text=2, label=0, header=True)) == expected
    assert read_examples(named, Columns(text="sentence", label="class")) == expected
    assert read_examples(named, Columns(text="sentence", label=0)) == expected
    assert read_examples(plain, Columns(text=2, pair=1, label=0))[1] == Example("second", "y", "1")


def test_quotes_enclose_fields_in_csv_and_are_text_in_tsv_unless_told_otherwise(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",x\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one\tx\n')
    (tmp_path / "b.tsv").write_text('text\tlabel\n"one\ttwo"\tx\n')
    assert read_examples(tmp_path / "a.csv", Columns())[0].text == 'one, "two"\nthree'
    assert read_examples(tmp_path / "a.tsv", Columns())[0].text == '"one'
    assert read_examples(tmp_path / "b.tsv", Columns(quoting=True))[0].text == "one\ttwo"


def test_labels_are_texts_whatever_json_has(tmp_path):
    file = write(tmp_path / "t.jsonl", [("a", 1), ("b", True), ("c", " x "), ("d", 2.5)])
    assert [e.label for e in read_examples(file, Columns())] == ["1", "true", "x", "2.5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text,label\na,x\n,x\nb,\nc,x\n,y\n", r"row 3 has no text \(2 such rows\); row 4 has no label \(1"),
        ("t.csv", "text,label\na,NaN\n", "row 2 has no label"),
        ("t.csv", "text,label\na,x\nb\n", r"row 3 has only 1 fields.*quoting=False"),
        ("t.tsv", "text\tlabel\na\tx\nb\n", r"row 3 has only 1 fields.*remove them\.$"),
        ("t.jsonl", '{"text": "a", "label": NaN}\n', "row 1 has no label"),
        ("t.jsonl", '{"text": null, "label": 1}\n', "row 1 has no text"),
        ("t.jsonl", '{"text": "a", "labels": 1}\n', r"line 1 has no key label='label'. Near names: 'labels'"),
        ("t.jsonl", "[1]\n", "line 1 is a list, no object"),
        ("t.jsonl", "{\n", "line 1 is no JSON"),
        ("t.csv", "txt,label\na,x\n", r"no column text='text'. Near names: 'txt'"),
        ("t.csv", "", "no rows"),
        ("t.csv", "text,label\n", "no rows"),
        ("t.txt", "a", r"wanted: .csv .tsv .jsonl"),
        ("t.csv", b"text,label\n\xff\xfe,x\n", "UnicodeDecodeError"),
        ("t.csv.gz", b"no gzip", "BadGzipFile"),
    ],
)
def test_what_is_missing_or_broken_is_refused_with_file_and_row(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_examples(file, Columns())
    assert name in str(error.value)


def test_a_number_beyond_the_columns_numbers_in_json_and_a_file_that_is_not_there_are_refused(tmp_path):
    write(tmp_path / "train.csv")
    with pytest.raises(ValueError, match="no column label=2: its rows have the columns 0 to 1"):
        read_examples(tmp_path / "train.csv", Columns(text=0, label=2))
    with pytest.raises(ValueError, match=r"have names, no numbers; \{'text': 0\}"):
        read_examples(write(tmp_path / "t.jsonl"), Columns(text=0))
    with pytest.raises(ValueError, match=r"'.*training.csv' is no file. Near names: 'train.csv'"):
        read_examples(tmp_path / "training.csv", Columns())


# Splits and classes


def test_a_fraction_is_chosen_by_the_text_and_every_row_is_somewhere(make):
    data = make(val_fraction=0.2, test_fraction=0.2)
    data.setup("fit")
    parts = {name: [] for name in ("train", "val", "test")}
    for text, _ in ROWS:
        parts[split_of(text, 0.2, 0.2)].append(text)
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert texts_of(data, loader) == parts[name]
    assert sum(data.counts["train"].values()) == len(parts["train"])


def test_files_of_their_own_leave_the_training_rows_whole(make, tmp_path):
    val = write(tmp_path / "val.csv", [("bad one", "neg"), ("good one", "pos")])
    data = make(val_path=val, test_path=val)
    data.setup("fit")
    assert data.counts == {"train": {"neg": 60, "pos": 60}, "val": {"neg": 1, "pos": 1}, "test": {"neg": 1, "pos": 1}}
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [0, 1]


def test_classes_are_sorted_numbers_by_value_or_as_they_are_given(make, tmp_path):
    numbered = write(tmp_path / "n.csv", [(f"text {i}", str(i % 11)) for i in range(110)])
    assert make(numbered).class_names == [str(i) for i in range(11)]
    assert make().class_names == ["neg", "pos"]
    given = make(class_names=["pos", "neg"])
    given.prepare_data()
    first = ROWS[0][1]
    assert given.class_names.index(first) == 0
    assert given.counts["train"] == {name: make().counts["train"][name] for name in ("pos", "neg")}


def test_the_balance_of_the_classes_is_told(make, tmp_path, caplog):
    file = write(tmp_path / "t.csv", [(f"text {i}", "rare" if i % 4 == 0 else "usual") for i in range(80)])
    with caplog.at_level("INFO", "lightning_slm.data"):
        make(file, val_fraction=0.0).prepare_data()
    assert "training: 80 texts (rare 25.0 %, usual 75.0 %)" in caplog.text


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([("a", "x"), ("b", "y")], {}, r"validation rows have the label 'z', which is not in the training rows"),
        ([("a", "x"), ("b", "z")], {"class_names": ["x", "y"]}, r"training rows have the label 'z'.* in class_names"),
        ([("a", "x"), ("b", "z")], {"class_names": ["x", "z", "zz"]}, r"no text of \['zz'\]"),
        ([("a", "z"), ("b", "z")], {}, r"All training rows have the label 'z'.*is label='label' the right column"),
    ],
)
def test_labels_that_do_not_fit_are_refused(rows, how, message, make, tmp_path):
    val = write(tmp_path / "val.csv", [("c", "z")])
    with pytest.raises(ValueError, match=message):
        make(write(tmp_path / "t.csv", rows), val_path=val, **how).prepare_data()


def test_arguments_that_cannot_be_meant_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="a name twice"):
        make(class_names=["a", "a"])
    with pytest.raises(ValueError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="path is not set"):
        ClassificationData().prepare_data()
    with pytest.raises(ValueError, match=r"There are 0 test texts.*give test_path, or raise test_fraction"):
        make().setup("test")
    with pytest.raises(ValueError, match=r"There are 2 training texts, and one step takes 8: give more, or lower"):
        make(write(tmp_path / "t.csv", [("a", "x"), ("b", "y")]), val_fraction=0.0).setup("fit")
    assert make(val_fraction=0.0).val_dataloader() == []


# Tokens


def test_a_batch_is_as_wide_as_its_longest_text_rounded_up_to_eight_and_padding_is_masked(make):
    data = make()
    for batch in data.train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == -(-lengths.max().item() // 8) * 8
        assert (batch["input_ids"][batch["attention_mask"] == 0] == data.tokenizer.pad_token_id).all()
        assert all(t.dtype == torch.int64 for t in batch.values())
        last = batch["input_ids"].gather(1, lengths[:, None] - 1)
        assert (last == data.tokenizer.eos_token_id).all()


def test_what_is_too_long_is_cut_and_counted_but_keeps_its_end(make):
    data = make(max_length=10)
    with pytest.warns(UserWarning, match=r"\d+ of 120 texts are longer than max_length=10 tokens and were cut"):
        data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] <= 10
    full = batch["attention_mask"].sum(1) == 10
    assert (batch["input_ids"][full, 9] == data.tokenizer.eos_token_id).all()
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        make(max_length=1).prepare_data()


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return load_tokenizer(str(tmp_path / "vocab.txt"))


def test_berts_vocabulary_is_read_and_frames_texts_and_pairs_as_bert_does(bert, tmp_path):
    assert isinstance(bert, BertTokenizer)
    for examples in ([Example("Good films", None, "x")], [Example("Good films", "a b c a b c", "x")]):
        pair = examples[0].pair
        theirs = bert(examples[0].text, pair, truncation=True, max_length=9)
        ours = encode_examples(examples, bert, 9)
        assert ours.ids_M.tolist() == theirs.input_ids
        assert ours.types_M.tolist() == theirs.token_type_ids
        assert ours.cut == (pair is not None)
    cased = tmp_path / "cased.txt"
    cased.write_text("\n".join([*BERT_WORDS, "Good"]))
    assert load_tokenizer(str(cased)).tokenize("Good") == ["Good"]
    cased.write_text("no\nvocabulary")
    with pytest.raises(ValueError, match=r"has no \[UNK\]"):
        load_tokenizer(str(cased))


def test_pairs_reach_the_batch_with_the_types_of_a_tokenizer_that_has_them(make, tmp_path, bert):
    file = write(tmp_path / "p.csv", [("good", "films a", "x"), ("b", "c", "y")] * 20, ("one", "two", "label"))
    how = dict(text="one", text_pair="two", val_fraction=0.0)
    for batch in make(file, tokenizer=tmp_path / "vocab.txt", **how).train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
        for length, types in zip(batch["attention_mask"].sum(1).tolist(), batch["token_type_ids"].tolist()):
            assert types == ([0, 0, 0] + [1] * (length - 3) + [0] * (8 - length))
    plain = make(file, **how)
    batch = next(iter(plain.train_dataloader()))
    assert "token_type_ids" not in batch
    ends = (batch["input_ids"] == plain.tokenizer.eos_token_id) & batch["attention_mask"].bool()
    assert ends.sum(1).tolist() == [2] * 8  # one behind each text of the pair


def test_text_that_spells_a_special_token_is_text_and_a_tokenizers_own_settings_stay():
    tokenizer = train_tokenizer(["some text"] * 50, 270)
    tokenizer.backend_tokenizer.enable_truncation(2)
    ids = encode_examples([Example("<|endoftext|> some text", None, "x")], tokenizer, 64).ids_M
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert len(ids) > 10
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_a_tokenizer_is_trained_once_on_the_training_texts_and_kept(make, tmp_path, monkeypatch):
    first = make()
    first.prepare_data()
    monkeypatch.setattr("lightning_slm.data.classification_data.train_tokenizer", None)
    again = make()
    again.prepare_data()
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_a_mask_token_is_its_own_or_what_the_vocabulary_calls_so_or_new_at_the_end(bert):
    assert with_mask_token(bert).mask_token == "[MASK]"
    raw = Tokenizer(models.WordLevel({"[MASK]": 0, "a": 1}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    named = with_mask_token(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert (named.mask_token_id, len(named)) == (0, 2)
    trained = train_tokenizer(["some text"] * 50, 270)
    before = len(trained)
    assert with_mask_token(trained).mask_token_id == before
    assert len(with_mask_token(trained)) == before + 1


# Order


def test_texts_of_about_one_length_come_together_each_once_in_another_order_every_epoch(make):
    data = make()
    data.prepare_data()
    texts = data._texts["train"]
    order = ShuffledByLength(texts, len(texts), 8, rank=0, ranks=1, seed=0)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
    for steps in epochs:
        flat = [i for step in steps for i in step]
        assert len(flat) == len(set(flat)) == len(texts) // 8 * 8
    assert epochs[0] != epochs[1]
    widths = [np.ptp(texts.lengths_N[step]) for step in epochs[0]]
    assert np.mean(widths) < 0.3 * np.ptp(texts.lengths_N)
    assert [len(step) for step in epochs[0]] == [8] * len(epochs[0])


def test_two_ranks_share_the_steps_of_one(make):
    data = make()
    data.prepare_data()
    texts = data._texts["train"]
    whole = list(ShuffledByLength(texts, len(texts), 16, rank=0, ranks=1, seed=3))
    parts = [list(ShuffledByLength(texts, len(texts), 8, rank=r, ranks=2, seed=3)) for r in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole


class Reader(LightningModule):
    """Notes the texts of every batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["input_ids"].tolist(), batch["labels"].tolist()))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(folder, module, data, callbacks: tuple[Callback, ...] = (), **how):
    trainer(folder, callbacks, steps=30, enable_checkpointing=bool(callbacks)).fit(module, data, **how)
    return module.seen


@pytest.mark.parametrize(("saved_at", "workers"), [(5, 0), (13, 0), (14, 0), (20, 0), (14, 2)])  # 13 are an epoch
def test_a_killed_run_goes_on_with_the_very_next_batch(saved_at, workers, make, tmp_path):
    straight = run(tmp_path, Reader(), make(num_workers=workers))
    assert len({str(batch) for batch in straight}) == 30
    with pytest.raises(Killed):
        run(tmp_path, Reader(), make(num_workers=workers), (SaveAndDie(tmp_path / "saved.ckpt", saved_at),))
    resumed = run(tmp_path, Reader(), make(num_workers=workers), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed == straight[saved_at:]


def test_a_place_in_other_data_is_refused(make, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Reader(), make(), (SaveAndDie(tmp_path / "saved.ckpt", 5),))
    other = write(tmp_path / "other.csv", [(text.upper(), label) for text, label in ROWS])
    with pytest.raises(ValueError, match="stopped within other data"):
        run(tmp_path, Reader(), make(other), ckpt_path=tmp_path / "saved.ckpt")


# Real tables


@pytest.mark.parametrize(
    ("path", "how", "counts"),
    [
        ("sst2/dev.tsv", dict(text="sentence"), {"0": 428, "1": 444}),
        ("ag_news/test_dev.csv.gz", dict(text=1, text_pair=2, label=0), {"1": 1529, "2": 1523, "3": 1503, "4": 1525}),
        ("cola/in_domain_train.tsv", dict(text=3, label=1), {"0": 2528, "1": 6023}),
        ("trec_qc/test.csv", dict(label="coarse"), None),
        ("rte/train_rte123.jsonl", dict(text="premise", text_pair="hypothesis"), None),
    ],
)
def test_published_tables_are_read_as_they_are(path, how, counts, shared_data, tmp_path):
    columns = {"text": "text", "label": "label", **how}
    columns["pair"] = columns.pop("text_pair", None)
    rows = read_examples(shared_data / path, Columns(**columns))
    found = {label: sum(e.label == label for e in rows) for label in sorted({e.label for e in rows})}
    assert found == (counts or found)
    assert len(found) > 1
