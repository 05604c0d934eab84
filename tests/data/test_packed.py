import pickle
from collections import Counter

import numpy as np
import pytest

from lightning_slm.data.cache import build_cache
from lightning_slm.data.packed import PackedWindows

DOCUMENTS = [[11, 12, 13], [21], [31, 32, 33, 34, 35], [41, 42]]


@pytest.fixture
def cache(tmp_path):
    return build_cache(tmp_path / "cache", [("train", DOCUMENTS, 1)], vocab_size=100, skipped=Counter())


def test_windows_are_consecutive_and_never_padded(cache):
    windows = PackedWindows(cache, "train", 4)
    assert len(windows) == 2  # of 11 ids, 3 are left over
    batch = windows[[1, 0]]
    assert batch["input_ids"].tolist() == [[31, 32, 33, 34], [11, 12, 13, 21]]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert set(batch) == {"input_ids", "labels"}


def test_with_document_mask_positions_restart_and_a_documents_first_token_is_no_label(cache):
    batch = PackedWindows(cache, "train", 5, document_mask=True)[[0, 1]]
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 31], [32, 33, 34, 35, 41]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100, -100], [32, 33, 34, 35, -100]]


@pytest.mark.parametrize("window", [2, 3, 7])
def test_document_mask_agrees_with_a_loop_over_tokens(window, tmp_path):
    lengths = np.random.default_rng(0).integers(1, 9, 40)
    cache = build_cache(tmp_path / "c", [("train", [[1] * n for n in lengths], 1)], vocab_size=2, skipped=Counter())
    first = {int(start) for start in np.cumsum(lengths) - lengths}
    windows = PackedWindows(cache, "train", window, document_mask=True)
    batch = windows[list(range(len(windows)))]
    token = 0
    for positions, labels in zip(batch["position_ids"].tolist(), batch["labels"].tolist()):
        position = 0
        for column in range(window):
            position = 0 if column == 0 or token in first else position + 1
            assert positions[column] == position
            assert labels[column] == (-100 if token in first else 1)
            token += 1


def test_a_dataset_travels_to_a_worker_without_its_ids(tmp_path):
    documents = [[1] * 100_000]
    cache = build_cache(tmp_path / "cache", [("train", documents, 1)], vocab_size=100, skipped=Counter())
    windows = PackedWindows(cache, "train", 4)
    sent = pickle.dumps(windows)
    assert len(sent) < 2_000
    assert pickle.loads(sent)[[0]]["input_ids"].tolist() == windows[[0]]["input_ids"].tolist()
