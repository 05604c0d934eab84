"""The report as a picture: one small panel a quantity, before above after, each on a scale of its own from zero."""

import io
import textwrap
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_slm.measure.measured import Quantity

if TYPE_CHECKING:
    from lightning_slm.measure.report import Report

BEFORE, AFTER, INK, QUIET = "#b8c0cc", "#2f6fde", "#1c2430", "#687385"
# Four panels a row, each group below its name at (row, column). What only repeats another bar is left to the table.
PLACES = {"Quality": (0, 0), "Speed": (0, 2), "Size": (1, 0)}
LEFT_OUT = ("parameters", "compression_ratio")
_WIDTH, _HEAD, _ROW, _LINE, _MARGIN, _DPI = 11.0, 1.2, 1.6, 0.17, 0.04, 150  # inches; margin: of the width


def draw(report: "Report") -> bytes:
    """A PNG. Quantities that could not be measured are left out; the foot says why."""
    foot = [line for note in report.notes() for line in textwrap.wrap(note, 165, subsequent_indent="    ")]
    height = _HEAD + 2 * _ROW + _LINE * len(foot) + 0.3
    # Figure without pyplot: no global state, no window system, and no backend of the user's is touched.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    _head(figure, report.headline(), height)
    for group, (row, column) in PLACES.items():
        _group(figure, report, group, _HEAD + row * _ROW, column, height)
    figure.text(_MARGIN, 0.2 / height, "\n".join(foot), fontsize=7.5, color=QUIET, va="bottom", linespacing=1.4)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _group(figure: Figure, report: "Report", group: str, top: float, column: int, height: float) -> None:
    from lightning_slm.measure.report import cells

    rows = [r for r in report.rows() if r[0].group == group and r[0].key not in LEFT_OUT and None not in r[1:]]
    step = (1 - 2 * _MARGIN) / 4
    for i, (quantity, before, after) in enumerate(rows):
        x = _MARGIN + step * (column + i)
        if i == 0:
            figure.text(x, 1 - top / height, group.upper(), fontsize=9, fontweight="bold", color=QUIET, va="top")
        axes = figure.add_axes((x, 1 - (top + 1.24) / height, step * 0.9, 0.6 / height))
        first, second, change = cells(quantity, before, after)
        _panel(axes, quantity, (before or 0.0, after or 0.0), (first, f"{second}  ({change})" if change else second))


def _head(figure: Figure, headline: str, height: float) -> None:
    figure.text(_MARGIN, 1 - 0.28 / height, headline, fontsize=18, fontweight="bold", color=INK, va="top")
    for x, color, name in ((0, BEFORE, "before"), (0.08, AFTER, "after")):
        figure.text(_MARGIN + x, 1 - 0.84 / height, "\N{BLACK SQUARE}", fontsize=14, color=color, va="center_baseline")
        figure.text(_MARGIN + x + 0.017, 1 - 0.84 / height, name, fontsize=10, color=INK, va="center_baseline")


def _panel(axes: Axes, quantity: Quantity, values: tuple[float, float], labels: tuple[str, str]) -> None:
    largest = max(values) or 1.0
    axes.barh([1, 0], values, height=0.84, color=[BEFORE, AFTER])
    # The right part of the panel stays free for the labels at the bars' ends.
    axes.set_xlim(0, largest * 2.1)
    axes.set_ylim(-0.5, 1.5)
    for y, value, label in zip((1, 0), values, labels):
        axes.text(value + largest * 0.04, y, label, fontsize=9.5, color=INK, va="center_baseline")
    axes.text(0, 1.32, quantity.label, transform=axes.transAxes, fontsize=11, color=INK, va="bottom")
    axes.text(0, 1.07, f"{quantity.better} is better", transform=axes.transAxes, fontsize=7.5, color=QUIET, va="bottom")
    axes.set_axis_off()
    axes.axvline(0, color=QUIET, linewidth=0.8)
