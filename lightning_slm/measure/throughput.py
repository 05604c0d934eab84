"""A stop-watch for training loops: the tokens of the last steps, and how long they took."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Step:
    """One optimizer step: tokens by the length of their sequences, and the stretches of time that it took."""

    tokens: Counter[int] = field(default_factory=Counter)  # values are numbers, or tensors () on the device
    spans: list[list[Any]] = field(default_factory=list)


class Throughput:
    """What was trained on in the last steps, and how long that took, waiting for data included.

    On CUDA time is taken by events in the stream, so that nothing waits for the device but ``seconds()``; elsewhere by
    the clock.

    >>> watch = Throughput(window=2, warmup=1)
    >>> for step in range(4):
    ...     watch.start()
    ...     watch.end_batch(tokens=8 * 512, length=512)
    ...     watch.end_step()
    >>> watch.tokens(), watch.seconds() < 1
    (Counter({512: 8192}), True)

    Args:
        device: where the work is done.
        window: steps to remember.
        warmup: first steps to forget.
    """

    def __init__(self, device: torch.device | str = "cpu", window: int = 20, warmup: int = 3) -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self.steps, self._now, self._warmup = deque[Step](maxlen=window), Step(), warmup
        self._since: Any = None

    def start(self) -> None:
        """The first batch begins; later calls do nothing."""
        if self._since is None:
            self.resume()

    def resume(self) -> None:
        """Whatever went on since the last batch ended, it was no training."""
        self._since = self._mark()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What goes on inside is no training; what went on before is."""
        if self._since is None:
            yield
            return
        self._pass()
        yield
        self.resume()

    def end_batch(self, tokens: int | Tensor, length: int) -> None:
        """A micro-batch is done: so many tokens, in sequences of ``length``."""
        self._pass()
        self._now.tokens[length] += tokens  # type: ignore[assignment]

    def end_step(self) -> None:
        """The optimizer has stepped."""
        if self._warmup:
            self._warmup -= 1
        else:
            self.steps.append(self._now)
        self._now = Step()

    def tokens(self) -> Counter[int]:
        """Of the steps remembered, by length of sequence. Fetches what was counted on the device."""
        total: Counter[int] = Counter()
        for step in self.steps:
            for length, tokens in step.tokens.items():
                total[length] += int(tokens)
        return total

    def seconds(self) -> float:
        """Of the steps remembered. Waits for the device."""
        spans = [span for step in self.steps for span in step.spans]
        if not self._on_cuda:
            return sum(end - start for start, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _mark(self) -> Any:
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _pass(self) -> None:
        """The time since the last mark belongs to this step."""
        now, spans = self._mark(), self._now.spans
        if spans and spans[-1][1] is self._since:
            spans[-1][1] = now  # one stretch goes on
        else:
            spans.append([self._since, now])
        self._since = now
