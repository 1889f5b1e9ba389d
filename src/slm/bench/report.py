"""Pictures of a run: accuracy matrices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.errors import ConfigError

Scores = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One accuracy matrix.

    Attributes:
        title: what learned it.
        tasks: names in learning order.
        scores: a[i][j], in 0..1; None where nothing was measured.
    """

    title: str
    tasks: Sequence[str]
    scores: Scores


def plot_matrices(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draw accuracy matrices side by side, one colour scale, each cell with its score in percent.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is missing.
    """
    if not panels:
        raise ConfigError("no accuracy matrix was given: pass at least one panel")
    size = max(len(panel.tasks) for panel in panels)
    figure = open_figure(len(panels) * (1.7 + 0.85 * size), 1.6 + 0.62 * size)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    image: Any = None
    for ax, panel in zip(axes, panels, strict=True):
        values = [_percent(row, len(panel.tasks)) for row in panel.scores]
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:
                    colour = "black" if value > 60 else "white"
                    ax.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
        ax.set_title(panel.title, fontsize=11)
        ax.set_xticks(range(len(panel.tasks)), panel.tasks, rotation=30, ha="right")
        ax.set_yticks(range(len(panel.tasks)), [f"after {name}" for name in panel.tasks])
        ax.set_xlabel("score on the test rows of")
    figure.colorbar(image, ax=list(axes), label="score (%)", shrink=0.85)
    return save_figure(figure, path)


def open_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches, drawn without a screen.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'scalable-lm[bench]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure, making the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _percent(row: Sequence[float | None], width: int) -> list[float]:
    """A row of the matrix in percent, NaN where nothing was measured."""
    values = [float("nan") if value is None else 100 * value for value in row]
    return values + [float("nan")] * (width - len(values))
