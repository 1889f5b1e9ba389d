"""slm: a language model that keeps learning.

Importing this package loads no torch; the classes below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.answer import Answer, Explanation
    from slm.config import Config
    from slm.errors import SlmError
    from slm.model import ScalableLM
    from slm.tasks import Example, Stream, Task

__version__ = "0.1.0"
__all__ = ["Answer", "Config", "Example", "Explanation", "ScalableLM", "SlmError", "Stream", "Task"]

_HOMES = {
    "Answer": "slm.answer",
    "Config": "slm.config",
    "Example": "slm.tasks",
    "Explanation": "slm.answer",
    "ScalableLM": "slm.model",
    "SlmError": "slm.errors",
    "Stream": "slm.tasks",
    "Task": "slm.tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
