"""Learning in a process of its own: ``python -m slm.learning.job``.

One JSON object on standard input says what to learn; one JSON object a line on standard output says how far
it is ({"step", "num_steps"}), what came of it ({"report"}) or why nothing did ({"error"}).

    store            folder of the store
    name             of the task
    file             its examples; kind, seed, num_epochs and is_truncating as ``slm learn`` takes them
    adapter          folder of a PEFT adapter to take over instead of training; labels of its head
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from slm.errors import SlmError


def main() -> int:
    """Learn what standard input says; 0 when it was committed."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # whoever serves from the same machine comes first
    try:
        report = learn(json.loads(sys.stdin.readline()))
    except SlmError as error:
        _tell(error=" ".join(str(error).split()))
        return 1
    except Exception as error:
        _tell(error=f"learning failed ({type(error).__name__}): try again, or learn on the command line")
        raise
    _tell(report=report)
    return 0


def learn(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Teach the task that a specification names.

    Raises:
        SlmError: nothing was stored; the message says why.
    """
    from pathlib import Path

    from slm.learning.adopt import import_adapter
    from slm.learning.learner import learn_task
    from slm.model import ScalableLM
    from slm.tasks import load_task

    seed = spec.get("seed") or 0
    task = load_task(spec["name"], spec["file"], kind=spec.get("kind"), seed=seed)
    model = ScalableLM.open(spec["store"])
    if spec.get("adapter"):
        return import_adapter(
            model,
            Path(spec["adapter"]),
            task,
            labels=spec.get("labels") or (),
            is_truncating=bool(spec.get("is_truncating")),
        ).as_dict()
    names = ("seed", "num_epochs", "is_truncating")
    settings = {name: spec[name] for name in names if spec.get(name) is not None}
    with model.backbone.lock:
        learned = learn_task(model, task, on_step=_tell_step, has_progress=False, **settings)
    return learned.as_dict()


def _tell_step(step: int, num_steps: int) -> None:
    _tell(step=step, num_steps=num_steps)


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
