"""Where a machine keeps what it can make again: converted weights, the compiled row kernel."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$SLM_CACHE``, else ``~/.cache/slm``."""
    return Path(os.environ.get("SLM_CACHE") or Path.home() / ".cache" / "slm")
