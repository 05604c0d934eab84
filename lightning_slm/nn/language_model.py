"""What any causal language model is made of, found by capability: logits in an output, a backbone and a head."""

# Shape letters: B = batch, T = tokens.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a module returned: its ``.logits``, its ``["logits"]``, or the tensor itself; else None."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim >= 2 else None


def backbone_and_head(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """The two parts of a decoder of Hugging Face's kind, as they are now; None if it does not name them.

    Look them up at each use: quantisation may have put another head there.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if backbone is None or head is None or getattr(model.config, "is_encoder_decoder", False):
        return None
    return backbone, head


@torch.no_grad()
def is_backbone_and_head(model: nn.Module, ids_BT: Tensor) -> bool:
    """Whether the composition of the two parts is the model, to the last bit; tried on ``ids_BT`` in eval mode.

    Not so for models that scale or cap their logits (Gemma 2, Cohere, Granite).
    """
    parts = backbone_and_head(model)
    if parts is None or any(p.is_meta for p in model.parameters()):
        return False
    backbone, head = parts
    hidden, logits = getattr(backbone(ids_BT), "last_hidden_state", None), logits_of(model(ids_BT))
    return hidden is not None and logits is not None and torch.equal(head(hidden), logits)
