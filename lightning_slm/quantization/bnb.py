"""Frozen weights in 4 or 8 bits, on bitsandbytes: NF4 for adapters on a small base, LLM.int8() for products in int8.

NF4 (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): sixteen levels that a normal distribution fills
alike, times the largest magnitude of each block; these magnitudes in 8 bits again (double quantisation). LLM.int8()
(Dettmers et al. 2022, https://arxiv.org/abs/2208.07339): int8 codes of weights and inputs, but for the inputs with
outliers. Either way gradients reach the inputs, not the weights: what trains is adapters, norms, biases, embeddings.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.bnb_layers import NF4, FrozenLinear, LLMInt8, LLMInt8Linear, NF4Linear
from lightning_slm.quantization.layers import exchange_

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def nf4_(
    model: nn.Module,
    double_quant: bool = True,
    block: int = 64,
    compute_dtype: torch.dtype | None = None,
    targets: Patterns = "*",
    skip: Patterns = (),
) -> list[str]:
    """Freeze the linear layers of ``model`` as 4-bit codes, in place; doing it twice is fine.

    Adapters of peft's beside a layer stay as they are, whether they came before or come later.

    Args:
        double_quant: keep the blocks' largest magnitudes in 8 bits: 0.127 bits per weight instead of 0.5.
        block: consecutive inputs that share a magnitude: 32, 64, 128 ... 4096. A layer whose rows are not whole blocks
            stays in full precision.
        compute_dtype: what inputs and weights are cast to for the product; None: what autocast says, or the input's.
        targets: fnmatch patterns of the linear layers; embeddings and output heads are none.
        skip: patterns to leave out again.

    Returns: the names of the frozen layers.

    Raises:
        ValueError: another block, weights without memory (meta device), a pattern that matches nothing, or a layer that
            another technique has exchanged already.
    """
    if block not in _BLOCKS:
        raise ValueError(f"block={block} must be one of {', '.join(map(str, _BLOCKS))}; the paper's is 64.")
    return _freeze_(model, NF4Linear, NF4(double_quant, block, compute_dtype), targets, skip, block)


def llm_int8_(model: nn.Module, threshold: float = 6.0, targets: Patterns = "*", skip: Patterns = ()) -> list[str]:
    """Freeze the linear layers of ``model`` as int8 codes and let them multiply in int8, in place; twice is fine.

    Args:
        threshold: columns of inputs with a magnitude from here on are multiplied in full precision; 0: none are.
        targets, skip, returned and raised: as `nf4_`.
    """
    if threshold < 0:
        raise ValueError(f"threshold={threshold} must not be negative; the paper's is 6.0, and 0 rounds all inputs.")
    return _freeze_(model, LLMInt8Linear, LLMInt8(threshold), targets, skip)


def _freeze_(
    model: nn.Module, kind: type[FrozenLinear], settings: Any, targets: Patterns, skip: Patterns, block: int = 1
) -> list[str]:
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))

    def misfit(layer: nn.Linear) -> str | None:
        if type(layer) is not nn.Linear:
            return None
        if layer.weight.is_meta:
            raise ValueError(f"{kind.__name__} is made of weights, and the model is on the meta device, without any.")
        if layer.in_features % block:
            return f"has rows of {layer.in_features}, which are not whole blocks of {block}"
        if layer.weight.dtype not in _FLOATS:
            return f"is of {layer.weight.dtype}"
        return "is shared with another module" if uses[id(layer.weight)] > 1 else None

    left_out = [*([skip] if isinstance(skip, str) else skip), *_adapters(model)]
    names = exchange_(model, kind, settings, targets, left_out, misfit)
    for layer in map(model.get_submodule, names):
        if layer.weight.is_floating_point():  # type: ignore[union-attr, operator]
            layer.quantize_(layer.weight)  # type: ignore[operator]
    return names


def _adapters(model: nn.Module) -> list[str]:
    """Names of modules that peft put beside the layer they adapt, which it calls ``base_layer``."""
    return [
        inner
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        for inner, _ in module.named_modules(prefix=name)
        if inner != name and not f"{inner}.".startswith(f"{name}.base_layer.".lstrip("."))
    ]


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """The layers that `nf4_` and `llm_int8_` froze, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}


def dequantize_(model: nn.Module) -> None:
    """Give frozen layers plain weights again, those that their codes stand for: to merge adapters, or to go on in full.

    They stay without gradient until ``requires_grad_()``.
    """
    for layer in frozen_layers(model).values():
        layer.weight.data = layer.dequantized()
        for name in layer.statistics():
            del layer._buffers[name]
        del layer.settings, layer.plain_dtype
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def bitsandbytes_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and ``quantization_config`` of a Hugging Face folder that loads with bitsandbytes, without us.

    Raises:
        ValueError: no layer is frozen, or some in 4 and others in 8 bits, which such a folder cannot say.
    """
    layers = frozen_layers(model)
    if len(kinds := {type(layer) for layer in layers.values()}) != 1:
        raise ValueError(f"A folder is of one kind of frozen layers, and the model has {len(kinds)}: see nf4_.")
    config: dict[str, Any] = {"quant_method": "bitsandbytes"}
    first = next(iter(layers.values()))
    settings = first.settings
    if isinstance(settings, NF4):
        config |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config |= {"bnb_4bit_use_double_quant": settings.double_quant, "bnb_4bit_quant_storage": "uint8"}
        config["bnb_4bit_compute_dtype"] = str(settings.compute_dtype or first.plain_dtype).removeprefix("torch.")
    else:
        config |= {"load_in_8bit": True, "llm_int8_threshold": settings.threshold}
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    state = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value for key, value in layer.packed_state().items()}
    return state, {**config, "llm_int8_skip_modules": plain}
