"""Reversible residuals (Gomez et al. 2017, https://arxiv.org/abs/1707.04585), as in Reformer (Kitaev et al. 2020,
https://arxiv.org/abs/2001.04451): training keeps the activations of no block.

There are two residual streams, and each mixer adds to one of them what it makes of the other:

    x1 = x1 + token_mixer(norm(x2))
    x2 = x2 + channel_mixer(norm(x1))

so that what was before follows from what came out, by subtracting again. The backward pass computes it, from the last
block to the first, with one more run of each mixer, as activation checkpointing does; but where that keeps the input of
every block, this keeps the last outputs only.
"""

# Shape letters: B = batch, T = tokens, D = model width.

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_slm.nn.mixer import Context


@dataclass(eq=False)
class Half:
    """A mixer behind its norm, at one place of the stack.

    Args:
        layer_idx: the virtual layer.
    """

    norm: nn.Module
    mixer: nn.Module
    layer_idx: int

    def __call__(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.mixer(self.norm(x_BTD), context, self.layer_idx)

    def learned(self) -> list[nn.Parameter]:
        """The parameters that want gradients, each once."""
        both = [p for part in (self.norm, self.mixer) for p in part.parameters() if p.requires_grad]
        return list(dict.fromkeys(both))


def halves(blocks: Iterable[Any], shared: Any, repeat: int) -> list[Half]:
    """The mixers of a stack in the order in which they run.

    Raises:
        ValueError: a block has hooks or is compiled: as its parts are run one by one, that would be without effect.
    """
    stack: list[Half] = []
    layer_idx = 0
    for block in blocks:
        if block._forward_hooks or block._forward_pre_hooks or block._compiled_call_impl is not None:
            raise ValueError(
                "reversible=True runs the mixers of a block, never the block itself: it cannot be compiled, sharded or "
                "watched by hooks. Do that with its token_mixer and channel_mixer, or set reversible=False."
            )
        for _ in range(repeat):
            stack += [Half(norm, mixer, layer_idx) for norm, mixer in block.halves(shared)]
            layer_idx += 1
    return stack


def run_reversible(stack: list[Half], x_BTD: Tensor, context: Context) -> Tensor:
    """From the first block's input to the mean of both streams, which are equal at the beginning.

    Without a cache, and where gradients are wanted, nothing but the two streams' ends is kept for them.
    """
    if not torch.is_grad_enabled() or context.cache is not None:
        return naive_reversible(stack, x_BTD, context)
    context.shared["reversible"] = True
    tape = _Tape()
    a_BTD = b_BTD = x_BTD  # the one that is added to next, and the one that is read
    for i, half in enumerate(stack):
        learned = half.learned()
        if any(p._backward_hooks for p in learned):
            raise ValueError("reversible=True would run hooks on parameters' gradients twice; remove them.")
        step = _Step(half, context, tape, is_last=i == len(stack) - 1)
        new_BTD, *losses = _Added.apply(step, a_BTD, b_BTD, *learned)
        context.losses.extend(losses)
        a_BTD, b_BTD = b_BTD, new_BTD
    return (a_BTD + b_BTD) / 2


def naive_reversible(stack: list[Half], x_BTD: Tensor, context: Context) -> Tensor:
    """The twin of `run_reversible`: the same equations, and everything is kept."""
    a_BTD = b_BTD = x_BTD
    for half in stack:
        a_BTD, b_BTD = b_BTD, a_BTD + half(b_BTD, context)
    return (a_BTD + b_BTD) / 2


@dataclass(eq=False)
class _Tape:
    """In the backward pass: the streams as they were after the step whose turn it is."""

    streams: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class _Step:
    """One mixer in one forward pass, and what it takes to run it again."""

    half: Half
    context: Context
    tape: _Tape
    is_last: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random: list[Tensor] = field(default_factory=list)  # states of the generators: the CPU's, the device's
    autocast: list[tuple[str, bool, torch.dtype]] = field(default_factory=list)

    def run(self, x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What is added to the other stream, and the losses that the mixer leaves."""
        before, self.context.losses = self.context.losses, []
        try:
            added_BTD = self.half(x_BTD, self.context)
            return added_BTD, self.context.losses
        finally:
            self.context.losses = before

    def remember(self, device: torch.device) -> None:
        """Everything besides the inputs that the mixer's output depends on."""
        self.device, self.random = device, [torch.get_rng_state()]
        if device.type != "cpu":
            self.random.append(torch.get_device_module(device).get_rng_state(device))
        kinds = {device.type, "cpu"}
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same generators and precision as in the forward pass, for as long as it takes."""
        elsewhere = self.device.type != "cpu"
        kind = self.device.type if elsewhere else "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([self.device] if elsewhere else [], device_type=kind))
            torch.set_rng_state(self.random[0])
            if elsewhere:
                torch.get_device_module(self.device).set_rng_state(self.random[1], self.device)
            self.enter_autocast(stack)
            yield

    def enter_autocast(self, stack: contextlib.ExitStack) -> None:
        """Without its cache: weights that were cast without gradients must not serve where these are wanted."""
        for kind, enabled, dtype in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))


class _Added(torch.autograd.Function):
    """new = a + f(b). The last step keeps ``b`` and ``new``; each passes to the one before what that had."""

    @staticmethod
    def forward(ctx: Any, step: _Step, a_BTD: Tensor, b_BTD: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        step.remember(b_BTD.device)
        with contextlib.ExitStack() as stack:
            step.enter_autocast(stack)
            added_BTD, losses = step.run(b_BTD)
        new_BTD = a_BTD + added_BTD
        ctx.step, ctx.learned = step, learned
        if step.is_last:
            ctx.save_for_backward(b_BTD, new_BTD)
        return new_BTD, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor, *grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        if step.is_last:
            step.tape.streams = ctx.saved_tensors
        assert step.tape.streams is not None
        b_BTD, new_BTD = step.tape.streams
        with step.again(), torch.enable_grad():
            b_BTD = b_BTD.detach().requires_grad_()
            added_BTD, losses = step.run(b_BTD)
            _refuse_gradients_between_layers(step.context)
            pairs = [(y, g) for y, g in zip((added_BTD, *losses), (grad_BTD, *grad_losses)) if y.requires_grad]
            outputs, pulls = [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs]
        grads = torch.autograd.grad(outputs, (b_BTD, *ctx.learned), pulls, allow_unused=True)
        step.tape.streams = (new_BTD - added_BTD).detach(), b_BTD.detach()
        return None, grad_BTD, *grads


def _refuse_gradients_between_layers(context: Context) -> None:
    for name, value in context.shared.items():
        if any(t.requires_grad for t in _tensors(value)):
            raise ValueError(
                f"reversible=True keeps no graph between layers, but one leaves {name!r} for later ones to learn "
                "through; set reversible=False."
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
