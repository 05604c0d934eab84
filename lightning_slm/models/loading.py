"""One door for every kind of language model."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from lightning_slm.errors import near
from lightning_slm.models.encoder_presets import ENCODERS
from lightning_slm.models.preset import Preset
from lightning_slm.models.presets import PRESETS

_AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
}
_OF_THE_HEAD = {"id2label", "label2id", "problem_type"}  # what a classifier's folder can be asked to have anew


def load_causal_lm(source: str | Path | dict | PreTrainedConfig | nn.Module, **overrides: Any) -> nn.Module:
    """A causal language model from whatever names one; see `load_model`."""
    return load_model(source, "causal", **overrides)


def load_model(
    source: str | Path | dict | PreTrainedConfig | nn.Module, task: str = "causal", **overrides: Any
) -> nn.Module:
    """A model from whatever names one.

    Args:
        source: the name of a preset (new weights), a Hugging Face folder (its weights), a configuration or the dict
            of one (new weights; without "model_type" it is an ``SLMConfig``), or a module, which is returned as is.
        task: which head: "causal" (next tokens), "masked" (masked tokens) or "classification" (of whole sequences;
            new over the weights of a folder that has another one).
        overrides: values of the configuration to replace, where the weights are new; those of the labels in any case.

    Raises:
        ValueError: no such preset or folder, or overrides where weights exist already.
    """
    auto = _AUTO[task]
    if isinstance(source, nn.Module):
        return _untouched(source, overrides, "a module")
    if isinstance(source, PreTrainedConfig):
        source = {**source.to_diff_dict(), "model_type": source.model_type}
    if isinstance(source, dict):
        kind = source.get("model_type", "slm")
        derived = {"model_type", "num_hidden_layers", "layer_types"} if kind == "slm" else {"model_type"}
        values = {k: v for k, v in source.items() if k not in derived}
        return auto.from_config(AutoConfig.for_model(kind, **{**values, **overrides}))
    if (preset := _preset(str(source), task)) is not None:
        return auto.from_config(preset.build_config(**overrides))
    if (Path(source) / "config.json").is_file():
        head = {k: overrides.pop(k) for k in _OF_THE_HEAD & set(overrides)} if task == "classification" else {}
        _check_head(source, head)
        return _untouched(auto.from_pretrained(source, **head), overrides, f"folder {str(source)!r}")
    known = {**({} if task == "masked" else PRESETS), **({} if task == "causal" else ENCODERS)}
    raise ValueError(f"{str(source)!r} is neither a preset nor a folder with a config.json. {near(str(source), known)}")


def _preset(name: str, task: str) -> Preset | None:
    if name in ENCODERS and task == "causal":
        raise ValueError(f"{name!r} is an encoder, which predicts no next token: train it with MaskedLM.")
    return PRESETS.get(name) or ENCODERS.get(name)


def _check_head(folder: Any, head: dict[str, Any]) -> None:
    """A trained head has its classes, and is not silently thrown away for one with others."""
    stored = AutoConfig.from_pretrained(folder) if "id2label" in head else None
    if stored is None or not str(stored.architectures).endswith("ForSequenceClassification']"):
        return
    if stored.num_labels != len(head["id2label"]):
        raise ValueError(
            f"folder {str(folder)!r} has a head for {stored.num_labels} classes {list(stored.id2label.values())[:8]}, "
            f"not for {len(head['id2label'])}; to start from what lies below it, give a preset or configuration, and "
            f"init_weights_from={str(folder)!r}."
        )


def _untouched(model: nn.Module, overrides: dict[str, Any], what: str) -> nn.Module:
    if overrides:
        raise ValueError(f"{what} has its weights already, so {sorted(overrides)} cannot be changed; use a preset.")
    return model
