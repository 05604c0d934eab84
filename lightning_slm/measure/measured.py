"""All measures of one model: what is measured, in which unit, and how."""

# Shape letters: B = batch (1 here), T = tokens of the prompt.

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lightning_slm.measure.memory import peak_memory
from lightning_slm.measure.quality import evaluating, summed_nats
from lightning_slm.measure.size import count_parameters, file_bytes, sparsity, weight_bytes
from lightning_slm.measure.speed import greedy_stream, latency
from lightning_slm.nn.targets import Patterns

Export = Callable[[nn.Module, Path], object]  # writes a model into a folder
Load = Callable[[Path], nn.Module]  # the model in such a folder
Stream = Callable[[nn.Module, Tensor, int], Iterable[object]]  # (model, prompt_BT, new tokens) -> token after token


@dataclass(frozen=True, slots=True)
class Quantity:
    """One row of a report."""

    key: str
    label: str
    group: Literal["Quality", "Size", "Speed"]
    unit: str  # of the number in report.json
    better: Literal["lower", "higher", ""]


QUANTITIES = (
    Quantity("bits_per_byte", "bits per byte", "Quality", "bit/byte", "lower"),
    Quantity("perplexity", "perplexity", "Quality", "exp(nat/token)", "lower"),
    Quantity("parameters", "parameters", "Size", "count", "lower"),
    Quantity("sparsity", "sparsity", "Size", "fraction", "higher"),
    Quantity("weight_bytes", "weights in memory", "Size", "byte", "lower"),
    Quantity("file_bytes", "exported file", "Size", "byte", "lower"),
    Quantity("peak_memory_bytes", "peak memory", "Size", "byte", "lower"),
    Quantity("first_token_seconds", "time to first token", "Speed", "second", "lower"),
    Quantity("tokens_per_second", "tokens per second", "Speed", "token/second", "higher"),
)
# Follows from the others.
RATIO = Quantity("compression_ratio", "compression ratio", "Size", "times", "higher")


@dataclass(frozen=True, slots=True)
class Method:
    """How models are measured, the same for both sides of a comparison.

    Args:
        prompt_tokens: length of the prompt when decoding is timed.
        new_tokens: tokens decoded after it, greedily; at least 2.
        runs: timed generations; medians are reported.
        targets: name patterns of the weights whose sparsity is counted.
        skip: patterns to leave out again.
        bytes_per_token: bytes of the evaluated text per token; None: no bits per byte.
        export: writes a model into a folder; None: its own ``save_pretrained``.
        load: brings it back from there; an importable function, since a fresh process calls it too.
        stream: decodes token by token; importable likewise.
        preload: modules that the fresh process shall import before its baseline of memory is taken, beside those of
            the model and of ``export``.
    """

    prompt_tokens: int = 32
    new_tokens: int = 64
    runs: int = 5
    targets: Patterns = "*"
    skip: Patterns = ()
    bytes_per_token: float | None = None
    export: Export | None = None
    load: Load | None = None
    stream: Stream = greedy_stream
    preload: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one model, by `Quantity.key`; what could not be, with the reason; and the circumstances."""

    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)

    def attempt(self, keys: Sequence[str], measure: Callable[[], Sequence[float]]) -> None:
        """Fill in some values; a failure becomes their reason, since a report must not end a day of training."""
        try:
            self.values.update(zip(keys, measure()))
        except Exception as error:
            self.reasons.update(dict.fromkeys(keys, f"{type(error).__name__}: {str(error).strip()[:300]}"))


def measure_model(
    model: nn.Module, batches: Sequence[Any] | None = None, method: Method | None = None, device: Any = None
) -> Measured:
    """Every `Quantity` of ``model``; quality, speed and memory of what comes back after it was exported.

    A model that cannot be exported (no ``save_pretrained``) is measured as it stands, and its files are left out.
    ``model`` itself is not changed.

    Args:
        model: a causal language model; the more it can do (logits, generation, saving), the more is measured.
        batches: what perplexity is measured on, see `summed_nats`; None: no quality.
        method: how; None: the defaults.
        device: where to run; None: where the model is.
    """
    method, measured, home = method or Method(), Measured(), next(model.parameters()).device
    device = torch.device(device or home)
    measured.attempt(["parameters"], lambda: [count_parameters(model).total])
    measured.attempt(["sparsity"], lambda: [sparsity(model, method.targets, method.skip)])
    with tempfile.TemporaryDirectory() as folder, _without_progress_bars():
        artefact = _exported(model, Path(folder), method, measured).to(device)
        measured.attempt(["weight_bytes"], lambda: [weight_bytes(artefact)])
        _measure_quality(artefact, batches, method, measured)
        prompt_BT = _prompt(artefact, batches, method.prompt_tokens).to(device)
        _measure_speed(artefact, prompt_BT, method, measured)
        _measure_memory(artefact, Path(folder), prompt_BT, method, measured)
    model.to(home)  # where it could not be exported, it was measured itself
    measured.setting.update(_setting(model, method, device))
    return measured


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Transformers' bars over the loading of weights would stand between the lines of the training's own."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def load_hf_folder(folder: Path) -> nn.Module:
    """The causal language model in a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def generate_from_folder(
    load: Load, stream: Stream, folder: Path, prompt: list[list[int]], new_tokens: int, device: str
) -> None:
    """Load a model and let it speak: what a fresh process does while its memory is watched."""
    model = load(folder).to(device).eval()
    for _ in stream(model, torch.tensor(prompt, device=device), new_tokens):
        pass


def _exported(model: nn.Module, folder: Path, method: Method, measured: Measured) -> nn.Module:
    """The model as it comes back from ``folder``; where that is impossible the model itself, and the reason is kept."""
    if method.export is None and not hasattr(model, "save_pretrained"):
        reason = f"{type(model).__name__} cannot be exported: it has no save_pretrained"
        measured.reasons.update(file_bytes=reason, peak_memory_bytes=reason)
        return model
    try:
        (method.export or _save_pretrained)(model, folder)
        artefact = (method.load or load_hf_folder)(folder)
    except Exception as error:
        reason = f"the export failed: {type(error).__name__}: {str(error).strip()[:300]}"
        measured.reasons.update(file_bytes=reason, peak_memory_bytes=reason)
        return model
    measured.values["file_bytes"] = file_bytes(folder)
    return artefact


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _setting(model: nn.Module, method: Method, device: torch.device) -> dict[str, Any]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    names = ("prompt_tokens", "new_tokens", "runs", "targets", "skip")
    return {"device": str(device), "dtype": dtype, **{name: getattr(method, name) for name in names}}


def _measure_quality(model: nn.Module, batches: Sequence[Any] | None, method: Method, measured: Measured) -> None:
    if not batches:
        measured.reasons.update(dict.fromkeys(("bits_per_byte", "perplexity"), "there are no batches to evaluate on"))
        return

    def evaluate() -> list[float]:
        nats = summed_nats(model, batches)
        measured.setting.update(windows=nats.windows, window=nats.window, predicted_tokens=nats.tokens)
        if method.bytes_per_token is None:
            measured.reasons["bits_per_byte"] = "bytes per token of the evaluated text are not known"
        else:
            measured.values["bits_per_byte"] = nats.bits_per_byte(method.bytes_per_token)
            measured.setting["bytes_per_token"] = method.bytes_per_token
        return [nats.perplexity]

    measured.attempt(["perplexity"], evaluate)
    if reason := measured.reasons.get("perplexity"):
        measured.reasons["bits_per_byte"] = reason


def _prompt(model: nn.Module, batches: Sequence[Any] | None, tokens: int) -> Tensor:
    """The first tokens of the first batch; without one, the first ids of the vocabulary."""
    first = batches[0] if batches else None
    if isinstance(first, (dict, tuple, list)):
        first = first.get("input_ids") if isinstance(first, dict) else first[0]
    if isinstance(first, Tensor) and first.ndim == 2:
        return first[:1, :tokens]
    return torch.arange(tokens)[None] % getattr(getattr(model, "config", None), "vocab_size", tokens)


def _measure_speed(model: nn.Module, prompt_BT: Tensor, method: Method, measured: Measured) -> None:
    def decode() -> list[float]:
        timed = latency(lambda: method.stream(model, prompt_BT, method.new_tokens), method.runs)
        return [timed.first_token, timed.tokens_per_second]

    with evaluating(model):
        measured.attempt(["first_token_seconds", "tokens_per_second"], decode)


def _measure_memory(model: nn.Module, folder: Path, prompt_BT: Tensor, method: Method, measured: Measured) -> None:
    if "peak_memory_bytes" in measured.reasons:
        return
    load, device = method.load or load_hf_folder, str(prompt_BT.device)
    arguments = (load, method.stream, folder, prompt_BT.tolist(), method.new_tokens, device)
    # What loading would import on its way is no memory of the model's.
    preload = [*method.preload, "transformers.models.auto.modeling_auto", type(model).__module__, _home(method.export)]

    def watch() -> list[float]:
        memory = peak_memory(generate_from_folder, *arguments, preload=preload, device=device)
        kind = "a fresh process (resident set)" if device == "cpu" else "PyTorch's allocator"
        measured.setting.update(memory_baseline_bytes=memory.baseline, memory=kind)
        return [memory.bytes]

    measured.attempt(["peak_memory_bytes"], watch)


def _home(export: Any) -> str:
    """The module of a function, or of what a ``functools.partial`` calls: it may register what loading needs."""
    return getattr(getattr(export, "func", export), "__module__", None) or __name__
