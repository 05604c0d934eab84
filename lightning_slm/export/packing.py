"""The weights of a quantised model as they go to disk: codes packed into bytes, scales beside them, tied ones once."""

# Shape letters: O = outputs, I = inputs, G = groups of a row.

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitNetQuantConfig, BitsAndBytesConfig, PreTrainedModel

from lightning_slm.quantization.bitnet import BitLinear, BitNet, bit_layers, quantize_bits
from lightning_slm.quantization.hf import PackedConfig, Quant
from lightning_slm.quantization.packed import PackedBitLinear, pack, pack_bits, unpack, unpack_bits
from lightning_slm.quantization.qat import LayerQuant, fake_quant_layers, quantize_layer

Codes = tuple[Quant, Tensor, Tensor]  # how, codes (O, I), scales (O, G), or BitNet's ()


def packed_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], PackedConfig] | None:
    """The state dict of a prepared or converted model with its codes packed, on the CPU, and how it is packed.

    Returns: None if there is nothing to pack.
    """
    codes: dict[str, Codes] = {name: (m.quant, *quantize_layer(m)) for name, m in fake_quant_layers(model)}
    codes |= _converted(model)
    codes |= {name: (m.settings, *quantize_bits(m.weight, m.settings.bits)) for name, m in bit_layers(model)}
    if not codes:
        return None
    tied = _tied(model)
    state = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in codes}
    for name, (quant, codes_OI, scale) in codes.items():
        if isinstance(quant, BitNet):
            packed_OP, scale = pack_bits(codes_OI, quant), scale.reshape(1).view(torch.int32)
        else:
            packed_OP = pack(codes_OI, quant.bits)
        state |= {f"{name}.weight": packed_OP, f"{name}.weight_scale": scale}
    kept = {k: v for k, v in state.items() if k.removesuffix("_scale") not in tied}
    return _on_disk(kept), PackedConfig.of({name: quant for name, (quant, _, _) in codes.items()})


def bitnet_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], BitNetQuantConfig]:
    """The state dict and configuration of transformers' own BitNet folders, which load without us.

    Raises:
        ValueError: something that such a folder cannot say; names the layer.
    """
    layers = dict(bit_layers(model))
    if not layers:
        raise ValueError('format="bitnet", but no layer is BitNet\'s; call bitnet_(model) and train, first.')
    if not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f'format="bitnet" is for architectures that transformers has, and a {type(model).__name__} it has not: '
            "train such a model (ours has one scale for q, k and v together), or write our own format."
        )
    if prepared := fake_quant_layers(model):
        raise ValueError(f'format="bitnet" cannot hold the codes of {prepared[0][0]!r}: write our own format.')
    for name, layer in layers.items():
        if layer.settings != BitNet("1.58") or layer.out_features % 4:
            raise ValueError(
                f'{name!r} computes as {layer.settings} with {layer.out_features} outputs, and format="bitnet" holds '
                "ternary codes without sub_norm, of outputs in fours: write our own format."
            )
    state = model.state_dict()
    for name, layer in layers.items():
        codes_OI, scale = quantize_bits(layer.weight, "1.58")
        # They divide by what they call the scale, and change the codes they are given.
        state |= {
            f"{name}.weight": _their_bitnet().pack_weights(codes_OI),
            f"{name}.weight_scale": 1 / scale.reshape(1),
        }
    kept = {k: v for k, v in state.items() if k not in _tied(model)}
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    return _on_disk(kept), BitNetQuantConfig(modules_to_not_convert=plain)


def is_frozen(model: nn.Module) -> bool:
    """Whether weights are bitsandbytes' codes (``nf4_``, ``llm_int8_``)."""
    return any(hasattr(module, "packed_state") for module in model.modules())


def frozen_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], BitsAndBytesConfig]:
    """The state dict and configuration of transformers' own bitsandbytes folders, which load without us.

    Raises:
        ValueError: something that such a folder cannot say; names the layer.
    """
    from lightning_slm.quantization.bnb import bitsandbytes_state  # here: importing bitsandbytes takes seconds

    if others := [name for name, _ in [*fake_quant_layers(model), *bit_layers(model)]]:
        raise ValueError(f"A folder with bitsandbytes' codes cannot hold those of {others[0]!r}: leave one kind out.")
    state, config = bitsandbytes_state(model)
    kept = {k: v for k, v in state.items() if k not in _tied(model)}
    return _on_disk(kept), BitsAndBytesConfig.from_dict(config)


def _on_disk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, for safetensors takes no two tensors of one memory."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def differing_codes(model: PreTrainedModel, again: nn.Module) -> list[str]:
    """Layers of ``again``, loaded from an export, whose codes are not those of the weights of ``model``."""
    wrong = []
    for name, layer in [*fake_quant_layers(model), *bit_layers(model)]:
        loaded: Any = again.get_submodule(name)
        if isinstance(layer, BitLinear):
            codes_OI, held_OI = quantize_bits(layer.weight, layer.settings.bits)[0], _held_bits(loaded)
        else:
            codes_OI, held_OI = quantize_layer(layer)[0], unpack(loaded.weight, loaded.bits)
        if not torch.equal(held_OI, codes_OI):
            wrong.append(name)
    return wrong


def _held_bits(layer: Any) -> Tensor:
    """The codes of our packed layer, or of transformers'."""
    if isinstance(layer, PackedBitLinear):
        return unpack_bits(layer.weight, layer.settings)
    return _their_bitnet().unpack_weights(layer.weight, torch.int8)


def _their_bitnet() -> Any:
    """The module of transformers, which compiles functions when it is imported; PyTorch's compiler warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module("transformers.integrations.bitnet")


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
