"""Train, validation and test by a hash of each document's content.

A document's place is a number in [0, 1) that only its text decides: a copy of it lands in the same split (nothing
leaks), and neither other documents, nor their order, nor a seed, nor time moves it. Validation takes the low end and
test the high end, so that changing one fraction never moves a document into or out of the other.
"""

from hashlib import blake2b

SPLITS = ("train", "val", "test")


def place_of(text: str) -> float:
    """Where a text stands in [0, 1).

    >>> place_of("def f(): ...") == place_of("def f(): ...") != place_of("def g(): ...")
    True
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """``"train"``, ``"val"`` or ``"test"``; the fractions are of documents, and of text only on average.

    >>> split_of("anything", val_fraction=1.0, test_fraction=0.0)
    'val'
    """
    place = place_of(text)
    if place < val_fraction:
        return "val"
    return "test" if place >= 1 - test_fraction else "train"


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse fractions that leave nothing to train on."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} must not be negative and must leave "
            f"something to train on: their sum must be below 1."
        )
