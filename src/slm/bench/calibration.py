"""Pictures of how far a decision can be trusted: reliability of its weights, and what abstention costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm.bench.report import open_figure, save_figure
from slm.errors import DataError
from slm.evaluation.metrics import expected_calibration_error, reliability_bins


def plot_reliability(
    confidences: Sequence[float], is_right: Sequence[bool], path: str | Path, num_bins: int = 15
) -> float:
    """Draw a reliability diagram: how often rows of a confidence are right, over how sure they were.

    Every dot is a bin of about equally many rows, its area in proportion to them; beneath stands where the
    confidences lie. A dot on the diagonal is calibrated, below it over-confident.

    Args:
        confidences: (B,) of each row, 0 to 1, for instance the largest weight of a decision.
        is_right: (B,) whether each row's decision is right.
        path: the picture, .png or another format of matplotlib.
        num_bins: most bins, see :func:`slm.evaluation.metrics.reliability_bins`.

    Returns:
        The expected calibration error.

    Raises:
        DataError: there are no rows, the lengths differ, or a confidence is outside 0 to 1.
        ConfigError: num_bins is below 1, or matplotlib is missing.
    """
    bins = reliability_bins(confidences, is_right, num_bins)
    error = expected_calibration_error(confidences, is_right, num_bins)
    figure = open_figure(5.2, 5.6)
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    ax.plot((0, 1), (0, 1), color="0.6", linestyle="--", linewidth=1, label="calibrated")
    sizes = [20 + 900 * m.num_rows / len(confidences) for m in bins]
    xs, ys = [m.confidence for m in bins], [m.accuracy for m in bins]
    ax.vlines(xs, xs, ys, color="tab:red", linewidth=1, label="gap")
    ax.plot(xs, ys, color="tab:blue", linewidth=1)
    ax.scatter(xs, ys, s=sizes, color="tab:blue", alpha=0.6, linewidth=0, clip_on=False)
    ax.set_title(f"expected calibration error {100 * error:.2f}%, {len(confidences)} rows", fontsize=11)
    ax.set_ylabel("share that is right")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.legend(loc="upper left", frameon=False)
    below.hist(confidences, bins=40, range=(0, 1), color="tab:blue", log=True)
    below.set_xlabel("confidence")
    below.set_ylabel("rows")
    save_figure(figure, path)
    return error


def plot_abstention(
    settings: Sequence[float],
    false_refusals: Sequence[float],
    outsiders_let_in: Sequence[float],
    path: str | Path,
    *,
    is_rate: bool = False,
) -> Path:
    """Draw both errors of abstention against what it was set to.

    Args:
        settings: thresholds of the relative distance, or, with ``is_rate``, stated false-refusal rates.
        false_refusals: share of rows of learned tasks refused at each setting, 0 to 1.
        outsiders_let_in: share of rows of no task let in at each setting, 0 to 1.
        path: the picture, .png or another format of matplotlib.
        is_rate: settings are stated rates; they get a logarithmic axis where none is 0, and a line where the
            measured rate would equal the stated one.

    Raises:
        DataError: there is nothing to draw, or the lengths differ.
        ConfigError: matplotlib is missing.
    """
    if not len(settings):
        raise DataError("a plot of abstention needs at least 1 setting, got 0: give some")
    for name, values in (("false_refusals", false_refusals), ("outsiders_let_in", outsiders_let_in)):
        if len(values) != len(settings):
            raise DataError(
                f"there are {len(settings)} settings but {len(values)} values of {name}: give one for each"
            )
    order = sorted(range(len(settings)), key=settings.__getitem__)
    xs = [settings[i] for i in order]
    figure = open_figure(6.4, 4.4)
    ax = figure.subplots()
    ax.plot(xs, [100 * false_refusals[i] for i in order], "o-", label="learned rows refused")
    ax.plot(xs, [100 * outsiders_let_in[i] for i in order], "s-", label="outsiders let in")
    if is_rate:
        ax.plot(xs, [100 * x for x in xs], color="0.6", linestyle="--", linewidth=1, label="as stated")
        if xs[0] > 0:
            ax.set_xscale("log")
    ax.set_xlabel("stated false-refusal rate" if is_rate else "threshold of the relative distance")
    ax.set_ylabel("share of rows (%)")
    ax.set_ylim(bottom=0)
    ax.grid(color="0.9")
    ax.legend(frameon=False)
    return save_figure(figure, path)
