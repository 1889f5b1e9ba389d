"""Drawing up the map of a store: its keys, and questions asked of it, laid out in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from slm.backbone.prompts import Prompt
from slm.bench.map.plane import Place, Polygon, bands, choose_plane, nearest_keys, reaches, regions
from slm.bench.map.store_map import MappedKey, MappedQuestion, StoreMap
from slm.errors import TaskError
from slm.evaluation.matrix import prompt_of
from slm.model import ScalableLM
from slm.reading import task_weights
from slm.retrieval.retriever import Retriever
from slm.tasks import Stream


def map_store(
    model: ScalableLM,
    stream: Stream | None = None,
    questions: Sequence[Prompt] = (),
    *,
    is_truncating: bool = False,
) -> StoreMap:
    """Lay out a store's keys, and questions asked of it, in two dimensions.

    Without questions the map has the keys and their regions, which follow from the store's statistics.

    Args:
        model: its tasks are drawn.
        stream: tasks with test examples, the labelled questions; those of tasks that the model never learned
            are outsiders, which it should refuse.
        questions: further questions, of tasks that nobody named.
        is_truncating: cut the middle out of an over-long question instead of refusing it.

    Raises:
        TaskError: the store has no task, or a task of the stream has no test examples.
        DataError: a question is empty or too long; the message gives its number.
    """
    knowledge = model.knowledge
    if knowledge.retriever is None:
        raise TaskError(f"store {model.store.path} has no task yet, so there is nothing to draw: learn one")
    prompts, owners = _labelled(stream)
    prompts += questions
    owners += [None] * len(questions)
    survey = _Survey([record.name for record in knowledge.records], knowledge.retriever, len(prompts))
    asked: tuple[MappedQuestion, ...] = ()
    if prompts:
        queries = model.queries(prompts, is_truncating=is_truncating)
        asked = survey.questions(queries, [_words(prompt) for prompt in prompts], owners)
    return survey.map(asked)


def _labelled(stream: Stream | None) -> tuple[list[Prompt], list[str | None]]:
    """Test questions of a stream, and the task of each."""
    prompts: list[Prompt] = []
    owners: list[str | None] = []
    for task in stream or ():
        if not task.test:
            raise TaskError(f'task "{task.name}" has no test examples: load it with a test file')
        prompts += [prompt_of(example) for example in task.test]
        owners += [task.name] * len(task.test)
    return prompts, owners


def _words(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


@final
class _Survey:
    """The plane of one store, and what lies in it.

    Args:
        names: of the tasks, in learning order.
        retriever: decides among them.
        num_questions: how many will be drawn.
    """

    def __init__(self, names: Sequence[str], retriever: Retriever, num_questions: int) -> None:
        scorer = retriever.scorer
        self._names, self._retriever = tuple(names), retriever
        self._plane = choose_plane(scorer.keys, scorer.tasks)
        self._num_axes = self._plane.axes.shape[1]
        self._places = self._plane.places(scorer.keys)
        self._is_abstaining = retriever.config.is_abstaining
        self._middle = (num_questions + 1) / 2
        numbers = torch.arange(len(scorer.keys))
        self._limits = (
            scorer.thresholds(numbers)
            if self._is_abstaining
            else torch.full_like(numbers, math.inf, dtype=torch.float64)
        )

    def questions(
        self, queries: Float[Tensor, "B C"], texts: Sequence[str], owners: Sequence[str | None]
    ) -> tuple[MappedQuestion, ...]:
        """What DTKR decides for some questions, and where they lie."""
        scorer, found = self._retriever.scorer, self._retriever(queries)
        places = self._plane.places(scorer.points(queries))
        below = scorer.tasks[nearest_keys(places, self._places)].tolist()
        nearest = found.owners[found.nearest].tolist()
        distances, limits = found.distances[:, 0].tolist(), found.thresholds.tolist()
        columns = torch.arange(1, len(texts) + 1).tolist()
        drawn = self._on_paper(places, distances, limits, columns)
        return tuple(
            MappedQuestion(
                text=texts[b],
                task=owners[b],
                is_of_store=owners[b] is None or owners[b] in self._names,
                nearest=self._names[nearest[b]],
                weights=tuple((self._names[t], w) for t, w in task_weights(found, b).items()),
                distance=distances[b],
                threshold=limits[b],
                is_abstained=bool(found.is_abstained[b]),
                place=drawn[b],
                region=self._names[below[b]],
            )
            for b in range(len(texts))
        )

    def map(self, questions: tuple[MappedQuestion, ...]) -> StoreMap:
        """The whole map."""
        names, plane, scorer = self._names, self._plane, self._retriever.scorer
        outlines = reaches(scorer, plane) if self._is_abstaining and self._num_axes == 2 else []
        cells, borders = self._regions()
        form = self._retriever.config.form
        return StoreMap(
            form=form,
            tasks=names,
            keys=self._keys(),
            questions=questions,
            num_axes=self._num_axes,
            num_directions=plane.num_directions,
            drawn_share=plane.drawn_share,
            regions=cells,
            borders=borders,
            reaches=[(names[task], outline) for task, outline in outlines],
            is_exact=plane.num_directions <= 2,
            is_reach_exact=form == "gaussian" and scorer.keys.shape[1] == self._num_axes,
            is_abstaining=self._is_abstaining,
        )

    def _keys(self) -> tuple[MappedKey, ...]:
        scorer, limits = self._retriever.scorer, self._limits.tolist()
        at_keys = scorer.relative_distances(scorer.keys, torch.zeros(len(limits), 1, dtype=torch.float64))
        drawn = self._on_paper(self._places, at_keys[:, 0].tolist(), limits, [self._middle] * len(limits))
        owners = [self._names[task] for task in scorer.tasks.tolist()]
        return tuple(map(MappedKey, owners, drawn, limits))

    def _regions(self) -> tuple[Mapping[str, Sequence[Polygon]], Sequence[Polygon]]:
        owners = self._retriever.scorer.tasks
        if self._num_axes == 2:
            found, borders = regions(self._places, owners)
        else:
            line = self._places[:, 0] if self._num_axes else torch.zeros(len(owners), dtype=torch.float64)
            found, borders = bands(line, owners, 0.0 if self._is_abstaining else math.inf)
        return {self._names[task]: found[task] for task in sorted(found)}, borders

    def _on_paper(
        self, places: Tensor, distances: Sequence[float], limits: Sequence[float], columns: Sequence[float]
    ) -> list[Place]:
        """Places as pairs; where axes are wanting, the height says how far beyond the threshold they are."""
        if self._num_axes == 2:
            return [(x, y) for x, y in places.tolist()]
        heights = [
            distance - limit if self._is_abstaining else distance
            for distance, limit in zip(distances, limits, strict=True)
        ]
        return list(zip(places[:, 0].tolist() if self._num_axes else columns, heights, strict=True))
