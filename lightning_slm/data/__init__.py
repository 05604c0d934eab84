"""Text in, batches out: `TextData`, `DomainData`, `ClassificationData` and the pieces they are made of."""

from lightning_slm.data.classification_data import ClassificationData
from lightning_slm.data.domains import DomainData, exponential_ascent
from lightning_slm.data.split import split_of
from lightning_slm.data.text_data import TextData
from lightning_slm.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "ClassificationData", "DomainData", "TextData", "check_vocabulary", "exponential_ascent", "load_tokenizer",
    "split_of", "train_tokenizer",
]  # fmt: skip
