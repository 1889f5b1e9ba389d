"""Maps of real stores: what is drawn is what DTKR decides."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from slm.bench.map.survey import map_store
from slm.config import CosineConfig
from slm.errors import DataError, TaskError
from slm.evaluation.matrix import prompt_of
from slm.tasks import Stream
from tests.bench.map.conftest import split

STRANGE = ["SELECT name FROM products WHERE price > 10", "§§ 4711 xylem quark-gluon plasma"]
VERBS = ("boil", "fry", "bake")


@pytest.fixture(scope="module")
def model(teach, four):
    return teach(four)


@pytest.fixture(scope="module")
def drawn(model, four):
    return map_store(model, four, STRANGE)


def test_every_question_is_drawn_with_its_decision(model, four, drawn):
    prompts = [prompt_of(e) for task in four for e in task.test] + STRANGE
    found = model.retrieve(prompts)
    assert [q.text for q in drawn.questions] == prompts
    assert [q.task for q in drawn.questions[:-2]] == [task.name for task in four for _ in task.test]
    assert [q.task for q in drawn.questions[-2:]] == [None, None]
    assert [q.nearest for q in drawn.questions] == [
        four.names[number] for number in found.owners[found.nearest].tolist()
    ]
    assert [q.is_abstained for q in drawn.questions] == found.is_abstained.tolist()
    assert any(q.is_abstained for q in drawn.questions)
    assert [q.distance for q in drawn.questions] == found.distances[:, 0].tolist()
    assert [q.threshold for q in drawn.questions] == found.thresholds.tolist()
    for question in drawn.questions:
        assert sum(weight for _, weight in question.weights) == pytest.approx(
            float(not question.is_abstained)
        )


def test_a_question_whose_decision_hangs_on_rounding_is_read_by_itself(model, four, monkeypatch):
    questions = [prompt_of(e) for task in four for e in task.test[:2]] + STRANGE
    monkeypatch.setattr(model.knowledge.retriever, "_rounding", math.inf)
    alone = [float(model.retrieve([question]).distances[0, 0]) for question in questions]
    assert [q.distance for q in map_store(model, questions=questions).questions] == alone


def test_regions_follow_from_the_drawn_keys_and_agreement_from_the_regions(drawn):
    assert (drawn.num_axes, drawn.num_directions, drawn.is_exact) == (2, 3, False)
    assert set(drawn.regions) == set(drawn.tasks)
    for question in drawn.questions:
        nearest = min(drawn.keys, key=lambda key: math.dist(key.place, question.place))
        assert question.region == nearest.task
    agreed = sum(q.region == q.nearest for q in drawn.questions)
    assert drawn.agreement == agreed / len(drawn.questions)
    assert drawn.agreement > 0.9  # four tasks as different as these


def test_the_confusion_matrix_counts_every_labelled_question_once(drawn, four):
    confusion = drawn.confusion
    assert confusion.rows == four.names
    assert confusion.columns == (*four.names, "abstained")
    for name, line in zip(confusion.rows, confusion.counts, strict=True):
        own = [q for q in drawn.questions if q.task == name]
        given = ["abstained" if q.is_abstained else q.nearest for q in own]
        assert line == tuple(map(given.count, confusion.columns))
    assert drawn.false_refusal_rate == sum(line[-1] for line in confusion.counts) / sum(
        map(sum, confusion.counts)
    )
    assert drawn.outsiders_let_in is None
    assert drawn.as_dict()["confusion"]["counts"] == [list(line) for line in confusion.counts]


def test_tasks_never_learned_are_outsiders_with_rows_of_their_own(model, four):
    found = map_store(model.restricted(["languages", "moods", "sums"]), four)
    confusion = found.confusion
    assert (confusion.rows, confusion.num_learned) == (four.names, 3)
    assert "cooking" not in confusion.columns
    strange = [q for q in found.questions if q.task == "cooking"]
    assert not any(q.is_of_store or q.is_misrouted for q in strange)
    assert found.outsiders_let_in == sum(not q.is_abstained for q in strange) / len(strange)
    own = [q for q in found.questions if q.is_of_store]
    assert found.misrouting == sum(q.nearest != q.task for q in own) / len(own)
    listed = {(task, given): count for task, given, count, _ in confusion.mistakes()}
    assert ("cooking", "abstained") not in listed  # to refuse them is right
    let_in = sum(count for (task, _), count in listed.items() if task == "cooking")
    assert let_in == sum(not q.is_abstained for q in strange)


def test_without_questions_keys_and_regions_are_drawn_from_the_statistics(model, drawn):
    bare = map_store(model)
    assert (bare.keys, bare.regions) == (drawn.keys, drawn.regions)
    assert (bare.questions, bare.confusion) == ((), None)
    assert bare.agreement is bare.misrouting is bare.false_refusal_rate is None


def test_three_tasks_are_exact_refusals_included_without_a_background(model, four, monkeypatch):
    monkeypatch.setitem(model.store.__dict__, "background", None)
    found = map_store(model.restricted(["moods", "sums", "cooking"]), four, STRANGE)
    assert (found.num_axes, found.is_exact, found.is_reach_exact, found.agreement) == (2, True, True, 1.0)
    limits = dict(found.reaches)
    for question in found.questions:
        assert question.is_abstained != _is_inside(question.place, limits[question.nearest])


def test_three_tasks_are_exact_and_what_is_outside_an_outline_is_refused(model, four):
    found = map_store(model.restricted(["moods", "sums", "cooking"]), four, STRANGE)
    # The background's direction is not drawn, so inside an outline a question may be refused.
    assert (found.num_axes, found.is_exact, found.is_reach_exact, found.agreement) == (2, True, False, 1.0)
    limits = dict(found.reaches)
    outside = [q for q in found.questions if not _is_inside(q.place, limits[q.nearest])]
    assert all(question.is_abstained for question in outside)
    accepted = [q for q in found.questions if not q.is_abstained]
    assert {question.nearest for question in accepted} == {"moods", "sums", "cooking"}


def _is_inside(place, outline):
    """Even-odd rule."""
    x, y = place
    corners = zip(outline, outline[1:] + outline[:1], strict=True)
    crossed = [
        (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1 for (x1, y1), (x2, y2) in corners
    ]
    return sum(crossed) % 2 == 1


@pytest.mark.parametrize(("names", "num_axes"), [(("languages",), 0), (("languages", "moods"), 1)])
def test_one_and_two_tasks_are_drawn_over_how_far_beyond_the_threshold_questions_are(
    model, four, names, num_axes
):
    found = map_store(model.restricted(names), four, STRANGE)
    assert (found.num_axes, found.is_exact, found.agreement) == (num_axes, True, 1.0)
    for number, question in enumerate(found.questions):
        x, y = question.place
        assert y == pytest.approx(question.distance - question.threshold, abs=1e-6)
        assert (y > 0) == question.is_abstained
        cells = found.regions[question.nearest]
        assert any(min(a for a, _ in cell) <= x <= max(a for a, _ in cell) for cell in cells)
        assert max(b for cell in cells for _, b in cell) == 0  # above it is refused
        assert num_axes or x == number + 1
    assert all(key.place[1] < 0 for key in found.keys)


def test_several_keys_a_task_are_all_drawn(teach):
    sums = split("sums", [f"what is {a} plus {b}?" for a in range(2, 14) for b in range(3, 7)])
    foods = ("potatoes", "onions", "fish", "rice", "eggs", "beans")
    meals = [f"{verb} the {food} for {n} minutes" for verb in VERBS for food in foods for n in (5, 20)]
    both = Stream((split("meals", meals), sums))
    found = map_store(teach(both, keys_per_task=3), both)
    assert [key.task for key in found.keys] == ["meals"] * 3 + ["sums"] * 3
    assert {name: len(cells) for name, cells in found.regions.items()} == {"meals": 3, "sums": 3}
    alone = map_store(teach(both.order(["sums"]), keys_per_task=4), both.order(["sums"]))
    assert (len(alone.keys), alone.num_axes, alone.agreement) == (4, 2, 1.0)


def test_the_paper_s_form_is_drawn_in_its_own_space(teach, four):
    cosine = teach(four, form="cosine", cosine=CosineConfig(min_steps=60))
    found = map_store(cosine, four, STRANGE)
    assert (found.form, len(found.keys), found.num_axes, found.is_reach_exact) == ("cosine", 16, 2, False)
    assert found.misrouting == 0
    assert len(found.reaches) == 16
    scorer = cosine.knowledge.retriever.scorer
    ways = torch.cdist(scorer.keys, scorer.keys)
    drawn = torch.cdist(*[torch.tensor([key.place for key in found.keys], dtype=torch.float64)] * 2)
    assert (drawn <= ways + 1e-6).all()


def test_the_sentence_extractor_is_drawn_too(teach, four):
    pytest.importorskip("sentence_transformers")
    found = map_store(teach(four.order(["languages", "moods", "sums"]), extractor="sentence"), four)
    assert found.is_exact
    assert found.misrouting < 0.1


def test_a_store_that_never_abstains_has_no_thresholds(model, four):
    found = map_store(model.restricted(["moods", "sums"], is_abstaining=False), four, STRANGE)
    assert not any(q.is_abstained for q in found.questions)
    assert all(math.isinf(key.threshold) for key in found.keys)
    assert [q.place[1] for q in found.questions] == pytest.approx([q.distance for q in found.questions])


def test_conversations_are_drawn_by_their_words(model):
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
    (question,) = map_store(model, None, [[*talk, {"role": "user", "content": "where is it"}]]).questions
    assert question.text == "hello\nyes?\nwhere is it"


def test_what_cannot_be_drawn_is_refused_in_one_line(teach, model, four):
    empty = teach(())
    message = rf"^store {empty.store.path} has no task yet, so there is nothing to draw: learn one$"
    with pytest.raises(TaskError, match=message):
        map_store(empty)
    untested = Stream((dataclasses.replace(four["moods"], test=()),))
    with pytest.raises(TaskError, match=r'^task "moods" has no test examples: load it with a test file$'):
        map_store(model, untested)
    with pytest.raises(DataError, match=r"^question 1 has 302 tokens, the window holds 128: shorten it"):
        map_store(model, None, ["word " * 300])
    assert len(map_store(model, None, ["word " * 300], is_truncating=True).questions) == 1
