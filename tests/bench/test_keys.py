"""Pictures of key learning."""

from __future__ import annotations

import pytest

from slm.bench.keys import check_key_plot, plot_key_losses
from slm.config import RetrievalConfig
from slm.errors import ConfigError
from slm.retrieval.cosine import KeyHistory


def test_the_losses_of_several_tasks_are_drawn_into_one_png(tmp_path):
    histories = {"one": KeyHistory((-0.1, -0.4, -0.5), 10), "two": KeyHistory((-0.2,), 1)}
    path = plot_key_losses(histories, tmp_path / "deep" / "keys.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


def test_a_picture_that_cannot_be_made_is_refused_before_learning(tmp_path):
    with pytest.raises(ConfigError, match=r"^no key history was given: pass that of at least one task$"):
        plot_key_losses({}, tmp_path / "keys.png")
    with pytest.raises(
        ConfigError,
        match=r"^keys of the gaussian form are computed, not trained, so they have no loss to draw",
    ):
        check_key_plot(RetrievalConfig(), tmp_path / "keys.png")
    learned = RetrievalConfig(form="cosine")
    with pytest.raises(
        ConfigError, match=r"keys\.odd cannot be written \(.*\): name a \.png, \.pdf or \.svg"
    ):
        check_key_plot(learned, tmp_path / "keys.odd")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"keys\.png cannot be written \("):
        check_key_plot(learned, tmp_path / "file" / "keys.png")
    check_key_plot(learned, tmp_path / "keys.png")
