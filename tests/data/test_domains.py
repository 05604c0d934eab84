"""`DomainData`: several domains in shares that may change, and a run that resumes in the very same order."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from lightning_slm.data import DomainData, TextData, exponential_ascent
from lightning_slm.data.domains import DomainOrder

SIZES = [40, 25, 7]


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """Two domains whose words are not each other's."""
    made, chosen = {}, random.Random(5)
    for name, words in (("code", ["def", "return", "self"]), ("prose", ["the", "of", "whale", "sea"])):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(40):
            text = " ".join(chosen.choices(words, k=200))
            (folder / f"{number:02}.txt").write_text(f"{number} {text}\n")
        made[name] = str(folder)
    return made


def data(folders, tmp_path, **kwargs):
    sizes = {"vocab_size": 300, "window": 16, "batch_size": 4, "val_fraction": 0.2}
    return DomainData(folders, **{**sizes, "cache_dir": str(tmp_path / "cache"), **kwargs})


def order(shares=(0.5, 0.25, 0.25), updates=(), **kwargs):
    settings = {"batch_size": 2, "rank": 0, "ranks": 1, "seed": 0, **kwargs}
    return DomainOrder(SIZES, list(shares), list(updates), **settings)


def domain_of(window):
    return next(k for k, end in enumerate(itertools.accumulate(SIZES)) if window < end)


def test_shares_ascend_exponentially_in_the_excess_of_the_loss():
    """Algorithm 1 of Xia et al. 2024, in plain floats; a domain below its reference grows by no factor."""
    shares, losses = {"a": 0.2, "b": 0.5, "c": 0.3}, {"a": 3.0, "b": 2.0, "c": 1.0}
    reference = {"a": 2.5, "b": 1.9, "c": 1.4}
    grown = [0.2 * math.exp(0.5), 0.5 * math.exp(0.1), 0.3]
    new = exponential_ascent(shares, losses, reference)
    assert list(new.values()) == pytest.approx([w / sum(grown) for w in grown], abs=1e-12)
    assert exponential_ascent(shares, reference, reference) == pytest.approx(shares)


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.8, 0.15, 0.05), (0.1, 0.1, 0.8)])
def test_at_every_moment_each_domain_has_its_share_of_the_windows_but_for_one(shares):
    windows = list(itertools.islice(order(shares).sequence(), 200))
    for n in range(1, 201):
        counts = Counter(map(domain_of, windows[:n]))
        assert all(abs(counts[k] - n * share) < 1 for k, share in enumerate(shares))


def test_a_domain_comes_again_only_when_all_of_it_has_come_and_then_in_another_order():
    windows = [w for w in itertools.islice(order((0.4, 0.2, 0.4)).sequence(), 90) if domain_of(w) == 2]
    turns = [windows[start : start + 7] for start in range(0, len(windows) - 6, 7)]
    assert len(turns) > 3
    assert all(sorted(turn) == list(range(65, 72)) for turn in turns)
    assert turns[0] != turns[1]


def test_ranks_share_one_sequence_and_epochs_have_different_ones():
    alone = [window for batch in order(batch_size=4) for window in batch]
    pairs = zip(order(rank=0, ranks=2), order(rank=1, ranks=2))
    assert [window for first, second in pairs for window in first + second] == alone
    later = order(batch_size=4)
    later.set_epoch(1)
    assert [window for batch in later for window in batch] != alone
    assert len(order()) == len(list(order())) == 36


def test_new_shares_hold_for_what_has_not_been_asked_for_and_a_resumed_order_is_the_same():
    first = order((0.5, 0.5, 0.0))
    seen = []
    for batch in first:
        seen.append(batch)
        if len(seen) == 10:
            first.updates.append({"epoch": 0, "windows": first.drawn, "shares": [0.0, 0.0, 1.0]})
    kinds = [domain_of(w) for batch in seen for w in batch]
    assert set(kinds[:20]) == {0, 1}
    assert kinds[20:].count(2) >= len(kinds[20:]) - 1  # what was lacking before may come first
    resumed = order((0.5, 0.5, 0.0), first.updates)
    resumed.seen = 14
    assert list(resumed) == seen[7:]
    resumed.set_epoch(1)
    assert {domain_of(w) for batch in resumed for w in batch} == {2}


def test_one_tokenizer_serves_all_domains_and_batches_come_in_shares(folders, tmp_path):
    text = data(folders, tmp_path, shares={"code": 3, "prose": 1})
    assert text.shares == {"code": 0.75, "prose": 0.25}
    text.setup("fit")
    loader = text.train_dataloader()
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (4, 16)
    words = [text.tokenizer.decode(row) for row in batch["input_ids"]]
    assert sum("se" in row and "def" in row for row in words) == 3
    assert sum("whale" in row for row in words) == 1
    assert sum(len(b["input_ids"]) for b in text.val_dataloader()) == sum(
        len(b["input_ids"]) for name in folders for b in text.domain_loader(name)
    )
    ids = next(iter(text.domain_loader("prose")))["input_ids"]
    assert "whale" in text.tokenizer.decode(ids[0])
    assert 1 < text.bytes_per_token("val") < 8


def test_by_default_shares_go_by_size_and_one_domain_is_text_data(folders, tmp_path):
    text = data({"code": folders["code"]}, tmp_path)
    plain = TextData(folders["code"], vocab_size=300, window=16, batch_size=4, val_fraction=0.2)
    plain.cache_dir = text.cache_dir
    assert text.shares == {"code": 1.0}
    assert text.bytes_per_token("train") == plain.bytes_per_token("train")
    rows = [{tuple(row.tolist()) for b in t.val_dataloader() for row in b["input_ids"]} for t in (text, plain)]
    assert rows[0] == rows[1]
    both = data(folders, tmp_path)
    sizes = {name: len(windows) for name, windows in both._by_domain("train").items()}
    assert both.shares == pytest.approx({name: n / sum(sizes.values()) for name, n in sizes.items()})


def test_what_is_missing_is_named(folders, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("a few words")
    with pytest.raises(ValueError, match=r"shares=.* must have a number above 0 for each of code, prose"):
        data(folders, tmp_path, shares={"code": 1.0})
    with pytest.raises(ValueError, match="names nothing"):
        data({}, tmp_path)
    text = data({**folders, "short": str(tmp_path / "short")}, tmp_path)
    with pytest.raises(ValueError, match=r"The domain 'short' has 0 x window=16 tokens in its train split"):
        text.setup("fit")
    with pytest.raises(ValueError, match=r"one step takes 9999"):
        data(folders, tmp_path, batch_size=9999).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_after_changes_of_the_shares_with_the_very_next_batch(folders, tmp_path, workers):
    text = data(folders, tmp_path, num_workers=workers)
    loader, seen = text.train_dataloader(), []
    for batch in loader:
        seen.append(batch["input_ids"])
        if len(seen) == 4:
            text.update_shares({"code": 0.1, "prose": 0.9}, step=4)
        if len(seen) == 9:
            state, shares = loader.state_dict(), text.state_dict()
        if len(seen) == 20:
            break
    again = data(folders, tmp_path, num_workers=workers)
    again.load_state_dict(shares)
    resumed = again.train_dataloader()
    resumed.load_state_dict(state)
    assert again.shares == {"code": 0.1, "prose": 0.9}
    for batch, wanted in zip(resumed, seen[9:]):
        assert torch.equal(batch["input_ids"], wanted)
