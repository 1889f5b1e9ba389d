"""slm as it comes: gaussian retrieval, increments per row, abstention."""

from __future__ import annotations

from slm.bench.baselines.isolated import IsolatedRival


class SlmDefault(IsolatedRival):
    """The library's defaults, with the cell's window, rank and training."""

    name = "slm"
    title = "slm"
