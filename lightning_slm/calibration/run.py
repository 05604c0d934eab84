"""How a model is run on a calibration batch, whatever the batch is."""

# Shape letters: B = batch, T = tokens.

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# What a batch may hold that is no input of the backbone, or would only make it compute more.
_NO_INPUTS = ("labels", "num_items_in_batch")


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch, moved to its device.

    Args:
        batch: a dict, of which the model gets what its forward has arguments for, labels excepted; a tensor; or a tuple
            or list, of which the model gets as many as it requires (of (inputs, targets) mostly the first).

    Raises:
        ValueError: none of a dict's keys is an argument of the model.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        known = _arguments(model)
        chosen = {k: v for k, v in batch.items() if k not in _NO_INPUTS and (known is None or k in known)}
        if not chosen:
            raise ValueError(
                f"a batch has {', '.join(map(repr, batch))}, but {type(model).__name__}.forward takes "
                f"{', '.join(map(repr, known or ()))}; give `run=lambda batch: ...`."
            )
        return model(**{name: _moved(value, device) for name, value in chosen.items()})
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(*(_moved(value, device) for value in batch[: max(_required(model), 1)]))


def unshared(batch: Any) -> Any:
    """The batch with activations of its own: some models write to their inputs, and it will be run again."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_floating_point() else batch
    if type(batch) in (list, tuple):
        return type(batch)(unshared(value) for value in batch)
    return {name: unshared(value) for name, value in batch.items()} if type(batch) is dict else batch


def mask_of(batch: Any) -> Tensor | None:
    """Positions (B, T) of a batch that are not padding, if it tells; bool."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.bool().all() else None


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _arguments(model: nn.Module) -> list[str] | None:
    """Names of what forward takes; None: anything."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named or None


def _required(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
