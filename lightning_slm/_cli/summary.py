"""``fit --help`` in a tenth of a second: the options that matter, read from the sources without importing them.

The full help of jsonargparse has every option of the Trainer; it needs Lightning, and so several seconds: --help-all.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lightning_slm._cli import packaged

PACKAGE = Path(__file__).resolve().parents[1]
_TRAINER = (
    ("max_steps", "optimizer steps to train for"),
    ("max_time", "stop after this long, DD:HH:MM:SS"),
    ("precision", "bf16-mixed on most machines; 32-true is the default"),
    ("devices, strategy", "how many devices, and ddp for several"),
    ("accumulate_grad_batches", "batches in one optimizer step"),
    ("gradient_clip_val", "largest norm of the gradient"),
    ("val_check_interval", "training batches between two validations"),
    ("limit_val_batches", "validate on so many batches only"),
    ("default_root_dir", "the run's folder: checkpoints, resolved config, logs (default: runs/NAMES OF THE CONFIGS)"),
    ("callbacks+=NAME", "append a callback; then --trainer.callbacks.ARGUMENT sets its arguments"),
)
_MINUTES = "train for about so long: as many steps as fit, timed first"
_VERBS = {
    "fit": "Train a model.",
    "validate": "Evaluate on the validation split.",
    "test": "Evaluate on the test split.",
    "predict": "Run the model over a data set.",
}


def of_training(command: str) -> str:
    """The short help of ``fit``, ``validate``, ``test`` and ``predict``."""
    overlays = ", ".join(name for name, path in packaged.recipes().items() if packaged.is_overlay(path))
    parts = [
        f"usage: lightning-slm {command} [--config NAME|FILE]... [--model.X ...] [--data.X ...] [--trainer.X ...]",
        f"\n{_VERBS[command]} Later configs and flags win over earlier ones.\n",
        _line("--config", "a packaged recipe (lightning-slm recipes list) or a YAML file; repeat to merge"),
        _line("", f"overlays that append a technique: {overlays}"),
        _line("--ckpt_path", "last: continue this run where it stopped, or start it; or a checkpoint, or a run folder"),
        *([_line("--minutes", _MINUTES)] if command == "fit" else []),
        _line("--print_config", "print the resolved configuration, and stop"),
        _line("--help-all", "every option (takes a few seconds); --model.help NAME for one class"),
        f"\nmodel: {_class_options('modules', 'CausalLM', 'model', 'MaskedLM, SequenceClassifier')}",
        f"\ndata: {_class_options('data', 'TextData', 'data', 'ClassificationData')}",
        "\ntrainer: lightning.pytorch.Trainer; the ones most used",
        *(_line(f"--trainer.{name}", text) for name, text in _TRAINER),
    ]
    return "\n".join(parts)


def _class_options(package: str, name: str, prefix: str, others: str) -> str:
    node = _find_class(package, name)
    lines = [_line(f"--{prefix}.{option}", text) for option, text in _arguments(node)]
    return "\n".join([f"{name}, or --{prefix} ANOTHER_CLASS ({others}, or your own)", *lines])


def _find_class(package: str, name: str) -> ast.ClassDef:
    for path in sorted((PACKAGE / package).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
    raise LookupError(f"{package}.{name} is not defined where it was")


def _arguments(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Name and text of each entry under ``Args:`` in the docstring of a class or of its ``__init__``."""
    init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    for owner in (init, node):
        text = ast.get_docstring(owner) or ""
        if "Args:" in text:
            section = re.split(r"\n\S", text.partition("Args:\n")[2])[0]
            for entry in re.split(r"\n(?=\S)", textwrap.dedent(section).strip()):
                option, _, meaning = entry.partition(":")
                yield option, " ".join(meaning.split())
            return


def _line(option: str, text: str) -> str:
    indent = " " * 36
    body = textwrap.fill(text, width=120, initial_indent=indent, subsequent_indent=indent)
    return f"  {option}".ljust(36) + body[36:] if len(option) < 33 else f"  {option}\n{body}"
