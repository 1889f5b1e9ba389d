"""Base-model drift: what the backbone could do before the stream, and what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from slm.bench.rival import Rival
from slm.bench.run import score_answers
from slm.evaluation.matrix import prompt_of
from slm.tasks import Stream, Task
from slm.tasks.packaged import bbc_topics

NUM_TEXTS = 32
TEXT_SEED = 0


def measure_drift(
    rival: Rival, outside: Mapping[str, Task], limit: int, metrics: Mapping[str, str]
) -> dict[str, Any]:
    """Loss on unrelated texts and zero-shot scores of tasks never learned, after a stream.

    The same numbers of the method ``frozen`` are those before the stream.

    Args:
        rival: has lived through the stream; one that needs a task-ID has none to be given here.
        outside: tasks that it never learned.
        limit: most test rows of each.
        metrics: task -> name of its scorer.

    Returns:
        ``loss``: mean over texts of the mean negative log-likelihood of a text's tokens, in nats; None for a
        method that writes nothing. ``scores``: task -> score. ``abstained``: share of all these rows that the
        method refused.
    """
    stream = Stream(tuple(outside.values()))
    rows = stream.mixed_test(limit)
    answers = rival.ask([prompt_of(example) for _, example in rows])
    losses = rival.losses(unrelated_texts())
    return {
        "loss": None if losses is None else fmean(losses),
        "scores": dict(zip(stream.names, score_answers(stream, rows, answers, metrics), strict=True)),
        "abstained": fmean(answer.is_abstained for answer in answers),
    }


def unrelated_texts() -> list[str]:
    """News articles that no suite learns from, cut to their first 600 characters."""
    task = bbc_topics(num_examples=5, num_test=NUM_TEXTS, seed=TEXT_SEED)
    return [example.prompt_text[:600] for example in task.test]
