"""Arithmetic of one token's forward pass, by formula."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_slm.measure.quality import evaluating


def flops_per_token(model: nn.Module, context: int) -> int:
    """Floating-point operations of the forward pass of one token that attends to ``context`` tokens, itself included.

    A multiply-add is two. The sum of

    - ``2 x inputs x outputs`` of every weight matrix, each time it is applied: a block that a configuration shares or
      repeats counts at every use, an embedding look-up not at all, the output head once;
    - ``4 x heads x head_dim x min(context, window)`` of every attention layer: queries times keys, and probabilities
      times values. Grouped queries save memory here and no arithmetic; only sliding layers have a window.

    Norms, activations, rotations and the softmax are left out, as ``torch.utils.flop_counter`` leaves them out.
    Training costs about three times as much. For a causal prefill of T tokens, T / 2 is the mean context.

    Args:
        model: a causal language model with a Hugging Face style ``config``. One token is run through it.
        context: tokens attended to, at least 1.

    Raises:
        ValueError: the model has no such configuration, or layers whose formula is not known here.
    """
    return _matrix_flops(model) + sum(_attention_flops(layer, context) for layer in _attention_layers(model))


def _matrix_flops(model: nn.Module) -> int:
    with _applications(model) as applied, evaluating(model), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    return sum(2 * _matrix_elements(module) for module in applied)


@contextmanager
def _applications(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Collects each module that holds a matrix, as often as it is called."""
    applied: list[nn.Module] = []
    matrices = [m for m in model.modules() if _matrix_elements(m)]
    handles = [m.register_forward_pre_hook(lambda module, _: applied.append(module)) for m in matrices]
    try:
        yield applied
    finally:
        for handle in handles:
            handle.remove()


def _matrix_elements(module: nn.Module) -> int:
    """Elements of the matrices that a module itself multiplies with; packed layers tell their logical size."""
    if isinstance(module, nn.Embedding):
        return 0
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features  # type: ignore[operator,return-value]
    return sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)


def _attention_layers(model: nn.Module) -> list[tuple[int, int | None]]:
    """(heads x head_dim, window or None) of every attention layer, as often as it is run."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{type(model).__name__} has no config with num_attention_heads, so the cost of its attention is unknown; "
            f"count it with torch.utils.flop_counter.FlopCounterMode instead."
        )
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    window = getattr(config, "sliding_window", None)
    default = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    types = getattr(config, "layer_types", None) or default
    if unknown := set(types) - set(windows):
        raise ValueError(f"flops_per_token knows full and sliding attention, but the model has layers of {unknown}.")
    return [(width, windows[t]) for t in types]


def _attention_flops(layer: tuple[int, int | None], context: int) -> int:
    width, window = layer
    return 4 * width * min(context, window or context)
