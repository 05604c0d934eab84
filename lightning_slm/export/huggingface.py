"""Hugging Face folders: plain, or with weights really packed into few bits. Each is read back before it counts.

A folder is written under another name, loaded as a user would load it, compared with the model in memory, and only
then renamed: whatever goes wrong, what stood there before still stands there.
"""

# Shape letters: B = batch, T = tokens, V = vocabulary.

import contextlib
import copy
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_slm.export.packing import (
    bitnet_state,
    differing_codes,
    frozen_state,
    is_converted,
    is_frozen,
    packed_state,
)
from lightning_slm.measure.size import file_bytes
from lightning_slm.quantization import PackedEmbedding, PackedLinear, fake_quant_layers
from lightning_slm.quantization.bitnet import bit_layers, set_share_
from lightning_slm.quantization.int4_kernel import Int4KernelBitLinear, Int4KernelLinear
from lightning_slm.quantization.layers import as_plain
from lightning_slm.quantization.packed import PackedBitLinear

_WEIGHTS = "model.safetensors"
_Packed = tuple[dict[str, Tensor], QuantizationConfigMixin]  # state dict, and what config.json says of it
# The reloaded model may sum in another order (memory is aligned otherwise), and a rounded activation may then fall on
# the other side: of the largest logit, so much, or one step of the model's own dtype.
_TOLERANCE = 1e-3


class Exported(NamedTuple):
    """What was written, and how it compared."""

    folder: Path
    bytes: int  # of all files of the folder
    quantized: bool
    difference: float  # the largest between a logit in memory and after reloading; 0.0 as a rule


def save_hf_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    quantized: bool | Literal["auto"] = "auto",
    format: Literal["lightning_slm", "bitnet"] = "lightning_slm",
) -> Exported:
    """Write ``model`` as a folder that ``from_pretrained`` loads: config, safetensors, tokenizer, generation config.

    Args:
        model: a Hugging Face model, ours or not.
        folder: an earlier export there is replaced once the new one has been read back and compared.
        tokenizer: saved beside the model, so that text goes in and comes out.
        quantized: True packs the codes of a model prepared (or converted) for quantisation, of BitNet's layers or of
            frozen ones; False writes the weights behind them in full precision; "auto" packs where there is something
            to pack.
        format: how codes are packed. "lightning_slm" needs ``import lightning_slm`` to load and holds everything we
            train; "bitnet" is transformers' own, for its architectures with ternary layers, and loads without us.
            Layers frozen by ``nf4_`` or ``llm_int8_`` are always written as transformers' own, bitsandbytes'.

    Raises:
        ValueError: not a Hugging Face model, nothing to pack, a format that cannot hold the model, or a folder with
            files that are no export.
        RuntimeError: the reloaded model differs. Nothing was changed.
    """
    folder = Path(folder)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} is no transformers.PreTrainedModel and has no Hugging Face folder; export the "
            "network inside it, or convert_qat_(model) and torch.save its state_dict."
        )
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise ValueError(f"{str(folder)!r} holds something that is no export; choose another folder, or empty it.")
    if format not in ("lightning_slm", "bitnet"):
        raise ValueError(f"format={format!r} must be 'lightning_slm' or 'bitnet'.")
    packed, loaded = _packed(model, quantized, format)
    with _replacing(folder) as new:
        if packed is None:
            model.save_pretrained(new)
        else:
            _write_packed(model, new, *packed)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        difference = _compare(model, new, None if packed is None else packed[0])
    return Exported(folder, folder_bytes(folder), packed is not None or loaded, difference)


def _packed(model: PreTrainedModel, quantized: bool | str, format: str) -> tuple[_Packed | None, bool]:
    """What to write in place of the state dict, if anything; and whether the model holds codes only."""
    if any(isinstance(m, Int4KernelLinear | Int4KernelBitLinear) for m in model.modules()):
        raise ValueError("The layers hold this CPU's layout of their codes; export the model as it was loaded.")
    loaded = any(isinstance(m, PackedLinear | PackedBitLinear | PackedEmbedding) for m in model.modules())
    if not quantized:
        if format != "lightning_slm":
            raise ValueError(f"format={format!r} is one of codes; leave it out with quantized=False.")
        if loaded or is_converted(model):
            raise ValueError("quantized=False, but only the codes are left of these weights; export it as it is.")
        if frozen := [n for n, m in model.named_modules() if hasattr(m, "packed_state") and m.rounds_inputs]:
            raise ValueError(
                f"quantized=False, but a plain layer does not round its inputs, and {frozen[0]!r} does: pack it, or "
                "call lightning_slm.quantization.bnb.dequantize_(model) first."
            )
        if normed := [name for name, layer in bit_layers(model) if layer.settings.sub_norm]:
            raise ValueError(f"quantized=False, but a plain layer has no sub_norm, and {normed[0]!r} has: pack it.")
        return None, loaded
    if format == "bitnet":
        return bitnet_state(model), loaded
    packed: _Packed | None = frozen_state(model) if is_frozen(model) else packed_state(model)
    if quantized is True and packed is None and not loaded:
        raise ValueError(
            "quantized=True, but the model was not prepared; call prepare_qat_(model), or bitnet_, and train, first."
        )
    return packed, loaded


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files below ``folder``."""
    return file_bytes(Path(folder))


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` that takes its place if all goes well, and disappears if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{which}") for which in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_packed(
    model: PreTrainedModel, folder: Path, state: dict[str, Tensor], quantization: QuantizationConfigMixin
) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = quantization.to_dict()
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


def _compare(model: PreTrainedModel, folder: Path, packed: dict[str, Tensor] | None) -> float:
    """Load as a user would, and compare: packed codes exactly, logits within the tolerance."""
    if packed is not None:
        written = load_file(folder / _WEIGHTS)
        wrong = [name for name, tensor in packed.items() if not torch.equal(written[name], tensor)]
        if wrong:
            raise RuntimeError(f"The codes on disk differ from those in memory: {', '.join(wrong)}.")
    attention = getattr(model.config, "_attn_implementation", None)
    again: nn.Module = type(model).from_pretrained(folder, dtype=model.dtype, attn_implementation=attention)
    again.to(model.device)
    for module in again.modules():
        if type(module).__name__ == "Linear4bit":  # which has a faster and less exact way in evaluation, on some CPUs
            module.train()
    # transformers' own layers compile themselves: too long for sixteen tokens.
    with _computing_as_exported(model, packed is not None), torch.compiler.set_stance("force_eager"):
        if packed is not None and (wrong := differing_codes(model, again)):
            raise RuntimeError(f"The codes loaded differ from those of the weights: {', '.join(wrong)}.")
        here, there = _logits(model), _logits(again)
    difference = (here - there).abs().max().item()
    if not difference <= max(_TOLERANCE, torch.finfo(model.dtype).eps) * here.abs().max().item():
        raise RuntimeError(
            f"The exported model's logits differ from those of the model in memory by {difference:.3g}, of "
            f"{here.abs().max().item():.3g} at most. Nothing was written. Is a quantised weight used elsewhere than in "
            "its layer's forward?"
        )
    return difference


@contextlib.contextmanager
def _computing_as_exported(model: nn.Module, rounded: bool) -> Iterator[None]:
    """Eval mode, and the fake quantisation as the export has it; both are put back."""
    modes = {module: module.training for module in model.modules()}
    enabled = {layer: layer.fake_quant_enabled for _, layer in fake_quant_layers(model)}
    shares = {layer: layer.share for _, layer in bit_layers(model)}
    model.eval()
    for layer in enabled:
        layer.fake_quant_enabled = rounded
    set_share_(model, float(rounded))
    try:
        with torch.no_grad(), as_plain(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, on in enabled.items():
            layer.fake_quant_enabled = on
        for bit_layer, share in shares.items():
            bit_layer.share = share


def _logits(model: Any) -> Tensor:
    """Of sixteen tokens from all over the vocabulary, (1, T, V)."""
    ids_BT = torch.arange(1, 17, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size
    out = model(input_ids=ids_BT)
    return (out.logits if hasattr(out, "logits") else out[0]).float()
