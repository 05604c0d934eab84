"""Latency of a stream that sleeps, peak memory of a function that allocates: orders of magnitude are certain."""

import time

import pytest
import torch
from support import ForeignLlama

from lightning_slm.measure import greedy_stream, latency, peak_memory

MB = 1_000_000


def allocate(megabytes: int) -> None:
    """What the fresh process runs; filled, for memory that is never touched is not resident."""
    torch.ones(megabytes * MB // 4)


def fail() -> None:
    raise ArithmeticError("went wrong in there")


def sleeping_stream():
    time.sleep(0.1)
    yield 1
    for _ in range(4):
        time.sleep(0.02)
        yield 2


def test_latency_tells_the_first_token_from_the_later_ones():
    timed = latency(sleeping_stream, runs=3, warmup=0)
    # A loaded machine sleeps longer, never shorter.
    assert 0.1 <= timed.first_token < 0.5
    assert 0.02 <= timed.per_token < 0.09
    assert timed.tokens_per_second == pytest.approx(1 / timed.per_token)


def test_latency_is_a_median_after_warm_up():
    delays = iter([1.0, 0.0, 0.3, 0.0])

    def stream():
        time.sleep(next(delays))
        yield from (1, 2)

    assert latency(stream, runs=3, warmup=1).first_token < 0.2


def test_a_stream_of_one_token_has_no_latency_per_token():
    with pytest.raises(ValueError, match="at least two"):
        latency(lambda: [1], warmup=0)


def test_the_greedy_stream_is_greedy_generation_of_hugging_face():
    net = ForeignLlama().net.eval()
    prompt_BT = torch.randint(64, (1, 5))
    expected = net.generate(prompt_BT, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0)[0, 5:]
    assert list(greedy_stream(net, prompt_BT, 7)) == expected.tolist()


@pytest.mark.slow
def test_peak_memory_sees_two_hundred_megabytes_and_not_what_this_process_had():
    ballast = torch.ones(100 * MB)  # 400 MB of ours
    memory = peak_memory(allocate, 200)
    del ballast
    assert 195 * MB < memory.bytes < 230 * MB
    assert memory.peak == memory.baseline + memory.bytes


@pytest.mark.slow
def test_a_failure_in_the_fresh_process_is_told_here():
    with pytest.raises(RuntimeError, match="went wrong in there"):
        peak_memory(fail)


def test_a_function_that_cannot_be_imported_is_refused():
    with pytest.raises(ValueError, match="top of a module"):
        peak_memory(lambda: None)
