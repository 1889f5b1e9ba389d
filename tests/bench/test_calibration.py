"""Pictures of reliability and abstention."""

from __future__ import annotations

import numpy as np
import pytest

from slm.bench.calibration import plot_abstention, plot_reliability
from slm.errors import DataError
from slm.evaluation.metrics import expected_calibration_error


def test_a_reliability_diagram_is_drawn_and_returns_the_expected_calibration_error(tmp_path):
    draw = np.random.default_rng(0)
    confidences = draw.beta(5, 1, 400).tolist()
    is_right = (draw.random(400) < 0.7).tolist()
    path = tmp_path / "deep" / "reliability.png"
    error = plot_reliability(confidences, is_right, path)
    assert error == expected_calibration_error(confidences, is_right)
    assert 0.1 < error < 0.3
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_router_that_is_always_sure_and_right_can_be_drawn(tmp_path):
    path = tmp_path / "sure.png"
    assert plot_reliability([1.0] * 50, [True] * 50, path) == 0
    assert path.stat().st_size > 5_000


@pytest.mark.parametrize("is_rate", [True, False])
def test_abstention_is_drawn_against_thresholds_or_stated_rates(tmp_path, is_rate):
    path = plot_abstention(
        [0.05, 0.001, 0.01], [0.06, 0.002, 0.012], [0.1, 0.6, 0.3], tmp_path / "a.png", is_rate=is_rate
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_rate_of_nothing_needs_no_logarithm(tmp_path):
    path = plot_abstention([0.0, 0.01], [0.0, 0.012], [1.0, 0.3], tmp_path / "a.png", is_rate=True)
    assert path.stat().st_size > 5_000


def test_values_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match=r"^a plot of abstention needs at least 1 setting, got 0: give some$"):
        plot_abstention([], [], [], path)
    message = r"^there are 2 settings but 1 values of outsiders_let_in: give one for each$"
    with pytest.raises(DataError, match=message):
        plot_abstention([0.1, 0.2], [0.1, 0.2], [0.1], path)
    assert not path.exists()
