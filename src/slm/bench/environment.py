"""What a number may depend on besides the code's settings: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import slm


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, machine and commit, as a result file keeps them."""
    import torch
    import transformers

    return {
        "commit": commit(),
        "slm": slm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
    }


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of this code and whether it was changed; empty where it lies in no repository of its own."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return ""
    is_changed = bool(_git("status", "--porcelain", "--", str(Path(slm.__file__).parent)))
    return (_git("rev-parse", "HEAD") or "") + (" with changes" if is_changed else "")


def _git(*words: str) -> str | None:
    """What git answers; None where there is no git or it refuses."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
