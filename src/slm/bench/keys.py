"""Pictures of key learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slm.bench.report import open_figure, save_figure
from slm.config import RetrievalConfig
from slm.errors import ConfigError
from slm.retrieval.cosine import KeyHistory


def check_key_plot(config: RetrievalConfig, path: str | Path) -> None:
    """Refuse a picture of key losses that cannot be made, before anything is learned.

    Raises:
        ConfigError: the form has keys in closed form, matplotlib is missing, or the file cannot be written.
    """
    if config.form != "cosine":
        raise ConfigError(
            f"keys of the {config.form} form are computed, not trained, so they have no loss to draw: leave "
            "--plot-keys out, or make a store with --set retrieval.form=cosine"
        )
    try:
        save_figure(open_figure(1, 1), path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be written ({' '.join(str(error).split())[:200]}): name a .png, .pdf or .svg "
            "file in a folder you may write to"
        ) from error


def plot_key_losses(histories: Mapping[str, KeyHistory], path: str | Path) -> Path:
    """Draw how the loss of each task's keys fell, one line per task.

    Args:
        histories: task -> its history.
        path: the picture, .png or another format of matplotlib.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is missing.
    """
    if not histories:
        raise ConfigError("no key history was given: pass that of at least one task")
    figure = open_figure(6.4, 4.0)
    ax = figure.subplots()
    for name, history in histories.items():
        steps = [history.steps_per_loss * (i + 1) for i in range(len(history.losses))]
        ax.plot(steps, history.losses, label=name)
    ax.set_xlabel("step of key learning")
    ax.set_ylabel("loss: − mean similarity of the kept keys")
    ax.grid(color="0.9")
    ax.legend(frameon=False)
    return save_figure(figure, path)
