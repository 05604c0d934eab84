"""Text in, batches out: `TextData` and the pieces it is made of."""

from lightning_slm.data.split import split_of
from lightning_slm.data.text_data import TextData
from lightning_slm.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

__all__ = ["TextData", "check_vocabulary", "load_tokenizer", "split_of", "train_tokenizer"]
