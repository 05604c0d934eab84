import random
from itertools import chain

import pytest

from lightning_slm.data.split import check_fractions, place_of, split_of

TEXTS = [f"document {number}" for number in range(4000)]


def test_a_document_never_moves_whatever_the_process_the_order_or_the_hash_seed():
    # The figure is part of the format: another one would move documents of every cache there is.
    assert place_of("def f(): ...") == pytest.approx(0.9800581428455679, abs=1e-12)


def test_splits_are_disjoint_complete_and_of_the_asked_size():
    found = {name: [text for text in TEXTS if split_of(text, 0.1, 0.2) == name] for name in ("train", "val", "test")}
    assert sorted(chain(*found.values())) == sorted(TEXTS)
    for name, fraction in {"val": 0.1, "test": 0.2, "train": 0.7}.items():
        assert len(found[name]) / len(TEXTS) == pytest.approx(fraction, abs=0.02)  # 3 sigma of 4000 draws


def test_a_larger_validation_split_takes_from_training_only():
    for text in TEXTS:
        small, large = split_of(text, 0.05, 0.1), split_of(text, 0.2, 0.1)
        assert small == large or (small, large) == ("train", "val")


def test_copies_of_a_document_land_together():
    copies = random.choices(TEXTS, k=100) * 2
    assert len({(text, split_of(text, 0.3, 0.3)) for text in copies}) == len(set(copies))


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.1), (1.0, 0.0)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(val, test):
    with pytest.raises(ValueError, match="below 1"):
        check_fractions(val, test)
