"""Which architectures of ``transformers`` load into ours. A new one is a file here and a line in ``CONVERTERS``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import jamba, llama, mamba, mamba2, mixtral, rwkv
from lightning_slm.models.modeling import SLMForCausalLM

Part = str | tuple[str, int]  # a parameter's name, or one of a stack of them (experts)


@dataclass(frozen=True, slots=True)
class Converter:
    """How one architecture becomes ours.

    Attributes:
        config: their configuration as ours; raises ``ValueError`` for variants that ours does not have.
        names: for one of our parameters (and our configuration), theirs that it is stacked from along the first axis;
            shapes with the same elements in the same order are fine. (name, i): the i-th of a stack.
        weights: their parameters by name, where these are not simply the model's.
    """

    config: Callable[[Any], SLMConfig]
    names: Callable[[str, SLMConfig], Sequence[Part]]
    weights: Callable[[Any], Mapping[str, Tensor]] = nn.Module.state_dict


_LLAMA = Converter(llama.from_llama_config, lambda name, config: llama.names(name))
CONVERTERS: dict[str, Converter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mamba": Converter(mamba.from_mamba_config, mamba.names),
    "mamba2": Converter(mamba2.from_mamba2_config, mamba2.names),
    "mixtral": Converter(mixtral.from_mixtral_config, mixtral.names),
    "jamba": Converter(jamba.from_jamba_config, jamba.names),
    "rwkv": Converter(rwkv.from_rwkv_config, rwkv.rwkv_names, rwkv.rwkv_weights),
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
    source = CONVERTERS[kind].weights(theirs)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            parts = [_part(source, part) for part in CONVERTERS[kind].names(name, config)]
            target.copy_(torch.cat(parts).view(target.shape))
    model.generation_config = theirs.generation_config
    return model.train(theirs.training)


def _part(source: Mapping[str, Tensor], part: Part) -> Tensor:
    return source[part] if isinstance(part, str) else source[part[0]][part[1]]
