"""The tokenizer: read from a file, a folder or a name, or a byte-level BPE trained on the training split.

`tokenizers`' trainer gives the same merges for the same text on every run, so that a trained tokenizer is part of the
key of the token cache like any other.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_slm.data.readers import END_OF_TEXT
from lightning_slm.errors import near

_GROUP = 1 << 22  # characters encoded at once: all cores stay busy, and a group's encodings stay below some 500 MB
# The two spellings of GPT-2's vocabulary and merges; Hugging Face reads the second only where a config names its class.
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))

_MASKS = ("<mask>", "[MASK]", "<|mask|>")


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a tokenizer.json, BERT's vocab.txt, GPT-2's pair of files, a folder that `AutoTokenizer` reads,
    a checkpoint of ours, or a hub name.

    Raises:
        ValueError: there is none, or none that encodes batches on all cores (a "fast" tokenizer).
    """
    place = Path(source).expanduser()
    try:
        tokenizer = _from_disk(place) if place.exists() else AutoTokenizer.from_pretrained(source)
    except Exception as error:  # each format, and the hub, has error types of its own
        siblings = [file.name for file in place.parent.glob("*")] if place.parent.is_dir() else []
        hint = "" if place.exists() else f" {near(place.name, siblings)} Without a network, pass a local path."
        raise ValueError(
            f"tokenizer={source!r} could not be read ({type(error).__name__}: {error}). Wanted: a tokenizer.json, a "
            f"vocab.txt of BERT's, a folder with one, or with GPT-2's two files, or that AutoTokenizer reads, a "
            f"checkpoint of ours, or a name of the hub.{hint}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer={source!r} is a {type(tokenizer).__name__}, which encodes one text at a time in Python; "
            f"convert it to a tokenizer.json."
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: GPT-2): no text is unknown.

    Args:
        vocab_size: its size at most, the 256 bytes and the end-of-text token included; a small text gives fewer.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is below 257: the 256 bytes and the end-of-text token.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stdout.isatty(),  # elsewhere it prints empty lines
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_end_of_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False))


def trained_tokenizer(file: Path, train: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer kept in ``file``; trained, and kept there for the next time, where it is absent or damaged."""
    try:
        return _with_end_of_text(_from_json(file))
    except Exception:  # `tokenizers` raises bare Exception for a file that is absent or damaged
        tokenizer = train()
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".writing")
    tokenizer.backend_tokenizer.save(str(written))
    written.replace(file)
    return tokenizer


def encode_documents(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, split_of: Callable[[str], str]
) -> Iterator[tuple[str, list[list[int]], int]]:
    """Documents encoded on all cores, in groups of one split: its name, their ids, their length in UTF-8 bytes.

    Each ends with the end-of-document id. Text that spells a special token is encoded as the text it is.
    """
    end = end_of_document(tokenizer)
    closing = [] if end is None else [end]
    backend = tokenizer.backend_tokenizer
    for texts in _grouped(documents):
        with _special_tokens_as_text(backend):
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        groups: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            groups.setdefault(split_of(text), []).append(index)
        for split, members in groups.items():
            ids = [encodings[index].ids + closing for index in members]
            yield split, ids, sum(len(texts[index].encode()) for index in members)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that encode every text alike."""
    definition = f"{tokenizer.backend_tokenizer.to_str()}{end_of_document(tokenizer)}"
    return blake2b(definition.encode(), digest_size=16).hexdigest()


def end_of_document(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that closes a document: end of sentence, else a separator ([SEP]); None if there is neither."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def vocabulary_needed(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: one more than the highest id, which may exceed the number of tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, model_vocab_size: int) -> None:
    """Refuse a tokenizer whose ids reach beyond the model's embedding.

    Raises:
        ValueError: it has more ids than the model has rows.
    """
    needed = vocabulary_needed(tokenizer)
    if needed > model_vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {needed - 1}, but the model's vocab_size is {model_vocab_size}: give the "
            f"model vocab_size={needed} or more, or the data a smaller tokenizer."
        )


def _grouped(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document)
        if characters >= _GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


@contextmanager
def _special_tokens_as_text(backend: Tokenizer) -> Iterator[None]:
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield
    finally:
        backend.encode_special_tokens = before


def _from_disk(place: Path) -> PreTrainedTokenizerBase:
    if place.is_file():
        return _FROM_FILE.get(place.suffix, _from_json)(place)
    if not _described(place):
        if (place / "vocab.txt").is_file():
            return _from_vocabulary(place / "vocab.txt")
        for vocabulary, merges in _GPT2_FILES:
            if (place / vocabulary).is_file() and (place / merges).is_file():
                return GPT2Tokenizer(vocab=str(place / vocabulary), merges=str(place / merges))
        if (place / "tokenizer.json").is_file():
            return _from_json(place / "tokenizer.json")
    return AutoTokenizer.from_pretrained(place)


def _described(folder: Path) -> bool:
    """Whether Hugging Face's files say which class the tokenizer has."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))


def _from_json(file: Path) -> PreTrainedTokenizerFast:
    json.loads(file.read_text())  # a readable reason, where `tokenizers` has none
    return PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)


def _from_vocabulary(file: Path) -> PreTrainedTokenizerFast:
    """BERT's WordPiece; in lower case, if the vocabulary is: it knows no other word with a capital letter then."""
    words = [word for word in file.read_text(encoding="utf-8").split("\n") if word]
    cased = any(word != word.lower() and not word.startswith("[") for word in words)
    vocabulary = {word: number for number, word in enumerate(words)}
    if "[UNK]" not in vocabulary:
        raise ValueError("it has no [UNK], so it is not a vocabulary of BERT's")
    return BertTokenizer(vocab=vocabulary, do_lower_case=not cased)


def _from_checkpoint(file: Path) -> PreTrainedTokenizerFast:
    from lightning_slm.modules.stored import (
        tokenizer_in,
    )  # modules stand on the same floor, and know TextData's batches

    tokenizer = tokenizer_in(file)
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer in it")
    return tokenizer


_FROM_FILE: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    ".ckpt": _from_checkpoint,
    ".txt": _from_vocabulary,
}


def with_mask_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which then has a mask token: its own, or what its vocabulary calls so, or a new one at the end.

    Text that spells it is encoded as the text it is, as with all special tokens.
    """
    if tokenizer.mask_token_id is None:
        known = tokenizer.get_vocab()
        name = next((name for name in _MASKS if name in known), _MASKS[0])
        tokenizer.add_special_tokens({"mask_token": name})
    return tokenizer


def _with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
    return tokenizer
