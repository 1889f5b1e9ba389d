"""Scorers: how good the answers to one task's test rows are, from 0 to 1.

An answer of None (an encoder that abstained has nothing to say) is always wrong.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import regex

from slm.errors import ConfigError, DataError
from slm.tasks import Task, TaskKind
from slm.tasks.sampling import fold

MAX_WORDS_OF_A_SHORT_TARGET = 3
"""A generation task whose test targets are all this short is scored by exact match, otherwise by ROUGE-L."""
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNIT = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.VERSION1)
_UNSPACED_CHARACTER = regex.compile(rf"[{_UNSPACED}]")
_FOREIGN_LETTER = regex.compile(r"[\p{L}--[A-Za-z]]", regex.VERSION1)


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

    As published, words are runs of a-z and 0-9: :func:`rouge_l_unicode` reads other letters too.

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(answers, targets)
    return _mean_rouge_l(RougeScorer(["rougeL"], use_stemmer=True), answers, targets)


def rouge_l_unicode(answers: Sequence[str | None], targets: Sequence[str]) -> float:
    """ROUGE-L of texts in any script: :func:`rouge_l`, but its words are runs of letters and digits.

    In scripts written without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every character with its
    marks is a word. Texts are compared in Unicode's form NFKC; only words of a-z are stemmed, so texts of
    ASCII score as in :func:`rouge_l`.

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(answers, targets)
    return _mean_rouge_l(RougeScorer(["rougeL"], tokenizer=_AnyScript()), answers, targets)


class _AnyScript:
    """Words of any script, in the shape that ROUGE's scorer takes."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._published = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = _UNIT.findall(unicodedata.normalize("NFKC", text).lower())
        return [
            stem for word in words for stem in (self._published.tokenize(word) if word.isascii() else [word])
        ]


def _mean_rouge_l(scorer: Any, answers: Sequence[str | None], targets: Sequence[str]) -> float:
    pairs = zip(answers, targets, strict=True)
    total = sum(0.0 if a is None else float(scorer.score(y, a)["rougeL"].fmeasure) for a, y in pairs)
    return total / len(targets)


@final
@dataclass(frozen=True, slots=True)
class Scorer:
    """A metric and its name.

    Attributes:
        name: ``accuracy``, ``exact_match``, ``rouge_l`` or ``rouge_l_unicode``.
        function: answers and targets → score from 0 to 1.
    """

    name: str
    function: Callable[[Sequence[str | None], Sequence[str]], float]

    def __call__(self, answers: Sequence[str | None], targets: Sequence[str]) -> float:
        """Score the answers to some rows."""
        return self.function(answers, targets)


SCORERS = {
    scorer.__name__: Scorer(scorer.__name__, scorer)
    for scorer in (accuracy, exact_match, rouge_l, rouge_l_unicode)
}


def scorer_for(task: Task, metric: str | None = None) -> Scorer:
    """Return the scorer of a task.

    Args:
        task: accuracy for a classification; for a generation exact match when every test target has at most
            3 words, else ROUGE-L, over words of any script where a target has letters other than a-z. All
            of its test counts, so that drawing fewer rows changes no metric.
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
    targets = [example.target or "" for example in task.test]
    if max(map(_num_words, targets), default=0) <= MAX_WORDS_OF_A_SHORT_TARGET:
        return SCORERS["exact_match"]
    return SCORERS["rouge_l_unicode" if any(map(_FOREIGN_LETTER.search, targets)) else "rouge_l"]


def _num_words(text: str) -> int:
    """Words between blanks, or characters of scripts that are written without."""
    return max(len(text.split()), len(_UNSPACED_CHARACTER.findall(text)))


def _bare(text: str) -> str:
    folded = fold(text)
    return folded.rstrip(" .") or folded  # an answer of periods alone is not an empty one


def _check(answers: Sequence[str | None], targets: Sequence[str]) -> None:
    if len(answers) != len(targets):
        raise DataError(f"there are {len(answers)} answers but {len(targets)} targets: give one for each")
    if not targets:
        raise DataError("a score needs at least 1 row, got 0: give some")
