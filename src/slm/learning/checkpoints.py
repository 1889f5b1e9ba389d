"""The checkpoints Trainer writes: which one an interrupted training is resumed from."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where an interrupted training is resumed.

    Attributes:
        path: its folder.
        num_epochs: passes done.
        has_ended: whether the training had stopped there, early or not, and was cut short only afterwards.
    """

    path: Path
    num_epochs: int
    has_ended: bool


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in a folder; a process that was killed may have left one half written."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    steps = {path: int(number) for path, number in numbers.items() if number.isdigit()}
    found = map(_read, sorted(steps, key=lambda path: steps[path], reverse=True))
    return next((checkpoint for checkpoint in found if checkpoint is not None), None)


def _read(path: Path) -> Checkpoint | None:
    """A checkpoint; None where a file of it is cut short, or the weights it names as the best so far are."""
    others = [path / "optimizer.pt", path / "scheduler.pt", *path.glob("rng_state*.pth")]
    if len(others) < 3 or not all(map(zipfile.is_zipfile, others)):
        return None
    try:
        state = TrainerState.load_from_json(str(path / "trainer_state.json"))
        for weights in {str(path), state.best_model_checkpoint or str(path)}:
            with safe_open(Path(weights) / "model.safetensors", "pt"):
                pass
    except (OSError, TypeError, ValueError, SafetensorError):
        return None
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return Checkpoint(path, round(state.epoch or 0), bool(control.get("should_training_stop")))
