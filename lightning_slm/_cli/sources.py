"""A trained network and its tokenizer, from whatever names them on the command line."""

import ast
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import AutoTokenizer

from lightning_slm._cli.paths import CONFIG, last_checkpoint, run_folder_of
from lightning_slm.data.tokenizer import load_tokenizer
from lightning_slm.models import load_causal_lm
from lightning_slm.modules import CausalLM
from lightning_slm.quantization import prepare_qat_

_QAT = "QuantizationAwareTraining"


class Source(NamedTuple):
    """A causal language model in evaluation mode, and what is known of it."""

    model: Any
    tokenizer: Any
    folder: Path | None = None  # where it lies, if it is an exported one
    data: dict[str, Any] | None = None  # arguments of the TextData it was trained on, if a run folder tells


def load(name: str, tokenizer: str | None = None) -> Source:
    """What a run folder, a checkpoint, a Hugging Face folder or a preset holds.

    The network of a checkpoint rounds as it did in training, if it was trained to be quantised.

    Raises: ValueError: there is no such thing, or it does not load; says what is near.
    """
    path = Path(name)
    checkpoint = path if path.suffix == ".ckpt" else last_checkpoint(path)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if checkpoint.is_file():
        module = _module_of(checkpoint)
        return Source(module.model.eval(), given or module.tokenizer, data=_data_of(run_folder_of(checkpoint)))
    folder = path if path.is_dir() else None
    return Source(load_causal_lm(name).eval(), given or _tokenizer_in(path), folder)


def _module_of(checkpoint: Path) -> CausalLM:
    """The module, prepared for quantisation as the callback's state in the checkpoint says."""
    module = CausalLM.load_from_checkpoint(checkpoint, map_location="cpu")
    callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("callbacks", {})
    for key in callbacks:
        if key.startswith(_QAT):  # a state key is the class's name and its arguments
            arguments = ast.literal_eval(key.removeprefix(_QAT))
            prepare_qat_(module, **{name: value for name, value in arguments.items() if name != "begin"})
    return module


def _data_of(run: Path | None) -> dict[str, Any] | None:
    config = yaml.safe_load((run / CONFIG).read_text())["data"] if run else {}
    return config["init_args"] if str(config.get("class_path")).endswith(".TextData") else None


def _tokenizer_in(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
