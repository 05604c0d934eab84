"""The stop-watch, by a clock that only the test moves."""

import pytest
import torch

from lightning_slm.measure import throughput
from lightning_slm.measure.throughput import Throughput


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(throughput, "perf_counter", made)
    return made


def test_a_loop_of_one_s_own(clock):
    watch = Throughput(window=2, warmup=1)
    for step in range(4):
        watch.start()
        for _ in range(2):  # micro-batches
            clock.work(1 + step)
            watch.end_batch(tokens=10, length=5)
        watch.end_step()
    assert watch.tokens() == {5: 40}
    assert watch.seconds() == 2 * 3 + 2 * 4
    assert all(len(step.spans) == 1 for step in watch.steps)  # no more marks than needed are kept


def test_before_the_first_step_there_is_nothing(clock):
    watch = Throughput(warmup=0)
    with watch.paused():
        clock.work(5)
    assert (watch.seconds(), watch.tokens()) == (0, {})


def test_on_cuda_events_mark_the_time_and_only_reading_waits(monkeypatch):
    waits, now = [], Clock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now()

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, other):
            return 1000 * (other.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Throughput("cuda:0", window=2, warmup=1)
    for step in range(4):
        watch.start()
        now.work(1)
        with watch.paused():
            now.work(100)
        now.work(step)
        watch.end_batch(torch.tensor(8), 4)
        watch.end_step()
        now.work(1000)
        watch.resume()
    assert waits == []
    assert watch.seconds() == (1 + 2) + (1 + 3)
    assert watch.tokens() == {4: 16}
    assert len(waits) == 1
