"""Drawing up the map of a store: its keys, and questions asked of it, laid out in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from slm.backbone.prompts import Prompt
from slm.bench.map.store_map import MappedKey, MappedQuestion, StoreMap
from slm.errors import TaskError
from slm.evaluation.matrix import prompt_of
from slm.model import ScalableLM
from slm.reading import task_weights
from slm.retrieval.chart import Chart
from slm.retrieval.retriever import Retrieved, Retriever
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

        def read(some: Sequence[Prompt]) -> Tensor:
            return model.queries(some, is_truncating=is_truncating)

        queries = read(prompts)
        found = knowledge.retriever(queries, lambda row: read([prompts[row]])[0])
        asked = survey.questions(queries, found, [_words(prompt) for prompt in prompts], owners)
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
        self._names, self._retriever = tuple(names), retriever
        self._chart = Chart(retriever, (num_questions + 1) / 2)
        self._is_abstaining = retriever.config.is_abstaining

    def questions(
        self,
        queries: Float[Tensor, "B C"],
        found: Retrieved,
        texts: Sequence[str],
        owners: Sequence[str | None],
    ) -> tuple[MappedQuestion, ...]:
        """What DTKR decided for some questions, and where they lie."""
        drawn, below = self._chart.places(queries, found), self._chart.owners_on_paper(queries)
        nearest = found.owners[found.nearest].tolist()
        distances, limits = found.distances[:, 0].tolist(), found.thresholds.tolist()
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
        names, chart, scorer = self._names, self._chart, self._retriever.scorer
        form, plane = self._retriever.config.form, chart.plane
        cells, borders = chart.regions()
        owners = [names[task] for task in scorer.tasks.tolist()]
        return StoreMap(
            form=form,
            tasks=names,
            keys=tuple(map(MappedKey, owners, chart.key_places, chart.limits)),
            questions=questions,
            num_axes=chart.num_axes,
            num_directions=plane.num_directions,
            drawn_share=plane.drawn_share,
            regions={names[task]: outlines for task, outlines in cells.items()},
            borders=borders,
            reaches=[(names[task], outline) for task, outline in chart.reaches()],
            is_exact=plane.num_directions <= 2,
            is_reach_exact=form == "gaussian" and scorer.keys.shape[1] == chart.num_axes,
            is_abstaining=self._is_abstaining,
        )
