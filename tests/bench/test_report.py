"""Plots."""

from __future__ import annotations

import pytest

from slm.bench.report import Panel, plot_matrices
from slm.errors import ConfigError


def test_matrices_of_different_sizes_are_drawn_into_one_png(tmp_path):
    panels = [
        Panel("one", ("a", "b"), ((0.5, None), (0.25, 1.0))),
        Panel("two", ("a", "b", "c"), ((0.1,), (0.2, 0.3), (0.4, 0.5, 0.6))),
    ]
    path = plot_matrices(panels, tmp_path / "deep" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^no accuracy matrix was given: pass at least one panel$"):
        plot_matrices([], tmp_path / "plot.png")
