"""What a checkpoint holds besides Lightning's own, all of it plain; and weights from whatever file holds them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from lightning_slm.models import SLMForCausalLM, load_model

OWN_MODULE = "module_of_your_own"  # key that stands in a checkpoint for a model we cannot rebuild


def configuration_of(model: nn.Module) -> dict[str, Any]:
    """A plain dict from which ``load_model`` rebuilds the model; for a module of the user's own, its name."""
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


def tokenizer_in(checkpoint: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a checkpoint of ours; None if it has none."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return tokenizer_from_text(stored["slm_tokenizer"]) if "slm_tokenizer" in stored else None


def check_tokenizer(source: str | Path, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Refuse to train weights on other ids than they learned, where the file or folder has its tokenizer with it.

    Raises:
        ValueError: a token of theirs has another id, or none, in ``tokenizer``; the mask token is of no account.
    """
    place = Path(source)
    theirs = None
    if place.is_dir() and (place / "tokenizer.json").is_file():
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"))
    elif place.suffix == ".ckpt":
        theirs = tokenizer_in(place)
    if theirs is None or tokenizer is None:
        return
    ours, mask = tokenizer.get_vocab(), theirs.mask_token
    if any(ours.get(token) != number for token, number in theirs.get_vocab().items() if token != mask):
        raise ValueError(
            f"init_weights_from={str(source)!r} has another tokenizer than the data, so the model would read other "
            f"words than it learned: give the data tokenizer={str(source)!r}."
        )


def load_weights_(model: nn.Module, source: str | Path, task: str = "causal") -> None:
    """Fill ``model`` with the weights of a checkpoint of ours, a Hugging Face folder or a safetensors file.

    Args:
        model: is changed in place.
        source: the file or folder.
        task: the model's; for "classification", what has another head gives what lies below it.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: weights that are missing, left over or of another shape.
    """
    if task == "classification" and isinstance(model, PreTrainedModel):
        _load_below_head_(model, Path(source))
    else:
        _fill_(model, _weights_of(Path(source), model, task), source)


def _fill_(model: nn.Module, weights: dict[str, Tensor], source: str | Path, may_lack: str = "\0") -> None:
    own = model.state_dict()
    aliases = _aliases(model)
    missing = [k for k in own if k not in weights and not any(other in weights for other in aliases.get(k, ()))]
    missing = [k for k in missing if not k.startswith(may_lack)]
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


def _load_below_head_(model: PreTrainedModel, source: Path) -> None:
    """All of it, if it is a model with the same head; else the backbone. A pooler that the file lacks stays new:
    masked language models have none.
    """
    own, prefix = model.state_dict(), f"{model.base_model_prefix}."
    weights = _weights_of(source, model, "classification")
    if not any(k.startswith(prefix) for k in weights):
        weights = {f"{prefix}{k}": v for k, v in weights.items()}
    if all(k in weights and weights[k].shape == v.shape for k, v in own.items()):
        _fill_(model, {k: weights[k] for k in own}, source)
        return
    below = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    below = {k: v for k, v in below.items() if not k.startswith("pooler.") or prefix + k in own}
    _fill_(model.base_model, below, source, may_lack="pooler.")


def _weights_of(source: Path, model: nn.Module, task: str) -> dict[str, Tensor]:
    if source.is_dir():
        stored = json.loads((source / "config.json").read_text())
        if isinstance(model, SLMForCausalLM) and stored["model_type"] != "slm":
            return SLMForCausalLM.from_hf(source).state_dict()
        if task == "classification" and not str(stored.get("architectures")).endswith("ForSequenceClassification']"):
            return AutoModel.from_pretrained(source).state_dict()
        return load_model(source, task).state_dict()
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
