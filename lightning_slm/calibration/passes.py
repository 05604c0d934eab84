"""Forward passes that wait: at each block, until it is their turn.

To compress block after block, every calibration batch must stand at the entrance of the same block while that block is
looked at. What stands there is not a copy of the block's arguments but the model's own forward pass, halted: so
residual streams outside of the blocks, masks that differ from block to block, and what one block lends to another are
as the model has them. A halted pass is a thread that waits for an answer, and holds what a forward pass holds between
two blocks. The blocks themselves run in the thread that asks for the next step.
"""

import contextvars
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_in_thread = threading.local()  # .current: the ForwardPass whose thread this is


class _Dropped(BaseException):
    """Ends a pass that is not needed any more; no ``except Exception`` of a model holds it up."""


@dataclass(frozen=True)
class Call:
    """A block that a halted pass has come to, and what it is called with."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: "Autocast"  # of the pass, here

    def run(self, function: Callable[..., Any], *, again: bool = False) -> Any:
        """What ``function`` (the block's forward) makes of the arguments.

        Args:
            again: it will be run once more, so its inputs are copied: some blocks add to them in place.
        """
        args, kwargs = _copied(self.args, self.kwargs) if again else (self.args, self.kwargs)
        with self.autocast.entered():
            return function(*args, **kwargs)


class Autocast(NamedTuple):
    """Whether a thread computes under autocast, and in which dtype."""

    device: str
    on: bool
    dtype: torch.dtype

    @classmethod
    def of_this_thread(cls, device: str) -> "Autocast":
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def entered(self) -> Any:
        """The same for a block. Nothing is cached: a weight that was cast before it was compressed is out of date."""
        return torch.autocast(self.device, self.dtype, enabled=self.on, cache_enabled=False)


class ForwardPass:
    """One forward pass, from block to block, in the modes of the thread that makes it (autocast, default device).

    Args:
        run: the pass; it is started by the first `advance`.
        device: where the model is, "cpu" or "cuda"; its autocast is seen to.
    """

    def __init__(self, run: Callable[[], Any], device: str) -> None:
        self._run, self._device = run, device
        self._modes: list[AbstractContextManager[Any]] = [Autocast.of_this_thread(device).entered()]
        if device == "cuda":
            self._modes.append(torch.cuda.device(torch.cuda.current_device()))
        self._default_device = torch.get_default_device()
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = functools.partial(contextvars.copy_context().run, self._work)
        self._thread = threading.Thread(target=work, name="calibration", daemon=True)

    def advance(self, output: Any = None) -> Call | None:
        """Go on with what the block returned, to the next block; None: the pass is at its end."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(output)
        del output
        question = self._questions.get()
        if isinstance(question, BaseException):
            raise question
        return question

    def drop(self) -> None:
        """Leave the rest of the pass out; its thread is gone afterwards."""
        if self._thread.is_alive():
            self._answers.put(_Dropped())
            self._thread.join()

    def ask(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the thread of the pass: let others run the block, and wait for the output."""
        self._questions.put(Call(block, args, kwargs, Autocast.of_this_thread(self._device)))
        del args, kwargs  # a pass that waits holds its activations once
        answer = self._answers.get()
        if isinstance(answer, _Dropped):
            raise answer
        return answer

    def _work(self) -> None:
        _in_thread.current = self
        try:
            with torch.no_grad(), ExitStack() as modes:  # each thread has modes of its own
                for mode in self._modes:
                    modes.enter_context(mode)
                if torch.get_default_device() != self._default_device:
                    modes.enter_context(self._default_device)
                self._run()
            self._questions.put(None)
        except _Dropped:
            pass
        except BaseException as error:
            self._questions.put(error)


class Lockstep:
    """Passes that stand before the same block, and go on to the next one together.

    Args:
        passes: not started yet; they are dropped when the ``with`` block of this is left.
        around: sharded modules (FSDP2) that the passes are within. The first pass to leave one lets its gathered
            weights go; they are gathered again for the next one.

    Attributes:
        calls: where each pass stands; None: at its end.
    """

    def __init__(self, passes: Sequence[ForwardPass], around: Sequence[FSDPModule] = ()) -> None:
        self.passes, self.around = list(passes), around
        self.calls: list[Call | None] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.calls.clear()
        for each in self.passes:
            each.drop()

    def start(self) -> None:
        """Bring all passes to the first block."""
        self.calls.extend(each.advance() for each in self.passes)

    def advance(self, function: Callable[..., Any]) -> None:
        """Answer all calls with what ``function`` (the block's forward) makes of them."""
        for i, each in enumerate(self.passes):
            call, self.calls[i] = self.calls[i], None
            assert call is not None
            for module in self.around:
                module.unshard()
            self.calls[i] = each.advance(call.run(function))

    @property
    def block(self) -> str:
        """The block that all stand before.

        Raises:
            ValueError: they do not.
        """
        first, *others = places = [None if call is None else call.block for call in self.calls]
        for i, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"calibration batches take different ways through the model: batch 0 comes to {_place(first)} when "
                    f"batch {i} comes to {_place(other)}, so that it cannot be compressed block after block; give "
                    "batches of one kind."
                )
        assert first is not None, places
        return first


def _place(block: str | None) -> str:
    return "its end" if block is None else repr(block)


@contextmanager
def halting_at(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Inside, a `ForwardPass` halts wherever one of the blocks is called; elsewhere they run as ever.

    Yields: the blocks' own forward functions, by name.
    """
    own = {name: block.forward for name, block in blocks.items()}
    was_on_instance = {name: "forward" in vars(block) for name, block in blocks.items()}
    for name, block in blocks.items():
        block.forward = functools.wraps(own[name])(functools.partial(_ask_or_run, name, own[name]))  # type: ignore[method-assign]
    try:
        yield own
    finally:
        for name, block in blocks.items():
            if was_on_instance[name]:
                block.forward = own[name]  # type: ignore[method-assign]
            else:
                del block.forward


def _ask_or_run(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    current: ForwardPass | None = getattr(_in_thread, "current", None)
    return own(*args, **kwargs) if current is None else current.ask(name, args, kwargs)


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the activations; what is given twice (as query and key) stays one tensor."""
    given = [*args, *kwargs.values()]
    copies = {id(x): x.clone() for x in given if isinstance(x, Tensor) and x.is_floating_point()}
    return tuple(copies.get(id(x), x) for x in args), {name: copies.get(id(x), x) for name, x in kwargs.items()}
