"""Before and after, side by side: as a table on the terminal, as JSON, as Markdown and as a picture."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_slm.measure.environment import describe, hardware, versions
from lightning_slm.measure.measured import QUANTITIES, RATIO, Measured, Method, Quantity, measure_model


@dataclass(frozen=True, slots=True)
class Report:
    """Two models measured in the same way.

    Args:
        before: the dense model.
        after: the compressed one, as it comes back from its exported form.
        about: where the models and the text are from; plain values, one line each at the foot of the report.
    """

    before: Measured
    after: Measured
    about: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str | int] = field(default_factory=hardware)
    versions: Mapping[str, str] = field(default_factory=versions)

    def rows(self) -> Iterator[tuple[Quantity, float | None, float | None]]:
        """Each quantity with its two values; None where it could not be measured."""
        for quantity in QUANTITIES:
            yield quantity, self.before.values.get(quantity.key), self.after.values.get(quantity.key)
        ratio = self.change("file_bytes")
        yield RATIO, ratio and 1.0, ratio and 1 / ratio

    def change(self, key: str) -> float | None:
        """After / before; None where one of them is missing or zero."""
        before, after = self.before.values.get(key), self.after.values.get(key)
        return after / before if before and after else None

    def headline(self) -> str:
        """What a reader wants to know first."""
        key = "bits_per_byte" if self.change("bits_per_byte") else "perplexity"
        size, quality = self.change("file_bytes"), self.change(key)
        parts = [f"{1 / size:.2f}x smaller file" if size < 1 else f"{size:.2f}x the file"] if size else []
        parts += [f"{quality:.3f}x the {key.replace('_', ' ')}"] if quality else []
        return ", ".join(parts) or "before and after"

    def notes(self) -> list[str]:
        """Under which circumstances the numbers hold, and why some are missing: a line each."""
        about = [f"{key}: {value}" for key, value in {**self.about, **_circumstances(self.after)}.items()]
        machine = f"hardware: {describe(self.hardware)}"
        packages = f"versions: {', '.join(f'{k} {v}' for k, v in self.versions.items())}"
        missing = {**self.after.reasons, **self.before.reasons}
        gaps = [f"not measured: {_label(key)}; {reason}" for key, reason in missing.items()]
        return [
            *about,
            *_differences(self.before.setting, self.after.setting),
            "MB: a million bytes",
            machine,
            packages,
            *gaps,
        ]

    def table(self) -> Table:
        """For rich's ``print``."""
        table = Table("", title="Compression report")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for quantity, before, after in self.rows():
            table.add_row(quantity.label, *cells(quantity, before, after))
        return table

    def print(self) -> None:
        """The table on the terminal, and the notes below it."""
        console = Console()
        console.print(self.table())
        console.print(self.headline(), style="bold", highlight=False)
        console.print("\n".join(self.notes()), style="dim", highlight=False, markup=False)

    def to_markdown(self) -> str:
        """The content of report.md."""
        lines = [f"# Compression report: {self.headline()}", "", "| | before | after | change |", "|---|--:|--:|--:|"]
        lines += [f"| {' | '.join([q.label, *cells(q, before, after)])} |" for q, before, after in self.rows()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes()), ""])

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: every number with its unit, and under which circumstances it holds."""
        rows = {
            q.key: {"label": q.label, "unit": q.unit, "better": q.better, "before": before, "after": after}
            for q, before, after in self.rows()
        }
        return {
            "headline": self.headline(),
            "rows": rows,
            "not_measured": {"before": self.before.reasons, "after": self.after.reasons},
            "setting": {"before": self.before.setting, "after": self.after.setting},
            "about": dict(self.about),
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
        }

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.md and report.png into ``folder``; each appears whole or not at all."""
        from lightning_slm.measure.plot import draw  # matplotlib takes a second to import

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.json", (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        _write(folder / "report.md", self.to_markdown().encode())
        _write(folder / "report.png", draw(self))
        return folder


def compare(
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Any] | None = None,
    method: Method | None = None,
    about: Mapping[str, str] | None = None,
) -> Report:
    """Measure two models in the same way.

    Args:
        before: the dense one.
        after: the compressed one.
        batches: what perplexity is measured on, see `summed_nats`; None: no quality.
        method: how; None: the defaults.
        about: what the reader shall know beside it: data set, split, where the models are from.
    """
    return Report(measure_model(before, batches, method), measure_model(after, batches, method), about or {})


def show(quantity: Quantity, value: float | None) -> str:
    """A value for a person.

    >>> show(RATIO, 5.26), show(QUANTITIES[5], 20_912_345), show(QUANTITIES[3], 0.5), show(RATIO, None)
    ('5.26x', '20.9 MB', '50.0 %', 'n/a')
    """
    if value is None:
        return "n/a"
    match quantity.unit:
        case "byte":
            return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e6:.3f} MB"
        case "second":
            return f"{value * 1e3:,.1f} ms"
        case "fraction":
            return f"{value:.1%}".replace("%", " %")
        case "times":
            return f"{value:.2f}x"
        case "count":
            return f"{value:,.0f}"
        case "token/second":
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        case "exp(nat/token)":
            return f"{value:,.2f}"
    return f"{value:.3f}"


def cells(quantity: Quantity, before: float | None, after: float | None) -> list[str]:
    """Before, after and change for a person; the change is empty where a factor would mean nothing."""
    plain = quantity.unit in ("fraction", "times") or not before or not after
    change = "" if plain else f"{after / before:.3f}x"  # type: ignore[operator]
    return [show(quantity, before), show(quantity, after), change]


def _label(key: str) -> str:
    return next(q.label for q in QUANTITIES if q.key == key)


def _circumstances(measured: Measured) -> dict[str, str]:
    notes, setting = {}, measured.setting
    if "windows" in setting:
        notes["quality"] = (
            f"{setting['windows']} windows of {setting['window']} tokens that do not overlap, "
            f"{setting['predicted_tokens']} predicted tokens"
        )
        if "bytes_per_token" in setting:
            notes["quality"] += f", {setting['bytes_per_token']:.4f} bytes per token"
    if "tokens_per_second" in measured.values:
        notes["speed"] = (
            f"greedy decoding of {setting['new_tokens']} tokens after a prompt of {setting['prompt_tokens']}, batch 1, "
            f"median of {setting['runs']} runs after a warm-up, on {setting['device']}"
        )
    if "memory_baseline_bytes" in setting:
        baseline = f"{setting['memory_baseline_bytes'] / 1e6:.0f} MB"
        notes["peak memory"] = f"of {setting['memory']}, beyond the {baseline} in use before the model was loaded"
    return notes


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Whatever would make the comparison unfair."""
    keys = (
        "windows",
        "window",
        "predicted_tokens",
        "bytes_per_token",
        "prompt_tokens",
        "new_tokens",
        "device",
        "dtype",
    )
    both = [key for key in keys if key in before and key in after]
    return [f"not alike: {key} {before[key]} before, {after[key]} after" for key in both if before[key] != after[key]]


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
