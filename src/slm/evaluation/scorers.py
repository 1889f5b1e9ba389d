"""Scorers: how good the answers to one task's test rows are, from 0 to 1.

An answer of None (an encoder that abstained has nothing to say) is always wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from slm.errors import ConfigError, DataError
from slm.tasks import Task, TaskKind
from slm.tasks.sampling import fold

MAX_WORDS_OF_A_SHORT_TARGET = 3
"""A generation task whose test targets are all this short is scored by exact match, otherwise by ROUGE-L."""


def accuracy(answers: Sequence[str | None], targets: Sequence[str]) -> float:
    """Accuracy: (1/B) Σ_b [strip(answer_b) = strip(target_b)].

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    _check(answers, targets)
    pairs = zip(answers, targets, strict=True)
    return sum(a is not None and a.strip() == y.strip() for a, y in pairs) / len(targets)


def exact_match(answers: Sequence[str | None], targets: Sequence[str]) -> float:
    """Exact match: (1/B) Σ_b [bare(answer_b) = bare(target_b)], for short generated answers.

    bare() removes differences of case and white space, and periods at the end.

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    _check(answers, targets)
    pairs = zip(answers, targets, strict=True)
    return sum(a is not None and _bare(a) == _bare(y) for a, y in pairs) / len(targets)


def rouge_l(answers: Sequence[str | None], targets: Sequence[str]) -> float:
    """ROUGE-L: (1/B) Σ_b F1(LCS of answer_b and target_b over stemmed words).

    As published, words are runs of a-z and 0-9: in texts of another script there is nothing to match, so
    give such a task another metric.

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(answers, targets)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(answers, targets, strict=True)
    total = sum(0.0 if a is None else float(scorer.score(y, a)["rougeL"].fmeasure) for a, y in pairs)
    return total / len(targets)


@final
@dataclass(frozen=True, slots=True)
class Scorer:
    """A metric and its name.

    Attributes:
        name: ``accuracy``, ``exact_match`` or ``rouge_l``.
        function: answers and targets → score from 0 to 1.
    """

    name: str
    function: Callable[[Sequence[str | None], Sequence[str]], float]

    def __call__(self, answers: Sequence[str | None], targets: Sequence[str]) -> float:
        """Score the answers to some rows."""
        return self.function(answers, targets)


SCORERS = {scorer.__name__: Scorer(scorer.__name__, scorer) for scorer in (accuracy, exact_match, rouge_l)}


def scorer_for(task: Task, metric: str | None = None) -> Scorer:
    """Return the scorer of a task.

    Args:
        task: accuracy for a classification; for a generation exact match when every test target has at most
            3 words, else ROUGE-L. All of its test counts, so that drawing fewer rows changes no metric.
        metric: name of a scorer to use instead.

    Raises:
        ConfigError: no metric has that name.
    """
    if metric is not None:
        if metric not in SCORERS:
            near = difflib.get_close_matches(metric, SCORERS, n=1)
            mend = f'did you mean "{near[0]}"?' if near else "use one of these"
            raise ConfigError(f"metric {metric!r} is unknown, known are {', '.join(SCORERS)}: {mend}")
        return SCORERS[metric]
    if task.kind is TaskKind.CLASSIFICATION:
        return SCORERS["accuracy"]
    num_words = max((len((example.target or "").split()) for example in task.test), default=0)
    return SCORERS["exact_match" if num_words <= MAX_WORDS_OF_A_SHORT_TARGET else "rouge_l"]


def _bare(text: str) -> str:
    folded = fold(text)
    return folded.rstrip(" .") or folded  # an answer of periods alone is not an empty one


def _check(answers: Sequence[str | None], targets: Sequence[str]) -> None:
    if len(answers) != len(targets):
        raise DataError(f"there are {len(answers)} answers but {len(targets)} targets: give one for each")
    if not targets:
        raise DataError("a score needs at least 1 row, got 0: give some")
