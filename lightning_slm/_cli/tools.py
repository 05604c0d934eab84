"""The work of ``generate``, ``measure`` and ``export``."""

# Shape letters: B = batch (1 here), T = tokens of the prompt.

import json
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils.logging import disable_progress_bar

from lightning_slm._cli import UserError, sources
from lightning_slm.data import TextData
from lightning_slm.export import save_hf_folder
from lightning_slm.measure import QUANTITIES, Method, flops_per_token, measure_model
from lightning_slm.measure.report import show
from lightning_slm.models.decode import generate_stream

_BATCH = 4  # windows at a time, when quality is measured
_ALL_OF_IT = {"val_fraction": 1 - 2**-50, "test_fraction": 0.0}  # nothing trains; a document's place is < 1 - 2**-49

disable_progress_bar()


def generate(options: Namespace) -> None:
    """Print the prompt and, piece after piece, what the model makes of it."""
    source = sources.load(options.source, options.tokenizer)
    tokenizer = _tokenizer_of(source, options.source)
    prompt = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
    ids_BT = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], dtype=torch.long)
    if ids_BT.numel() == 0:
        raise UserError("the prompt is empty; give some text to continue.")
    torch.manual_seed(options.seed)
    ids = generate_stream(
        source.model,
        ids_BT,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        eos_token_id=tokenizer.eos_token_id,
        compile=options.compile,
    )
    sys.stdout.write(prompt)
    for piece in pieces(tokenizer, ids_BT[0].tolist(), ids):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def pieces(tokenizer: Any, prompt: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text that each token adds; a character of several tokens is held back until it is whole.

    Decoded together with the end of the prompt, because a tokenizer may treat the first token of a text differently.
    """
    seen = list(prompt[-8:])
    shown = tokenizer.decode(seen, skip_special_tokens=True)
    for token in ids:
        seen.append(int(token))
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text


def measure(options: Namespace) -> None:
    """Print every measure of one model."""
    source = sources.load(options.source, options.tokenizer)
    batches, bytes_per_token, about = _text(options, source)
    method = Method(
        new_tokens=options.new_tokens,
        bytes_per_token=bytes_per_token,
        export=partial(_copy, source.folder) if source.folder else save_hf_folder,
        preload=("lightning_slm.export", "lightning_slm.models"),
    )
    measured = measure_model(source.model, batches, method)
    measured.attempt(["flops_per_token"], lambda: [flops_per_token(source.model, options.window)])
    if options.json:
        print(json.dumps({"model": options.source, "text": about, **_plain(measured)}, indent=2))
        return
    table = Table("", options.source, title=None)
    for quantity in QUANTITIES:
        table.add_row(quantity.label, show(quantity, measured.values.get(quantity.key)))
    flops = measured.values.get("flops_per_token")
    table.add_row(f"FLOPs per token, context {options.window}", "n/a" if flops is None else f"{flops / 1e6:,.2f} M")
    console = Console()
    console.print(table)
    reasons = [f"not measured: {key}; {reason}" for key, reason in measured.reasons.items()]
    console.print("\n".join([f"quality: {about}", *reasons]), style="dim", highlight=False, markup=False)


def export(options: Namespace) -> None:
    """Write a Hugging Face folder; save_hf_folder loads it again and compares before it replaces anything."""
    source = sources.load(options.source, options.tokenizer)
    done = save_hf_folder(source.model, options.folder, source.tokenizer, False if options.dense else "auto")
    form = "quantised and packed" if done.quantized else "in full precision"
    print(f"{done.folder}: {done.bytes / 1e6:.2f} MB, {form}; loaded again, logits differ by {done.difference:.2g}.")


def _tokenizer_of(source: sources.Source, name: str) -> Any:
    if source.tokenizer is None:
        raise UserError(f"{name} has no tokenizer with it; give one with --tokenizer.")
    return source.tokenizer


def _text(options: Namespace, source: sources.Source) -> tuple[list[Any] | None, float | None, str]:
    """Batches to measure quality on, the bytes of their text per token, and where they are from."""
    if source.tokenizer is None:
        return None, None, "there is no tokenizer; give one with --tokenizer"
    window = min(options.window, source.model.config.max_position_embeddings)
    settings = {"path": options.data, **_ALL_OF_IT} if options.data else source.data or {}
    with tempfile.TemporaryDirectory() as folder:
        source.tokenizer.save_pretrained(folder)
        data = TextData(**{**settings, "tokenizer": folder, "window": window, "batch_size": _BATCH})
        data.setup("validate")
        batches = list(islice(data.val_dataloader(), -(-options.windows // _BATCH)))
    place = options.data or f"validation split of {data.path or 'the Python standard library'}"
    return batches, data.bytes_per_token("val"), f"{place}, windows of {window} tokens"


def _copy(folder: Path, _: nn.Module, target: Path) -> None:
    """An exported model is measured as it lies there."""
    shutil.copytree(folder, target, dirs_exist_ok=True)


def _plain(measured: Any) -> dict[str, Any]:
    return {"values": measured.values, "not_measured": measured.reasons, "setting": measured.setting}
