"""What a network takes of a batch besides the ids, and how many tokens at most."""

# Shape letters: B = batch, T = tokens.

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Inputs:
    """Reads the arguments for ``model`` from batches; the losses of all our modules begin here.

    Attributes:
        longest: the model's positions; None: any number of tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.longest: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        signature = inspect.signature(model.forward).parameters
        self._takes_anything = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        self._takes = set(signature)

    def check_length(self, tokens: int) -> None:
        """Raises: ValueError: a window longer than the model's positions."""
        if self.longest is not None and tokens > self.longest:
            raise ValueError(
                f"A window of {tokens} tokens is longer than the {self.longest} positions of "
                f"{type(self.model).__name__}; lower the window of the data, or build the model with "
                f"max_position_embeddings={tokens}."
            )

    def options(self, batch: dict[str, Tensor], optional: Iterable[str] = ()) -> dict[str, Any]:
        """The batch's ``attention_mask`` and ``position_ids``, and what is ``optional`` if the model names it.

        Raises:
            ValueError: more tokens than the model has positions, or a mask or positions that it does not take.
        """
        self.check_length(batch["input_ids"].shape[1])
        options: dict[str, Any] = {k: batch[k] for k in ("attention_mask", "position_ids") if batch.get(k) is not None}
        if refused := [k for k in options if not (self._takes_anything or k in self._takes)]:
            raise ValueError(
                f"The batch has {refused}, but {type(self.model).__name__}.forward does not take them; add them to its "
                "arguments, or leave them out of the batch (TextData: document_mask=False)."
            )
        options |= {k: batch[k] for k in optional if batch.get(k) is not None and k in self._takes}
        if isinstance(self.model, PreTrainedModel) and ("use_cache" in self._takes or self.model.can_generate()):
            options["use_cache"] = False
        return options


def few_ids(model: PreTrainedModel) -> Tensor:
    """Eight tokens to try a model out on, (1, 8)."""
    return torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
