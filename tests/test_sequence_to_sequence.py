"""A sequence-to-sequence backbone from end to end: label words, free text, few examples, on a trained T5."""

from __future__ import annotations

import pytest

from slm.config import Config, DecodingConfig, LearningConfig, RetrievalConfig
from slm.errors import ConfigError, DataError
from slm.model import ScalableLM
from slm.tasks import Task
from slm.tasks.packaged import question_languages

LANGUAGES = ("dutch", "spanish", "ukrainian")
SHOTS = 16
ANIMALS = ("dog", "cat", "horse", "cow", "bird", "fish", "mouse", "goat", "duck", "bee")


def settings(num_epochs: int) -> Config:
    return Config(
        retrieval=RetrievalConfig(layers=(0, 1, 2), num_passes=2),
        learning=LearningConfig(
            num_epochs=num_epochs,
            learning_rate=1e-2,
            batch_size=8,
            validation_share=0.0,
            is_truncating=True,
            has_progress=False,
        ),
    )


@pytest.fixture(scope="module")
def whole() -> Task:
    return question_languages(1500, 300)


@pytest.fixture(scope="module")
def few(whole) -> Task:
    """Sixteen questions of each of three languages."""
    rows = []
    for label in LANGUAGES:
        own = [str(example.prompt) for example in whole.examples if example.target == label]
        rows += [{"text": text, "label": label} for text in own[:SHOTS]]
    return Task.from_rows("tongues", rows)


@pytest.fixture(scope="module")
def calls() -> Task:
    rows = [
        {"prompt": f"{form} {name}", "completion": "it is small"}
        for name in ANIMALS
        for form in ("what in the world is a", "tell me more of the")
    ]
    return Task.from_rows("animals", rows)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, small_t5, few, calls):
    model = ScalableLM.create(tmp_path_factory.mktemp("t5") / "store", small_t5, settings(15))
    model.learn(few)
    before = model.restricted(["tongues"]).ask([e.prompt for e in few.examples], is_truncating=True)
    model.learn(calls, num_epochs=25)
    return model, before


def test_sixteen_examples_a_class_are_enough_to_tell_languages_apart(taught, whole):
    model, _ = taught
    test = [example for example in whole.test if example.target in LANGUAGES]
    oracle = model.restricted(["tongues"], is_abstaining=False)
    answers = oracle.ask([e.prompt for e in test], is_truncating=True)
    right = [a.text == e.target for a, e in zip(answers, test, strict=True)]
    assert len(test) >= 60
    assert sum(right) >= 0.7 * len(right)  # a third by chance
    assert {answer.kind for answer in answers} == {"classification"}


def test_free_text_is_learned_and_written(taught, calls):
    model, _ = taught
    answers = model.ask([e.prompt for e in calls.examples], max_new_tokens=16)
    own = [a for a in answers if a.tasks and a.tasks[0][0] == "animals"]
    assert len(own) >= 0.9 * len(answers)
    assert {(a.text, a.kind) for a in own} == {("it is small", "generation")}
    assert all(0.5 < a.confidence <= 1 for a in own)


def test_learning_a_second_task_changes_no_answer_of_the_first(taught, few):
    model, before = taught
    after = model.restricted(["tongues"]).ask([e.prompt for e in few.examples], is_truncating=True)
    assert after == before


def test_rows_of_both_tasks_and_of_none_are_answered_as_if_alone(taught, few):
    model, _ = taught
    questions = [
        few.examples[0].prompt,
        "what in the world is a cat",
        "0x7f 0x3a {}[];;",
        few.examples[-1].prompt,
    ]
    mixed = model.ask(questions, max_new_tokens=12)
    for question, answer in zip(questions, mixed, strict=True):
        alone = model.ask([question], max_new_tokens=12)[0]
        assert (alone.text, alone.kind, alone.is_abstained) == (answer.text, answer.kind, answer.is_abstained)
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-5)
    assert mixed[1].tasks[0][0] == "animals"


def test_several_texts_come_back_where_they_are_asked_for(taught):
    model, _ = taught
    beams = DecodingConfig(num_beams=3, num_sequences=3)
    answer = model.restricted(["animals"], is_abstaining=False).ask(
        ["what in the world is a cow"], max_new_tokens=12, decoding=beams
    )[0]
    assert answer.text == "it is small"
    assert len(answer.others) == 2
    assert len({answer.text, *answer.others}) == 3


def test_prompt_and_answer_have_a_window_each(taught):
    model, _ = taught
    with pytest.raises(
        ConfigError, match=r"^max_new_tokens is 513, the window of the backbone holds 512: low"
    ):
        model.ask(["what is a cow"], max_new_tokens=513)
    with pytest.raises(DataError, match=r"^question 1 has \d+ tokens, the window holds 128: shorten it"):
        model.ask(["cow " * 200])
    row = model.backbone.row("cow " * 30, "cow " * 30, is_truncating=False, where="row")
    assert len(row.prompt) + len(row.target) > 100


def test_the_words_of_a_prompt_are_its_content_and_its_end_token_is_not(small_t5):
    row = small_t5.row("what is a cow", is_truncating=False, where="row")
    ids = small_t5.renderer.tokenizer("what is a cow", add_special_tokens=False)["input_ids"]
    assert list(row.prompt[row.content[0] : row.content[1]]) == ids
    assert row.prompt[-1] == small_t5.renderer.tokenizer.eos_token_id
