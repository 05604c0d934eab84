"""The weights of a quantised model as they go to disk: codes packed into bytes, scales beside them, tied ones once."""

# Shape letters: O = outputs, I = inputs, G = groups of a row.

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_slm.quantization.hf import PackedConfig
from lightning_slm.quantization.packed import pack
from lightning_slm.quantization.qat import LayerQuant, fake_quant_layers, quantize_layer

Codes = tuple[LayerQuant, Tensor, Tensor]  # how, codes (O, I), scales (O, G)


def packed_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], PackedConfig] | None:
    """The state dict of a prepared or converted model with its codes packed, on the CPU, and how it is packed.

    Returns: None if there is nothing to pack.
    """
    codes: dict[str, Codes] = {name: (m.quant, *quantize_layer(m)) for name, m in fake_quant_layers(model)}
    codes |= _converted(model)
    if not codes:
        return None
    tied = _tied(model)
    state = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in codes}
    for name, (quant, codes_OI, scale_OG) in codes.items():
        state |= {f"{name}.weight": pack(codes_OI, quant.bits), f"{name}.weight_scale": scale_OG}
    # Copies, for safetensors takes no two tensors of one memory.
    kept = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if k.removesuffix("_scale") not in tied}
    return kept, PackedConfig.of({name: quant for name, (quant, _, _) in codes.items()})


def is_converted(model: nn.Module) -> bool:
    """Whether a layer holds one of torchao's tensors in the place of its weight."""
    return any(_is_torchao(getattr(module, "weight", None)) for module in model.modules())


def _is_torchao(weight: object) -> bool:
    return type(weight).__name__ == "IntxUnpackedToInt8Tensor"  # by name: importing torchao takes seconds


def _converted(model: PreTrainedModel) -> dict[str, Codes]:
    """The codes of layers that ``convert_qat_`` gave torchao's tensors."""
    found: dict[str, Codes] = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not _is_torchao(weight):
            continue
        if weight.zero_point.any() or weight.scale.dtype != torch.bfloat16:
            raise ValueError(
                f"{name!r} was not converted by convert_qat_: symmetric codes and bfloat16 scales are wanted."
            )
        bits = int(str(weight.target_dtype).removeprefix("torch.int"))
        quant = LayerQuant(bits, weight.block_size[-1], weight.activation_quantization is not None)
        found[name] = (quant, weight.qdata, weight.scale)
    return found


def _tied(model: PreTrainedModel) -> set[str]:
    """Keys that transformers fills from another key when it loads."""
    return {
        k for k, source in model.all_tied_weights_keys.items() if model.get_parameter(k) is model.get_parameter(source)
    }
