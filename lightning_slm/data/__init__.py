"""Text in, batches out: `TextData`, `ClassificationData` and the pieces they are made of."""

from lightning_slm.data.classification_data import ClassificationData
from lightning_slm.data.split import split_of
from lightning_slm.data.text_data import TextData
from lightning_slm.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

__all__ = ["ClassificationData", "TextData", "check_vocabulary", "load_tokenizer", "split_of", "train_tokenizer"]
