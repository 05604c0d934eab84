"""What a checkpoint holds besides Lightning's own, all of it plain; and weights from whatever file holds them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_slm.models import SLMForCausalLM, load_causal_lm

OWN_MODULE = "module_of_your_own"  # key that stands in a checkpoint for a model we cannot rebuild


def configuration_of(model: nn.Module) -> dict[str, Any]:
    """A plain dict from which ``load_causal_lm`` rebuilds the model; for a module of the user's own, its name."""
    if isinstance(model, PreTrainedModel):
        return json.loads(model.config.to_json_string(use_diff=False))
    return {OWN_MODULE: f"{type(model).__module__}.{type(model).__qualname__}"}


def tokenizer_to_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """The whole tokenizer as JSON: its own, and the special tokens that transformers keeps beside it."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return json.dumps({"tokenizer": tokenizer.backend_tokenizer.to_str(), "special_tokens": special})


def tokenizer_from_text(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer that ``tokenizer_to_text`` wrote."""
    stored = json.loads(text)
    backend = Tokenizer.from_str(stored["tokenizer"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **stored["special_tokens"])


def load_weights_(model: nn.Module, source: str | Path) -> None:
    """Fill ``model`` with the weights of a checkpoint of ``CausalLM``, a Hugging Face folder or a safetensors file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: weights that are missing, left over or of another shape.
    """
    weights = _weights_of(Path(source), model)
    own = model.state_dict()
    aliases = _aliases(model)
    missing = [k for k in own if k not in weights and not any(other in weights for other in aliases.get(k, ()))]
    unknown = [k for k in weights if k not in own]
    shapes = {k: (tuple(own[k].shape), tuple(v.shape)) for k, v in weights.items() if k in own}
    other = [f"{k} (model {a}, file {b})" for k, (a, b) in shapes.items() if a != b]
    if wrong := [
        _listed(*x) for x in (("missing", missing), ("not in the model", unknown), ("other shape", other)) if x[1]
    ]:
        raise ValueError(
            f"init_weights_from={str(source)!r} does not fit {type(model).__name__}: {'; '.join(wrong)}. Use the "
            "configuration that these weights were trained with."
        )
    model.load_state_dict(weights, strict=False)


def _weights_of(source: Path, model: nn.Module) -> dict[str, Tensor]:
    if source.is_dir():
        if (
            isinstance(model, SLMForCausalLM)
            and json.loads((source / "config.json").read_text())["model_type"] != "slm"
        ):
            return SLMForCausalLM.from_hf(source).state_dict()
        return load_causal_lm(source).state_dict()
    if not source.is_file():
        raise FileNotFoundError(f"init_weights_from={str(source)!r}: there is no such file or folder.")
    if source.suffix == ".safetensors":
        return load_file(source)
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of a tied weight -> all names of the same parameter."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name: tied for tied in names.values() for name in tied}


def _listed(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"{what}: {', '.join(keys[:4])}{more}"
