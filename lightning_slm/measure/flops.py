"""Arithmetic of a token's forward and backward pass, by formula from the shapes of the layers: no model is run."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from lightning_slm.measure.layer_flops import active_experts, attention, recurrence, weight_flops


def flops_per_token(model: nn.Module, context: int) -> int:
    """Floating-point operations of the forward pass of one token that attends to ``context`` tokens, itself included.

    A multiply-add is two. The sum of

    - ``2 x inputs x outputs`` of every weight matrix, each time it is applied: a block that a configuration shares or
      repeats counts at every use, an embedding look-up not at all, the output head once, of experts those that a token
      is sent to;
    - ``4 x heads x head_dim x min(context, window)`` of every attention layer: queries times keys, and probabilities
      times values. Grouped queries save memory here and no arithmetic; only sliding layers have a window;
    - 4 to 9 for each element of a recurrent state: see ``lightning_slm.measure.layer_flops.recurrence``.

    Norms, activations, rotations and the softmax are left out, as ``torch.utils.flop_counter`` leaves them out. A layer
    may know better: if it has a method ``flops_per_token(context)`` that does not return None, that is its cost, of all
    it holds. Low-bit layers count as those that they stand for.

    Args:
        model: a causal language model with a Hugging Face style ``config``, on any device, sharded or not.
        context: tokens attended to, at least 1.

    Raises:
        ValueError: the model has no such configuration, or layers whose formula is not known here.
    """
    return _cost(model, _Text(1, context)).forward


def training_flops(model: nn.Module, tokens: int) -> int:
    """Of the forward and backward pass of one causal text of ``tokens`` tokens: each attends to those before it.

    Three times the forward pass; of a frozen weight twice, for it has no gradient of its own (as in LoRA). Whatever is
    computed a second time, by activation checkpointing, does not count: it is no progress.

    Args:
        model: as in `flops_per_token`.
        tokens: length of the text.
    """
    return _cost(model, _Text(tokens, None)).training


class ForwardFlops:
    """Counts what runs in the forward passes of modules whose formula is not known, by PyTorch's own formulas.

    Nothing is run for it: it watches the passes that happen, until ``remove()``. Backward passes are not seen, and
    neither are kernels that PyTorch's counter does not know, nor what a compiled module does inside.

    Attributes:
        flops: counted so far.

    Args:
        modules: one may be part of another one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.flops, self._inside, self._mode = 0, 0, _Counting(self)
        self._handles = []
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        if not self._inside:
            self._mode.__enter__()
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1
        if not self._inside:
            self._mode.__exit__(None, None, None)


class _Counting(TorchDispatchMode):
    supports_higher_order_operators = True  # flex_attention is one

    def __init__(self, into: ForwardFlops) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.into.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _flash_attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop(query.shape, key.shape, value.shape)


_FORMULAS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_attention_on_cpu}


@dataclass(frozen=True, slots=True)
class _Text:
    """How many tokens go through the model, and how many each of them looks at."""

    tokens: int
    context: int | None  # None: itself and all before it

    def looks(self, window: int | None) -> int:
        """Pairs of a token and one that it looks at."""
        if self.context is not None:
            return self.tokens * min(self.context, window or self.context)
        seen = min(window or self.tokens, self.tokens)
        return seen * (seen + 1) // 2 + (self.tokens - seen) * seen

    @property
    def mean_context(self) -> int:
        return self.looks(None) // self.tokens


@dataclass(frozen=True, slots=True)
class _Flops:
    """Of a forward pass, by what is multiplied."""

    weights: int = 0  # activations with weights that train
    frozen: int = 0  # activations with weights that do not
    states: int = 0  # activations with each other

    def __add__(self, other: "_Flops") -> "_Flops":
        return _Flops(self.weights + other.weights, self.frozen + other.frozen, self.states + other.states)

    def times(self, runs: int, of: int = 1) -> "_Flops":
        return _Flops(*(value * runs // of for value in (self.weights, self.frozen, self.states)))

    @property
    def forward(self) -> int:
        return self.weights + self.frozen + self.states

    @property
    def training(self) -> int:
        return 3 * self.weights + 2 * self.frozen + 3 * self.states


def _cost(model: nn.Module, text: _Text) -> _Flops:
    walk = _Walk(text)
    total = walk.cost(model, None, None)
    if not walk.known:
        raise ValueError(
            f"{type(model).__name__} has no config with a hidden_size, or no layer that mixes tokens in a way known "
            "here, so its cost is unknown; give such layers a method flops_per_token(context), or count with "
            "torch.utils.flop_counter.FlopCounterMode instead."
        )
    return total


class _Walk:
    """Adds up a model, module by module."""

    def __init__(self, text: _Text) -> None:
        self.text, self.known = text, 0  # known: layers that mix tokens and whose cost is known

    def cost(self, module: nn.Module, parent: nn.Module | None, config: Any) -> _Flops:
        if (told := self._told(module)) is not None:
            return told
        config = _config(module, config)
        total = self._weights(weight_flops(module, parent, config), module, recurse=False)
        if config is not None:
            total += _Flops(states=self._mixing(module, config))
        for name, child, runs in _children(module, config):
            cost = self.cost(child, module, config)
            if name == "experts" and isinstance(child, nn.ModuleList):
                cost = cost.times(active_experts(child, module, config), of=len(child))
            total += cost.times(runs)
        return total

    def _told(self, module: nn.Module) -> _Flops | None:
        tell = getattr(module, "flops_per_token", None)
        told = tell(self.text.mean_context) if callable(tell) else None
        if told is None:
            return None
        self.known += 1
        return self._weights(told, module, recurse=True)

    def _weights(self, per_token: int, module: nn.Module, recurse: bool) -> _Flops:
        trains = any(p.requires_grad for p in module.parameters(recurse))
        flops = self.text.tokens * per_token
        return _Flops(weights=flops) if trains else _Flops(frozen=flops)

    def _mixing(self, module: nn.Module, config: Any) -> int:
        """Of tokens with each other."""
        if (step := recurrence(module)) is not None:
            self.known += 1
            return self.text.tokens * step
        if (found := attention(module, config)) is None:
            return 0
        self.known += 1
        each, window = found
        return each * self.text.looks(window)


def _config(module: nn.Module, inherited: Any) -> Any:
    """A Hugging Face style configuration: of the module, or of what it is part of."""
    config = getattr(module, "config", None)
    if not hasattr(config, "hidden_size"):
        return inherited
    parts = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if parts or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(module).__name__} is no plain decoder: not every token goes through all of it, so that a cost per "
            "token has no meaning. Count with torch.utils.flop_counter.FlopCounterMode instead."
        )
    return config


def _children(module: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module, and how often it runs when ``module`` does: our backbone runs blocks twice, and shares mixers."""
    shared = getattr(module, "shared", None)
    if not isinstance(shared, nn.ModuleDict) or not hasattr(config, "blocks"):
        yield from ((name, child, 1) for name, child in module.named_children())
        return
    specs = [spec for block in config.blocks for spec in (block.token, block.channel) if spec is not None]
    uses = Counter(f"{spec.name}@{spec.label}" for spec in specs)
    yield from ((key, mixer, config.repeat * uses[key]) for key, mixer in shared.items())
    for name, child in module.named_children():
        if child is not shared:
            yield name, child, config.repeat if name == "layers" else 1
