"""Routes that show: classifications, retrievals, models, limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from slm.errors import StoreError
from slm.knowledge import Knowledge
from slm.serving.answering import Desk
from slm.serving.answers import Classifications, Limits, ModelCard, ModelList, Retrievals, new_id, now
from slm.serving.completions import headers_of, knowing, usage_of
from slm.serving.schema import InputRequest
from slm.serving.work import AUTO, Wish

_AT_ONCE = 32  # texts whose queries are read between two steps


def inspection_router(desk: Desk) -> APIRouter:
    """All four."""
    router = APIRouter(prefix="/v1", tags=["inspection"])
    started = now()

    @router.post("/classifications", response_model=Classifications)
    async def classify(request: Request, body: InputRequest) -> Response:
        """Labels with their probabilities, over all tasks or, with a task's model, over its own."""
        listeners = await desk.submit(body.texts, body.model, Wish(), "input", is_labelling=True)
        data: list[dict[str, Any]] = []
        told, all_ends = [], []
        try:
            for index, listener in enumerate(listeners):
                decided, _, ends = await desk.collect(request, listener)
                labels = [{"label": label, "probability": share} for label, share in ends[0].labels]
                best = labels[0]["label"] if labels else None
                known = knowing(decided, ends[0])
                data.append({"index": index, "label": best, "probabilities": labels, "slm": known})
                told.append(decided)
                all_ends += ends
        finally:
            for listener in listeners:
                listener.cancel()
        head = {"id": new_id("clf"), "object": "list", "created": now(), "model": body.model}
        usage = usage_of(told, []) | {"completion_tokens": 0}
        return JSONResponse(head | {"data": data, "usage": usage}, headers=headers_of(told[0]))

    @router.post("/retrievals", response_model=Retrievals)
    async def retrieve(body: InputRequest) -> Response:
        """What DTKR decides for each text, and why: the nearest keys, their distances and weights."""
        await desk.check(body.texts, "input")
        known = desk.engine.knowledge
        try:
            found = await _explain_all(desk, known, body.texts)
        except StoreError:  # another process has forgotten a task meanwhile
            newer = await asyncio.to_thread(desk.engine.newer_than, known)
            if newer is None:
                raise
            known = newer
            found = await _explain_all(desk, known, body.texts)
        data = [{"index": index, **one} for index, one in enumerate(found)]
        return JSONResponse({"object": "list", "store_version": known.version, "data": data})

    @router.get("/models", response_model=ModelList)
    async def models() -> Any:
        """``auto``, the backbone without knowledge, and one model per task."""
        names = [record.name for record in desk.engine.knowledge.records]
        ids = [AUTO, desk.name, *(f"{desk.name}:{name}" for name in names), *desk.engine.adapters]
        return ModelList(data=[ModelCard(id=name, created=started) for name in ids])

    @router.get("/models/{model:path}", response_model=ModelCard)
    async def model(model: str) -> Any:
        """One model."""
        desk.resolve(model)
        return ModelCard(id=model, created=started)

    @router.get("/limits", response_model=Limits)
    async def limits() -> Any:
        """The longest answer that may be asked for, and whether tasks may be taught and forgotten."""
        return Limits(max_tokens=desk.longest_answer, is_teaching=desk.settings.is_teaching)

    return router


async def _explain_all(desk: Desk, known: Knowledge, texts: Sequence[str]) -> list[dict[str, Any]]:
    parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
    found = await desk.call([partial(_explain, desk, known, part) for part in parts])
    return [one for part in found for one in part]


def _explain(desk: Desk, known: Knowledge, texts: Sequence[str]) -> list[dict[str, Any]]:
    if known.retriever is None:
        return [{"is_abstained": True, "is_contested": False, "candidates": []} for _ in texts]
    retrieved = desk.engine.model.decide(known.retriever, texts)
    thresholds = retrieved.thresholds.tolist()
    limits = known.retriever.scorer.thresholds(retrieved.candidates)
    limits[:, 0] = retrieved.thresholds  # the winner's, after the runoff
    found = []
    for row in range(len(texts)):
        candidates = []
        for column, key in enumerate(retrieved.candidates[row].tolist()):
            record = known.records[int(retrieved.owners[key])]
            kept = column < retrieved.weights.shape[1]
            limit = float(limits[row, column])
            candidates.append(
                {
                    "task": record.name,
                    "weight": float(retrieved.weights[row, column]) if kept else 0.0,
                    "probability": float(retrieved.posterior[row, column]),
                    "distance": _finite(float(retrieved.distances[row, column])),
                    "threshold": limit if math.isfinite(limit) and math.isfinite(thresholds[row]) else None,
                    "key": key,
                }
            )
        found.append(
            {
                "is_abstained": bool(retrieved.is_abstained[row]),
                "is_contested": bool(retrieved.is_contested[row]),
                "candidates": candidates,
            }
        )
    return found


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
