"""Drawing up what the page shows of a store, once per version of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, final

from torch import Tensor

from slm.errors import StoreError
from slm.knowledge import Knowledge
from slm.retrieval.chart import ELLIPSE_SHARE, Chart
from slm.retrieval.implied import implied_confusion
from slm.retrieval.plane import Polygon
from slm.serving.map_schema import (
    Confusion,
    Evaluations,
    KnowledgeMap,
    MapKey,
    MapPoint,
    MapPoints,
    MapRegion,
    Place,
    TaskEvaluation,
)

MOST_MEASURED_TASKS = 64
"""Tasks up to which ellipses and implied confusion are computed: both read a few megabytes of every task."""
MOST_MEASURED_KEYS = 256
"""Keys up to which implied confusion is computed: it compares rows drawn around every key with all keys."""
ABSTAINED = "no task"
"""The column of refused rows."""

_T = TypeVar("_T")


@final
class Surveyor:
    """Maps and evaluations of one store; what is computed is kept until the store's version changes.

    All methods are coroutines: the work runs in one thread, once, however many clients wait for it.

    Args:
        knowledge: gives the snapshot that requests are answered from now.
        queries: queries of some texts, (B, C).
        metric: what a validation score of this backbone is.
        newer_than: gives the store as it is now where a snapshot is not the newest, else None.
    """

    def __init__(
        self,
        knowledge: Callable[[], Knowledge],
        queries: Callable[[Sequence[str]], Tensor],
        metric: str,
        newer_than: Callable[[Knowledge], Knowledge | None] = lambda _: None,
    ) -> None:
        self._knowledge, self._queries, self._metric = knowledge, queries, metric
        self._newer_than = newer_than
        self._kept: dict[str, tuple[int, asyncio.Task[Any]]] = {}

    async def map(self) -> KnowledgeMap:
        """Keys, regions and ellipses."""

        async def draw(known: Knowledge) -> KnowledgeMap:
            chart = await self._chart(known)
            return await self._once("map", known.version, lambda: _draw(known, chart))

        return await self._of_the_store(draw)

    async def points(self, texts: Sequence[str]) -> MapPoints:
        """Where texts lie on the map.

        Raises:
            DataError: a text is empty or too long for the backbone.
        """

        async def place(known: Knowledge) -> MapPoints:
            chart = await self._chart(known)
            if chart is None:
                return MapPoints(store_version=known.version, data=[])
            return await asyncio.to_thread(_place, known, chart, texts, self._queries)

        return await self._of_the_store(place)

    async def evaluations(self) -> Evaluations:
        """Validation scores and the confusion that the keys imply."""

        async def evaluate(known: Knowledge) -> Evaluations:
            return await self._once("evaluations", known.version, lambda: _evaluate(known, self._metric))

        return await self._of_the_store(evaluate)

    async def _of_the_store(self, draw: Callable[[Knowledge], Awaitable[_T]]) -> _T:
        """Draw from the snapshot in use, or from a newer one where another process has forgotten a task."""
        known = await asyncio.to_thread(self._knowledge)
        try:
            return await draw(known)
        except StoreError:
            newer = await asyncio.to_thread(self._newer_than, known)
            if newer is None:
                raise
            return await draw(newer)

    async def _chart(self, known: Knowledge) -> Chart | None:
        retriever = known.retriever
        if retriever is None:
            return None
        return await self._once("chart", known.version, lambda: Chart(retriever))

    async def _once(self, name: str, version: int, compute: Callable[[], _T]) -> _T:
        kept = self._kept.get(name)
        if kept is None or kept[0] != version or (kept[1].done() and kept[1].exception()):
            kept = version, asyncio.create_task(asyncio.to_thread(compute))
            self._kept[name] = kept
        found: _T = await asyncio.shield(kept[1])  # a client that leaves stops nobody else's
        return found


def _draw(known: Knowledge, chart: Chart | None) -> KnowledgeMap:
    names = [record.name for record in known.records]
    if known.retriever is None or chart is None:
        return _empty(known.version)
    owners = [names[task] for task in known.retriever.scorer.tasks.tolist()]
    outlines = chart.ellipses() if len(names) <= MOST_MEASURED_TASKS else []
    ellipses = [_rounded(outline) for _, outline in outlines] or [[] for _ in owners]
    places = _rounded(chart.key_places)
    cells, borders = chart.regions()
    return KnowledgeMap(
        store_version=known.version,
        form=known.retriever.config.form,
        tasks=names,
        num_axes=chart.num_axes,
        num_directions=chart.plane.num_directions,
        drawn_share=chart.plane.drawn_share,
        is_exact=chart.plane.num_directions <= 2,
        is_abstaining=known.retriever.config.is_abstaining,
        ellipse_share=ELLIPSE_SHARE,
        keys=[
            MapKey(task=task, place=place, ellipse=ellipse)
            for task, place, ellipse in zip(owners, places, ellipses, strict=True)
        ],
        regions=[
            MapRegion(task=names[task], polygons=[_rounded(outline) for outline in outlines])
            for task, outlines in cells.items()
        ],
        borders=[_rounded(border) for border in borders],
    )


def _empty(version: int) -> KnowledgeMap:
    return KnowledgeMap(
        store_version=version,
        form="",
        tasks=[],
        num_axes=0,
        num_directions=0,
        drawn_share=1.0,
        is_exact=True,
        is_abstaining=False,
        ellipse_share=ELLIPSE_SHARE,
        keys=[],
        regions=[],
        borders=[],
    )


def _place(
    known: Knowledge, chart: Chart, texts: Sequence[str], read: Callable[[Sequence[str]], Tensor]
) -> MapPoints:
    assert known.retriever is not None
    names = [record.name for record in known.records]
    queries = read(texts)
    found = known.retriever(queries, lambda row: read([texts[row]])[0])
    nearest = found.owners[found.nearest].tolist()
    below = chart.owners_on_paper(queries)
    places = _rounded(chart.places(queries, found))
    data = [
        MapPoint(
            index=b,
            place=places[b],
            region=names[below[b]],
            nearest=names[nearest[b]],
            is_abstained=bool(found.is_abstained[b]),
        )
        for b in range(len(texts))
    ]
    return MapPoints(store_version=known.version, data=data)


def _evaluate(known: Knowledge, metric: str) -> Evaluations:
    scores = [(record.name, record.metadata.get("validation_score")) for record in known.records]
    tasks = [
        TaskEvaluation(
            task=name,
            validation_score=float(score) if isinstance(score, (int, float)) else None,
            validation_metric=metric,
        )
        for name, score in scores
    ]
    confusion, reason = _confuse(known)
    return Evaluations(store_version=known.version, tasks=tasks, confusion=confusion, reason=reason)


def _confuse(known: Knowledge) -> tuple[Confusion | None, str | None]:
    names = [record.name for record in known.records]
    if len(names) < 2 or known.retriever is None:
        return None, "confusion needs at least two tasks"
    if len(names) > MOST_MEASURED_TASKS:
        return None, f"confusion is drawn of at most {MOST_MEASURED_TASKS} tasks, the store has {len(names)}"
    num_keys = len(known.retriever.scorer.keys)
    if num_keys > MOST_MEASURED_KEYS:
        return None, f"confusion is drawn of at most {MOST_MEASURED_KEYS} keys, the store has {num_keys}"
    shares = implied_confusion(known.retriever)
    if shares is None:
        return None, "the keys of this store keep no spread, so they imply no confusion"
    rounded = [[round(share, 5) for share in row] for row in shares.tolist()]
    return Confusion(rows=names, columns=[*names, ABSTAINED], shares=rounded), None


def _rounded(places: Sequence[Place] | Polygon) -> list[Place]:
    """Six digits are finer than any screen, and a third of the bytes."""
    return [(float(f"{x:.6g}"), float(f"{y:.6g}")) for x, y in places]
