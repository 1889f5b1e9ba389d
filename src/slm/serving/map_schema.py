"""What the map and the evaluations look like on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_POINTS = 32
"""Texts that one request may place on the map."""
LONGEST_TEXT = 32_768
"""Characters of one such text."""

Place = tuple[float, float]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]


class MapKey(BaseModel):
    """One key: its task, where it is drawn, and an outline around most of its task's rows (or none)."""

    task: str
    place: Place
    ellipse: list[Place] = []


class MapRegion(BaseModel):
    """Where a task has the nearest key on paper: convex polygons, one a key."""

    task: str
    polygons: list[list[Place]]


class KnowledgeMap(BaseModel):
    """The keys of a store in at most two dimensions (``docs/method.md``, Map).

    With two axes places are projections. With fewer the height is the distance beyond the threshold of the
    nearest key: above 0 is refused where ``is_abstaining``.
    """

    object: Literal["map"] = "map"
    store_version: int
    form: str
    tasks: list[str]
    num_axes: int
    num_directions: int
    drawn_share: float
    is_exact: bool
    is_abstaining: bool
    ellipse_share: float
    keys: list[MapKey]
    regions: list[MapRegion]
    borders: list[list[Place]]


class PointsRequest(BaseModel):
    """Texts to place on the map."""

    model_config = ConfigDict(extra="forbid")

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_POINTS)]

    @property
    def texts(self) -> list[str]:
        """The texts as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


class MapPoint(BaseModel):
    """One text on the map: where, in whose region, its true nearest task, and whether it is refused."""

    index: int
    place: Place
    region: str
    nearest: str
    is_abstained: bool


class MapPoints(BaseModel):
    """Texts on the map; empty while the store has no task."""

    object: Literal["list"] = "list"
    store_version: int
    data: list[MapPoint]


class TaskEvaluation(BaseModel):
    """What a task scored on its validation rows when it was learned; null where there were none."""

    task: str
    validation_score: float | None
    validation_metric: str


class Confusion(BaseModel):
    """Shares of each task's rows (a row sums to 1) by the task they go to; the last column is refused."""

    source: Literal["keys"] = "keys"
    rows: list[str]
    columns: list[str]
    shares: list[list[float]]


class Evaluations(BaseModel):
    """Scores of the tasks, and the confusion that their keys imply, or why there is none."""

    object: Literal["evaluations"] = "evaluations"
    store_version: int
    tasks: list[TaskEvaluation]
    confusion: Confusion | None
    reason: str | None
