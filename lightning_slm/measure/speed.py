"""Latency and throughput of token-by-token decoding."""

# Shape letters: B = batch (1 here), T = tokens of the prompt.

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over the runs, in seconds."""

    first_token: float  # from the call to the first token: the prompt's forward pass and the first choice
    per_token: float  # of every later token

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate once the first token is there."""
        return 1 / self.per_token


def latency(stream: Callable[[], Iterable[object]], runs: int = 5, warmup: int = 1) -> Latency:
    """Time to the first token and per later token of anything that yields tokens.

    >>> model_latency = latency(lambda: iter([5, 7, 9]), runs=3)
    >>> model_latency.first_token < 1.0
    True

    Args:
        stream: starts one generation each time it is called, and yields a token as soon as it has it; at least two.
        runs: timed generations, of which the median is taken.
        warmup: generations before them that are not timed.

    Raises:
        ValueError: the stream ends before its second token.
    """
    for _ in range(warmup):
        _one_run(stream)
    timed = [_one_run(stream) for _ in range(runs)]
    return Latency(*(statistics.median(column) for column in zip(*timed)))


@torch.no_grad()
def greedy_stream(model: nn.Module, prompt_BT: Tensor, new_tokens: int) -> Iterator[int]:
    """The most probable continuation of one prompt, token by token, whatever the end-of-text token says.

    The plain loop over a Hugging Face style model: the cache that the model returns is given back to it; a model
    without one is run over the whole text again for every token.
    """
    cache, step_BT, text_BT = None, prompt_BT, prompt_BT
    for _ in range(new_tokens):
        output = model(input_ids=step_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token_BT = output.logits[:, -1:].argmax(-1)
        yield int(token_BT)
        text_BT = torch.cat([text_BT, token_BT], dim=1)
        step_BT = text_BT if cache is None else token_BT


def _one_run(stream: Callable[[], Iterable[object]]) -> tuple[float, float]:
    _wait_for_device()
    start = perf_counter()
    times = []
    for _ in stream():
        _wait_for_device()
        times.append(perf_counter() - start)
    if len(times) < 2:
        raise ValueError(f"the stream ended after {len(times)} tokens; latency per token needs at least two.")
    return times[0], (times[-1] - times[0]) / (len(times) - 1)


def _wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
