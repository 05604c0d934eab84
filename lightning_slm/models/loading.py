"""One door for every kind of causal language model."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lightning_slm.errors import near
from lightning_slm.models.presets import PRESETS


def load_causal_lm(source: str | Path | dict | PreTrainedConfig | nn.Module, **overrides: Any) -> nn.Module:
    """A causal language model from whatever names one.

    Args:
        source: the name of a preset (new weights), a Hugging Face folder (its weights), a configuration or the dict
            of one (new weights; without "model_type" it is an ``SLMConfig``), or a module, which is returned as is.
        overrides: values of the configuration to replace, where the weights are new.

    Raises:
        ValueError: no such preset or folder, or overrides where weights exist already.
    """
    if isinstance(source, nn.Module):
        return _untouched(source, overrides, "a module")
    if isinstance(source, PreTrainedConfig):
        source = {**source.to_diff_dict(), "model_type": source.model_type}
    if isinstance(source, dict):
        kind = source.get("model_type", "slm")
        derived = {"model_type", "num_hidden_layers", "layer_types"} if kind == "slm" else {"model_type"}
        values = {k: v for k, v in source.items() if k not in derived}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **overrides}))
    if str(source) in PRESETS:
        return AutoModelForCausalLM.from_config(PRESETS[str(source)].build_config(**overrides))
    if (Path(source) / "config.json").is_file():
        return _untouched(AutoModelForCausalLM.from_pretrained(source), overrides, f"folder {str(source)!r}")
    raise ValueError(
        f"{str(source)!r} is neither a preset nor a folder with a config.json. {near(str(source), PRESETS)}"
    )


def _untouched(model: nn.Module, overrides: dict[str, Any], what: str) -> nn.Module:
    if overrides:
        raise ValueError(f"{what} has its weights already, so {sorted(overrides)} cannot be changed; use a preset.")
    return model
