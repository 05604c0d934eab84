"""Which architectures of ``transformers`` load into ours. A new one is a file here and a line in ``CONVERTERS``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import llama
from lightning_slm.models.modeling import SLMForCausalLM


@dataclass(frozen=True, slots=True)
class Converter:
    """How one architecture becomes ours.

    Attributes:
        config: their configuration as ours; raises ``ValueError`` for variants that ours does not have.
        names: for one of our parameters (and our configuration), theirs that it is stacked from along the first axis;
            shapes with the same elements in the same order are fine.
    """

    config: Callable[[Any], SLMConfig]
    names: Callable[[str, SLMConfig], list[str]]


_LLAMA = Converter(llama.from_llama_config, lambda name, config: llama.names(name))
CONVERTERS: dict[str, Converter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
}


def from_hf(theirs: PreTrainedModel) -> SLMForCausalLM:
    """Our model with the weights of one in ``transformers``.

    Raises:
        ValueError: another architecture, or a variant that ours does not have (biases, scaled rotary positions).
    """
    kind = theirs.config.model_type
    if kind not in CONVERTERS:
        raise ValueError(f"from_hf reads {', '.join(CONVERTERS)}, not {kind!r}.")
    config = CONVERTERS[kind].config(theirs.config)
    model = SLMForCausalLM(config)
    nn.Module.to(model, theirs.dtype)
    source = theirs.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            parts = [source[part] for part in CONVERTERS[kind].names(name, config)]
            target.copy_(torch.cat(parts).view(target.shape))
    model.generation_config = theirs.generation_config
    return model.train(theirs.training)
