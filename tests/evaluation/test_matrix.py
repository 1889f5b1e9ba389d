"""Bookkeeping of an evaluation: who is asked what, in which order, and what goes where.

No quality is claimed here, so the model is a small stand-in whose right and wrong answers are known
beforehand. That a restricted model equals the model of that time is tested with real models elsewhere.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from slm.answer import Answer
from slm.errors import ConfigError, DataError, TaskError
from slm.evaluation import evaluate_stream
from slm.evaluation.answer_cache import AnswerCache
from slm.evaluation.metrics import auroc
from slm.retrieval.retriever import Retrieved
from slm.tasks import Example, Message, Stream, Task, TaskKind

CENTRES = {"films": 0.0, "news": 10.0, "words": 20.0, "other": 1000.0}
"""Every question is a number; a task's key is its centre, and the nearest known key answers."""
THRESHOLD = 8.0


class FakeModel:
    """Answers with the name of the nearest centre it knows, or with nothing when that is too far."""

    room = 1000
    backbone = SimpleNamespace(
        question_rows=lambda prompts, is_truncating: list(prompts), room_behind=lambda rows: FakeModel.room
    )

    def __init__(self, names, is_abstaining=True, calls=None):
        self.names = tuple(names)
        self.is_abstaining = is_abstaining
        self.calls = [] if calls is None else calls

    @property
    def tasks(self):
        return tuple(SimpleNamespace(name=name, commit_id=f"commit of {name}") for name in self.names)

    def restricted(self, names, *, is_abstaining=None):
        kept = self.is_abstaining if is_abstaining is None else is_abstaining
        return FakeModel(names, kept, self.calls)

    def ask(self, questions, *, max_new_tokens=128, batch_size=32, is_truncating=False):
        options = (max_new_tokens, batch_size, is_truncating)
        self.calls.append(("ask", self.names, self.is_abstaining, list(questions), options))
        retrieved = self._decide(torch.tensor([[number(question)] for question in questions]))
        pairs = zip(
            retrieved.owners[retrieved.nearest].tolist(), retrieved.is_abstained.tolist(), strict=True
        )
        return [Answer(None if out else self.names[n], "classification", 1.0, (), out) for n, out in pairs]

    def queries(self, questions, *, is_truncating=False, batch_size=32):
        options = (batch_size, is_truncating)
        self.calls.append(("read", self.names, self.is_abstaining, list(questions), options))
        return torch.tensor([[number(question)] for question in questions])

    def retrieve(self, questions, *, queries, is_truncating=False):
        assert queries.tolist() == [[number(question)] for question in questions]
        return self._decide(queries)

    def _decide(self, queries):
        places = queries[:, 0]
        # Two keys per task, the farther one first, so that keys and tasks are not the same thing.
        keys = torch.tensor([c for name in self.names for c in (CENTRES[name] + 500, CENTRES[name])])
        owners = torch.arange(len(self.names)).repeat_interleave(2)
        distances = (places[:, None] - keys).abs()
        distances, candidates = distances.sort(1)
        is_abstained = (distances[:, 0] > THRESHOLD) & self.is_abstaining
        return Retrieved(
            tasks=owners[candidates[:, :1]],
            increments=torch.zeros(len(places), 1, dtype=torch.long),
            weights=(~is_abstained).float()[:, None],
            candidates=candidates,
            posterior=(-distances).softmax(1),
            distances=distances,
            thresholds=torch.full((len(places),), THRESHOLD),
            margins=distances[:, 1] - distances[:, 0],
            owners=owners,
            is_contested=torch.zeros(len(places), dtype=torch.bool),
            is_abstained=is_abstained,
        )


def number(question) -> float:
    return float(question if isinstance(question, str) else question[-1]["content"])


def task(name, *places, prompts=()) -> Task:
    """A classification whose right answer is its own name, asked at these places."""
    test = tuple(Example(prompt, name) for prompt in (*(str(place) for place in places), *prompts))
    labels = tuple(sorted((name, "zzz")))
    return Task(name, TaskKind.CLASSIFICATION, (Example("0", name),), labels, test)


FILMS = task("films", 0, 1, 2, 9)  # 9 is nearer to news once that is known, and refused before
NEWS = task("news", 10, 11, 12, 3)  # 3 is nearer to films, and accepted by it
WORDS = task("words", 20, 21, 14, 200)  # 14 is nearer to news, and 200 is refused
STREAM = Stream((WORDS, FILMS, NEWS))  # in another order than they were learned
LEARNED = ("films", "other", "news", "words")
QUIET = {"has_progress": False}


def test_every_number_of_a_small_evaluation_is_as_computed_by_hand():
    found = evaluate_stream(FakeModel(LEARNED), STREAM, outsiders=["100", "20.5"], **QUIET)
    assert found.tasks == ("films", "news", "words")
    assert found.metrics == ("accuracy",) * 3
    assert found.num_rows == (4, 4, 4)
    assert found.scores == ((0.75,), (0.75, 0.75), (0.75, 0.75, 0.5))
    assert found.average == pytest.approx(2 / 3)
    assert (found.forgetting, found.backward_transfer) == (0, 0)
    assert found.oracle == (1.0, 1.0, 1.0)
    assert found.oracle_average == 1.0
    assert found.oracle_gap == pytest.approx(1 / 3)
    # Alone, news answers 10, 11, 12 and 3 (distance 7); words answers 20, 21 and 14 but not 200.
    assert found.forward_transfer == pytest.approx(((0.75 - 1.0) + (0.5 - 0.75)) / 2)
    assert found.confusion == ((3, 1, 0), (1, 3, 0), (0, 1, 3))
    assert found.task_misrouting == (0.25, 0.25, 0.25)
    assert found.misrouting == 0.25
    assert found.false_refusal_rate == pytest.approx(1 / 12)
    own = [0, 1, 2, 1, 0, 1, 2, 3, 0, 1, 4, 180]
    assert found.abstention_auroc == pytest.approx(auroc([80, 0.5], own))


def test_a_refused_row_counts_as_routed_to_its_nearest_key():
    found = evaluate_stream(FakeModel(LEARNED), Stream((WORDS, NEWS)), **QUIET)
    assert found.confusion == ((4, 0), (1, 3))
    assert found.false_refusal_rate == pytest.approx(1 / 8)


def test_each_state_is_asked_about_the_rows_it_knows_and_decides_otherwise_for():
    model = FakeModel(LEARNED)
    evaluate_stream(model, STREAM, seed=3, **QUIET)

    def rows(*names):
        return [example.prompt for _, example in STREAM.order(names).mixed_test(99, seed=3)]

    def asked(names, questions, is_abstaining=True):
        return ("ask", names, is_abstaining, questions)

    states = [("films",), ("films", "news"), ("films", "news", "words")]
    new = [rows("films"), [q for q in rows(*states[1]) if q in rows("news")]]
    new.append([q for q in rows(*states[2]) if q in rows("words")])
    assert [call[:4] for call in model.calls] == [
        ("read", states[0], True, new[0]),
        asked(states[0], rows("films")),
        ("read", states[1], True, new[1]),
        # 9 was refused by films alone and is news to the two.
        asked(states[1], [q for q in rows(*states[1]) if q in (*rows("news"), "9")]),
        ("read", states[2], True, new[2]),
        asked(states[2], [q for q in rows(*states[2]) if q in rows("words")]),
        # The oracle, of what went elsewhere or was refused.
        asked(("films",), ["9"], False),
        asked(("news",), ["3"], False),
        asked(("words",), [q for q in new[2] if q in ("14", "200")], False),
        # Alone, 14 is accepted by words and 3 by news, as by the oracle; 200 is refused as before.
    ]


def test_the_cached_matrix_is_the_one_of_asking_everything_every_time(monkeypatch):
    cached = evaluate_stream(FakeModel(LEARNED), STREAM, outsiders=["100"], **QUIET)
    monkeypatch.setattr(AnswerCache, "ask", lambda cache, model, questions: model.ask(questions))
    assert evaluate_stream(FakeModel(LEARNED), STREAM, outsiders=["100"], **QUIET) == cached


def test_the_limit_and_the_seed_choose_the_rows():
    first, again, other = (
        evaluate_stream(model, STREAM, limit=2, seed=seed, **QUIET)
        for model, seed in ((FakeModel(LEARNED), 0), (FakeModel(LEARNED), 0), (FakeModel(LEARNED), 1))
    )
    assert first.num_rows == (2, 2, 2)
    assert first == again
    assert (first.seed, other.seed) == (0, 1)


def test_options_reach_the_model():
    model = FakeModel(LEARNED)
    evaluate_stream(model, STREAM, batch_size=5, max_new_tokens=7, is_truncating=True, **QUIET)
    assert {call[4] for call in model.calls if call[0] == "ask"} == {(7, 5, True)}
    assert {call[4] for call in model.calls if call[0] == "read"} == {(5, True)}


@pytest.mark.parametrize(("room", "longest"), [(1000, 128), (60, 60), (0, 1)])
def test_answers_are_as_long_as_the_window_lets_them_be(monkeypatch, room, longest):
    monkeypatch.setattr(FakeModel, "room", room)
    model = FakeModel(LEARNED)
    evaluate_stream(model, STREAM, **QUIET)
    assert {call[4][0] for call in model.calls if call[0] == "ask"} == {longest}


def test_a_conversation_is_asked_as_mappings_of_role_and_content():
    talk = (Message("system", "Count."), Message("user", "1"))
    model = FakeModel(["films"])
    found = evaluate_stream(model, Stream((task("films", prompts=[talk]),)), **QUIET)
    assert found.average == 1.0
    expected = [[{"role": "system", "content": "Count."}, {"role": "user", "content": "1"}]]
    assert [call[3] for call in model.calls] == [expected] * 2  # read and asked, once


def test_one_task_has_neither_forgetting_nor_transfer():
    found = evaluate_stream(FakeModel(LEARNED), Stream((FILMS,)), **QUIET)
    assert (found.forgetting, found.backward_transfer, found.forward_transfer) == (None, None, None)
    assert found.abstention_auroc is None
    assert found.misrouting == 0


def test_tasks_of_different_kinds_are_scored_by_their_own_metrics():
    short = Task("news", TaskKind.GENERATION, (Example("0", "x"),), test=(Example("10", "NEWS."),))
    long = Task(
        "words", TaskKind.GENERATION, (Example("0", "x"),), test=(Example("20", "many words are here"),)
    )
    found = evaluate_stream(FakeModel(LEARNED), Stream((FILMS, short, long)), **QUIET)
    assert found.metrics == ("accuracy", "exact_match", "rouge_l")
    assert found.scores[-1] == (0.75, 1.0, pytest.approx(2 / 5))
    assert found.num_rows == (4, 1, 1)


def test_an_evaluation_survives_json_and_gives_a_line_per_task():
    found = evaluate_stream(FakeModel(LEARNED), STREAM, **QUIET)
    values = found.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["scores"] == [[0.75], [0.75, 0.75], [0.75, 0.75, 0.5]]
    assert found.rows()[2] == {
        "task": "words",
        "metric": "accuracy",
        "num_rows": 4,
        "first": 0.5,
        "last": 0.5,
        "oracle": 1.0,
        "misrouting": 0.25,
    }


def test_progress_goes_to_standard_error_and_counts_every_row(capsys):
    evaluate_stream(FakeModel(LEARNED), STREAM)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "12/12" in shown.err
    evaluate_stream(FakeModel(LEARNED), STREAM, **QUIET)
    assert capsys.readouterr().err == ""


def test_a_task_that_was_never_learned_is_named_with_the_nearest_learned_one():
    stream = Stream((task("film", 0), task("xyz", 1), NEWS))
    with pytest.raises(TaskError) as caught:
        evaluate_stream(FakeModel(["films", "news"]), stream)
    assert str(caught.value) == (
        "the model never learned 'film' (did you mean \"films\"?), 'xyz' of the stream, "
        "learned are films, news: learn it first or leave it out (--tasks news)"
    )
    with pytest.raises(TaskError) as caught:
        evaluate_stream(FakeModel([]), Stream((NEWS,)))
    assert str(caught.value) == (
        "the model never learned 'news' of the stream, nothing was learned yet: "
        "learn it first or leave it out"
    )


def test_a_stream_without_tasks_or_without_test_examples_is_refused_before_anything_is_asked():
    model = FakeModel(LEARNED)
    with pytest.raises(TaskError) as caught:
        evaluate_stream(model, Stream(()))
    assert str(caught.value) == "the stream has no tasks, at least 1 is needed: add one that was learned"
    with pytest.raises(TaskError) as caught:
        evaluate_stream(model, Stream((FILMS, task("news"))))
    assert str(caught.value) == 'task "news" has no test examples: load it with a test file'
    assert model.calls == []


@pytest.mark.parametrize("name", ["limit", "batch_size", "max_new_tokens"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ConfigError) as caught:
        evaluate_stream(FakeModel(LEARNED), STREAM, **{name: 0})
    assert str(caught.value) == f"{name} must be at least 1, got 0: raise it"


def test_one_text_is_no_list_of_outsiders():
    with pytest.raises(DataError) as caught:
        evaluate_stream(FakeModel(LEARNED), STREAM, outsiders="100")
    assert str(caught.value) == "outsiders must be several texts, got one, '100': put it into a list"


def test_importing_the_room_loads_neither_torch_nor_transformers_nor_peft():
    code = "import slm.evaluation, sys; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
