import json

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_slm.data.tokenizer import (
    check_vocabulary,
    encode_documents,
    end_of_document,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    trained_tokenizer,
)

TEXTS = [f"def f{i}(x):\n    return x + {i}  # größer, 東京\n" for i in range(300)]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def test_a_trained_tokenizer_gives_every_text_back_also_characters_it_never_saw(trained):
    text = "\tif 🙂 != 'ñ':\r\n        pass  \n\n\n"
    assert trained.decode(trained.backend_tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert len(trained) == 300
    assert trained.eos_token == "<|endoftext|>"


def test_training_twice_gives_the_same_tokenizer(trained):
    assert train_tokenizer(TEXTS, 300).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_training_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256 is below 257"):
        train_tokenizer(TEXTS, 256)


def test_a_kept_tokenizer_is_not_trained_again_and_a_damaged_one_is(tmp_path, trained):
    trainings = []

    def train():
        trainings.append(1)
        return trained

    file = tmp_path / "deeper" / "kept.json"
    first = trained_tokenizer(file, train)
    again = trained_tokenizer(file, train)
    assert len(trainings) == 1
    assert fingerprint(first) == fingerprint(again)
    assert again.eos_token_id == trained.eos_token_id
    file.write_text(file.read_text()[:1000])
    assert fingerprint(trained_tokenizer(file, train)) == fingerprint(trained)
    assert len(trainings) == 2


def test_gpt2s_two_files_are_gpt2s_tokenizer(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert tokenizer("Hello world").input_ids == [15496, 995]  # as in GPT-2's own repository
    assert end_of_document(tokenizer) == 50256


def test_a_tokenizer_json_and_a_saved_folder_are_the_same_tokenizer(tmp_path, trained):
    trained.save_pretrained(tmp_path / "saved")
    trained.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = trained(TEXTS[7]).input_ids
    for source in (tmp_path / "saved", tmp_path / "tokenizer.json", tmp_path):
        assert load_tokenizer(str(source))(TEXTS[7]).input_ids == ids


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/tokenizer.jsn", "Near names: 'tokenizer.json'"),
        ("{}/tokenizer.json", "could not be read .JSONDecodeError"),
        ("{}/empty", "could not be read"),
        ("someone/no-such-tokenizer", "Without a network, pass a local path"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_what_is_wanted(source, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_tokenizer(source.format(tmp_path))


def test_a_document_ends_once_and_cannot_spell_the_end_itself(trained):
    texts = ["a<|endoftext|>b", "c"]
    ((split, ids, text_bytes),) = encode_documents(texts, trained, lambda text: "train")
    assert (split, text_bytes) == ("train", 16)
    assert [document.count(trained.eos_token_id) for document in ids] == [1, 1]
    assert trained.decode(ids[0][:-1]) == texts[0]
    assert trained("<|endoftext|>").input_ids == [trained.eos_token_id]  # as it was before


def test_documents_stay_in_order_and_keep_their_bytes_over_many_groups(trained, monkeypatch):
    monkeypatch.setattr("lightning_slm.data.tokenizer._GROUP", 500)
    groups = list(encode_documents(iter(TEXTS), trained, lambda text: "val" if "7" in text else "train"))
    decoded = {"val": [], "train": []}
    for split, documents, _ in groups:
        decoded[split] += [trained.decode(ids[:-1]) for ids in documents]
    assert decoded == {"val": [t for t in TEXTS if "7" in t], "train": [t for t in TEXTS if "7" not in t]}
    assert sum(group[2] for group in groups) == sum(len(text.encode()) for text in TEXTS)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(trained, tmp_path):
    check_vocabulary(trained, 300)
    with pytest.raises(ValueError, match="ids up to 299, but the model's vocab_size is 299"):
        check_vocabulary(trained, 299)
    definition = json.loads(trained.backend_tokenizer.to_str())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 5000, "content": "<|far|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    holed = load_tokenizer(str(tmp_path))
    if max(holed.get_vocab().values()) >= 5000:  # the highest id counts, not the number of tokens
        with pytest.raises(ValueError, match="ids up to 5000"):
            check_vocabulary(holed, len(holed))
