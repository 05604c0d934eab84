"""Quantised folders load through transformers' own ``from_pretrained``: our quantisation method, registered there.

``config.json`` says which layers are packed and how; before the weights are read, those layers become packed ones.
Importing this module registers the method.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_slm.quantization.bitnet import BitNet
from lightning_slm.quantization.packed import PackedBitLinear, PackedEmbedding, PackedLinear
from lightning_slm.quantization.qat import LayerQuant

if TYPE_CHECKING:  # at run time this module may be imported while transformers itself is
    from transformers import PreTrainedModel

METHOD = "lightning_slm"

Quant = LayerQuant | BitNet  # how a layer is packed: scales in groups, or BitNet's one


class PackedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed folder: which layers, in how many bits.

    Args:
        layers: groups of layers that are packed alike, each a dict of ``names``, the list of the modules' names, and of
            the fields of `LayerQuant`, or, where its ``kind`` is "bitnet", of `BitNet`.
    """

    def __init__(self, layers: list[dict[str, Any]], **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers compares strings
        self.layers = layers

    @classmethod
    def of(cls, layers: dict[str, Quant]) -> "PackedConfig":
        """Gather layers by how they are packed."""
        alike: dict[Quant, list[str]] = {}
        for name, quant in layers.items():
            alike.setdefault(quant, []).append(name)
        kinds = {LayerQuant: {}, BitNet: {"kind": "bitnet"}}  # older folders have no kind
        return cls([{**kinds[type(quant)], **asdict(quant), "names": names} for quant, names in alike.items()])

    def by_name(self) -> dict[str, Quant]:
        """How each layer is packed."""
        found: dict[str, Quant] = {}
        for layer in self.layers:
            fields = {key: value for key, value in layer.items() if key not in ("kind", "names")}
            quant = BitNet(**fields) if layer.get("kind") == "bitnet" else LayerQuant(**fields)
            found |= dict.fromkeys(layer["names"], quant)
        return found


class PackedQuantizer(HfQuantizer):
    """Puts packed layers in the place of plain ones before transformers reads the weights."""

    requires_calibration = True  # transformers' word for: only folders that are quantised already
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        _check_files(self.quantization_config.by_name(), kwargs.get("checkpoint_files") or [])
        modules = dict(model.named_modules())
        for name, quant in self.quantization_config.by_name().items():
            if name not in modules:
                raise ValueError(
                    f"The folder packs {name!r}, which this {type(model).__name__} has not; load it as one of "
                    f"{model.config.architectures}."
                )
            model.set_submodule(name, packed_like(modules[name], quant, kwargs.get("dtype")))
        for target, _ in self._tied(model):
            target._non_persistent_buffers_set.add("weight_scale")  # neither looked for in the file nor written to one

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for target, source in self._tied(model):
            target.weight_scale = source.weight_scale

    def _tied(self, model: "PreTrainedModel") -> list[tuple[nn.Module, nn.Module]]:
        """Packed layers that share the codes of another; transformers ties those, and knows of no scales."""
        owners = [[key.rpartition(".")[0] for key in pair] for pair in model.all_tied_weights_keys.items()]
        packed = self.quantization_config.by_name()
        return [(model.get_submodule(t), model.get_submodule(s)) for t, s in owners if t in packed and s in packed]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def packed_like(
    plain: nn.Module, quant: Quant, dtype: torch.dtype | None
) -> PackedLinear | PackedBitLinear | PackedEmbedding:
    """An empty packed layer of the same sizes, on the same device.

    Raises:
        ValueError: ``plain`` is neither a linear layer nor an embedding.
    """
    with torch.device(plain.weight.device):  # type: ignore[arg-type]
        if isinstance(plain, nn.Linear):
            sizes = plain.in_features, plain.out_features, plain.bias is not None
            if isinstance(quant, BitNet):
                return PackedBitLinear(*sizes, quant, dtype)
            return PackedLinear(*sizes, quant.bits, quant.group, quant.int8_activations, dtype)
        if isinstance(plain, nn.Embedding) and isinstance(quant, LayerQuant):
            table = plain.num_embeddings, plain.embedding_dim
            return PackedEmbedding(*table, quant.bits, quant.group, plain.padding_idx, dtype)
    raise ValueError(f"A {type(plain).__name__} cannot be packed; the folder was written for another model.")


def _check_files(layers: dict[str, Quant], files: list[str]) -> None:
    """Transformers would only report a missing tensor, and make it up: codes without their scales mean nothing."""
    keys = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys |= set(tensors.keys())
    for name in layers:
        if (f"{name}.weight" in keys) != (f"{name}.weight_scale" in keys):
            raise ValueError(f"{files[0]} is damaged: of {name!r} it holds only the codes, or only the scales.")


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import, after a reload, is no mistake
    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
