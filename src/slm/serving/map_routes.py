"""Routes of what the page draws: the map of the store, points on it, scores and confusion."""

from __future__ import annotations

from fastapi import APIRouter

from slm.serving.map_schema import Evaluations, KnowledgeMap, MapPoints, PointsRequest
from slm.serving.surveyor import Surveyor


def map_router(surveyor: Surveyor) -> APIRouter:
    """``GET /v1/map``, ``POST /v1/map/points``, ``GET /v1/evaluations``; the app adds who may ask."""
    router = APIRouter(prefix="/v1", tags=["map"])

    @router.get("/map")
    async def get_map() -> KnowledgeMap:
        """The knowledge of the store in two dimensions."""
        return await surveyor.map()

    @router.post("/map/points")
    async def place_points(asked: PointsRequest) -> MapPoints:
        """Where texts lie on that map, and what would be retrieved for them."""
        return await surveyor.points(asked.texts)

    @router.get("/evaluations")
    async def get_evaluations() -> Evaluations:
        """Validation scores of the tasks, and the confusion that their keys imply."""
        return await surveyor.evaluations()

    return router
