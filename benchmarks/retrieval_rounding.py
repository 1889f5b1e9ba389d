"""What ``retrieval.py`` measures of rounding: decisions of rows read together against the same rows alone."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from retrieval_routing import keys_of
from tqdm import tqdm

from slm import Config, ScalableLM, Stream
from slm.config import BackboneConfig, RetrievalConfig
from slm.retrieval.background import Background
from slm.retrieval.keys import TaskKeys
from slm.retrieval.retriever import Retrieved, Retriever

BATCH_SIZE = 16
NEAR = 10
"""A row counts as near a tie or a threshold within so many times the rounding that is allowed for."""


def rounding(stream: Stream, backbone: str, form: str) -> dict[str, Any]:
    """How far company moves decisions of a backbone in its usual precision, and how many it changes.

    Args:
        stream: tasks with training and test rows.
        backbone: its alias.
        form: of retrieval; keys of the cosine form are the means of the tasks.
    """
    config = Config(backbone=BackboneConfig(max_tokens=128))
    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(Path(folder) / "store", backbone, config)
        trained = [
            model.queries([e.prompt for e in task.examples], is_truncating=True)
            for task in tqdm(stream, desc=f"reading {backbone}", unit="task")
        ]
        prompts = [e.prompt for task in stream for e in task.test]
        random.Random(0).shuffle(prompts)
        rows = model._rows(prompts, is_truncating=True)
        alone = torch.cat(
            [model.extractor([p], [r]) for p, r in zip(tqdm(prompts, "alone"), rows, strict=True)]
        )
        parts = [slice(start, start + BATCH_SIZE) for start in range(0, len(rows), BATCH_SIZE)]
        together = [model.extractor(prompts[part], rows[part]) for part in parts]
        epsilon = torch.finfo(model.backbone.dtype).eps
        retriever = _retriever(trained, model.store.background, form, epsilon)
        reread: list[int] = []

        def read_again(start: int, row: int) -> torch.Tensor:
            reread.append(start + row)
            return alone[start + row]

        expected, swayed = retriever(alone), retriever(torch.cat(together))
        mended = [
            retriever(queries, lambda row, part=part: read_again(part.start, row))
            for part, queries in zip(parts, together, strict=True)
        ]
    margins, limits = (_margins(found, expected) for found in (expected, swayed)), retriever._rounding * NEAR
    moved = []
    for before, after in zip(*margins, strict=True):
        near = before.abs() < limits
        moved.append(float((before - after).abs()[near].max()) / epsilon if near.any() else 0.0)
    routes = torch.cat([_routes(found) for found in mended])
    return {
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "rows": len(rows),
        "largest change of a near tie": moved[0],
        "largest change near a threshold": moved[1],
        "allowed": retriever.scorer.rounding,
        "changed": int((_routes(swayed) != _routes(expected)).sum()),
        "changed where reread": int((routes != _routes(expected)).sum()),
        "reread": len(reread) / len(rows),
    }


def _retriever(
    trained: list[torch.Tensor], background: Background | None, form: str, epsilon: float
) -> Retriever:
    keys = [keys_of(queries) for queries in trained]
    total = sum((k.scatter.double() for k in keys), torch.zeros(1, dtype=torch.float64))
    if form == "gaussian":
        return Retriever(keys, total, RetrievalConfig(), background=background, epsilon=epsilon)
    config = RetrievalConfig(form="cosine", is_abstaining=False)
    return Retriever([_cosine_keys(k) for k in keys], total, config, epsilon=epsilon)


def _cosine_keys(keys: TaskKeys) -> TaskKeys:
    own = {name: getattr(keys, name) for name in keys.__dataclass_fields__}
    return TaskKeys(**{**own, "scales": torch.linspace(0, 2, 33, dtype=torch.float64)})


def _margins(found: Retrieved, of: Retrieved) -> tuple[torch.Tensor, torch.Tensor]:
    """How much nearer the first key found of each row is than the second, and than its threshold."""
    first, second = (_distance(found, of.candidates[:, place]) for place in (0, 1))
    return second - first, of.thresholds - first


def _distance(found: Retrieved, keys: torch.Tensor) -> torch.Tensor:
    return found.distances[found.candidates == keys[:, None]]


def _routes(found: Retrieved) -> torch.Tensor:
    """(B,) the nearest task of each row, −1 where it abstains."""
    return torch.where(found.is_abstained, -1, found.owners[found.nearest])
