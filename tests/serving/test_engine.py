"""The engine gives the library's answers, whoever is answered beside them."""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from slm.backbone import bank
from slm.model import ScalableLM
from slm.serving.engine import Engine
from slm.serving.refusals import Refused
from slm.serving.settings import ServingSettings
from slm.serving.work import AUTO, Asked, Decided, Failed, Finished, Piece, Wish
from slm.tasks import Task
from tests.backbone.families import load, save
from tests.serving.stores import COOK, COOKING, FRENCH, GOOD, OUTSIDE, SUM, commit, make_store, small_tasks

QUESTIONS = [FRENCH, SUM, GOOD, COOK, OUTSIDE, "what is 5 plus 5?", COOKING[7][0], "merci beaucoup!"]


class Caller:
    """Asks an engine and waits, as a route does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def ask(
        self, prompt: str, model: str = AUTO, task: str | None = None, **wish
    ) -> tuple[Asked, queue.Queue]:
        events: queue.Queue = queue.Queue()
        row = self.engine.model.backbone.row(prompt, is_truncating=False, where="prompt")
        asked = Asked(prompt, model, task, Wish(**wish), events.put, 60.0, row)
        self.engine.submit(asked)
        return asked, events

    @staticmethod
    def hear(events: queue.Queue, num_answers: int = 1):
        decided, texts, ends = events.get(timeout=60), {}, []
        assert isinstance(decided, Decided), decided
        while len(ends) < num_answers:
            event = events.get(timeout=60)
            assert not isinstance(event, Failed), event
            if isinstance(event, Piece):
                texts[event.index] = texts.get(event.index, "") + event.text
            else:
                assert isinstance(event, Finished)
                ends.append(event)
        return decided, texts, ends


KINDS = {"one pass": ("LLaMA", 1), "two passes": ("LLaMA", 2), "T5": ("T5", 2), "BART": ("BART", 2)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A library and an engine on the same store, each with a backbone of its own."""
    family, num_passes = KINDS[request.param]
    home = tmp_path_factory.mktemp("engine")
    source = save(family, home / "model")
    model = make_store(home / "store", load(source), num_passes)
    engine = Engine(model, ServingSettings(max_rows=8, prefill_tokens=64))
    engine.start()
    yield ScalableLM.open(home / "store", load(source)), Caller(engine)
    engine.drain(10)


def test_a_busy_engine_answers_as_the_library_does_alone(pair):
    library, caller = pair
    asked = [(q, caller.ask(q, max_tokens=8 + n % 5)[1], 8 + n % 5) for n, q in enumerate(QUESTIONS * 3)]
    for question, events, max_tokens in asked:
        decided, texts, ends = caller.hear(events)
        own = library.ask(question, max_new_tokens=max_tokens)[0]
        assert (texts.get(0, ""), ends[0].kind) == (own.text, own.kind)
        assert ends[0].confidence == pytest.approx(own.confidence, rel=1e-4)
        assert [task for task, _ in decided.mixture] == [task for task, _ in own.tasks]
        assert dict(decided.mixture) == pytest.approx(dict(own.tasks), abs=1e-5)
        assert decided.is_abstained == own.is_abstained


def test_streamed_pieces_make_the_same_text(pair):
    library, caller = pair
    for question in (SUM, COOK):
        _, texts, _ = caller.hear(caller.ask(question, max_tokens=20, is_streaming=True)[1])
        assert texts[0] == library.ask(question, max_new_tokens=20)[0].text


def test_a_forced_task_and_the_frozen_backbone_answer_as_the_restricted_library(pair):
    library, caller = pair
    forced = library.restricted(["cooking"], is_abstaining=False).ask(SUM, max_new_tokens=9)[0]
    decided, texts, _ = caller.hear(caller.ask(SUM, "tiny:cooking", "cooking", max_tokens=9)[1])
    assert (texts[0], decided.mixture) == (forced.text, (("cooking", 1.0),))
    plain = library.restricted([]).ask(SUM, max_new_tokens=9)[0]
    decided, texts, ends = caller.hear(caller.ask(SUM, "tiny", max_tokens=9)[1])
    assert (texts.get(0, ""), decided.mixture, ends[0].kind) == (plain.text, (), "frozen")
    assert plain.text != forced.text


def test_samples_depend_on_their_seed_and_not_on_their_neighbours(pair):
    _, caller = pair
    wish = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "num_answers": 3}
    alone = caller.hear(caller.ask(SUM, **wish)[1], 3)[1]
    crowd = [caller.ask(q, max_tokens=15, temperature=1.0)[1] for q in (COOK, SUM, COOK)]
    beside = caller.hear(caller.ask(SUM, **wish)[1], 3)[1]
    for events in crowd:
        caller.hear(events)
    assert alone == beside
    assert len(set(alone.values())) == 3
    assert caller.hear(caller.ask(SUM, **(wish | {"seed": 8}))[1], 3)[1] != alone


def longest(library, max_tokens):
    """The question that a random backbone has most to say to, and what that is."""
    questions = [SUM, COOK, OUTSIDE, COOKING[7][0]]
    texts = [answer.text for answer in library.ask(questions, max_new_tokens=max_tokens)]
    return max(zip(questions, texts, strict=True), key=lambda pair: len(pair[1]))


def test_a_stop_text_ends_an_answer_and_none_of_it_is_told(pair):
    library, caller = pair
    question, whole = longest(library, 20)
    stop = whole[6:9]
    _, texts, ends = caller.hear(caller.ask(question, max_tokens=20, stops=(stop,), is_streaming=True)[1])
    assert texts.get(0, "") == whole[: whole.index(stop)].rstrip()
    assert ends[0].reason == "stop"
    assert ends[0].num_tokens < 20


def test_a_long_answer_does_not_keep_a_short_one_waiting(pair):
    library, caller = pair
    question, _ = longest(library, 20)
    _, long = caller.ask(question, max_tokens=150, is_streaming=True)
    assert isinstance(long.get(timeout=60), Decided)
    caller.hear(caller.ask(SUM, max_tokens=3)[1])
    assert not any(isinstance(event, Finished) for event in list(long.queue))
    pieces = [long.get(timeout=60)]
    while not isinstance(pieces[-1], Finished):
        pieces.append(long.get(timeout=60))
    assert pieces[-1].reason == "length", "the question is too short to tell anything"
    assert len(pieces) > 20  # it came as it was written


def test_log_probabilities_are_those_of_the_chosen_tokens(pair):
    _, caller = pair
    _, events = caller.ask(SUM, max_tokens=5, num_logprobs=3)
    events.get(timeout=60)
    chances = []
    while isinstance(event := events.get(timeout=60), Piece):
        chances += event.chances
    assert len(chances) == 5
    for chance in chances:  # greedy: the chosen one is the likeliest
        assert chance.others[0] == (chance.token, pytest.approx(chance.logprob))
        assert chance.others[0][1] >= chance.others[1][1] >= chance.others[2][1]


def test_a_cancelled_request_leaves_and_the_others_go_on(pair):
    _, caller = pair
    gone, _ = caller.ask(COOK, max_tokens=60, is_streaming=True)
    other = caller.ask(SUM, max_tokens=10)[1]
    gone.is_cancelled = True
    assert caller.hear(other)[1][0]
    assert caller.hear(caller.ask(SUM, max_tokens=2)[1])
    ends = time.monotonic() + 10
    while caller.engine.num_running and time.monotonic() < ends:
        time.sleep(0.01)
    assert caller.engine.num_running == 0


def test_queries_are_read_frozen_while_bent_rows_are_being_written(pair):
    library, caller = pair
    expected = library.queries([SUM, FRENCH])
    found, events = [], queue.Queue()

    def tell(event):
        events.put(event)
        if isinstance(event, Piece) and len(found) < 3:
            model = caller.engine.model
            found.append(caller.engine.call(lambda: model.queries([SUM, FRENCH])))

    row = caller.engine.model.backbone.row(COOK, is_truncating=False, where="prompt")
    caller.engine.submit(Asked(COOK, AUTO, None, Wish(max_tokens=40, is_streaming=True), tell, 60.0, row))
    _, texts, _ = caller.hear(events)
    assert texts[0] == library.ask(COOK, max_new_tokens=40)[0].text
    for future in found:
        torch.testing.assert_close(future.result(60), expected)


def test_a_late_request_is_told_so(pair):
    _, caller = pair
    row = caller.engine.model.backbone.row(SUM, is_truncating=False, where="prompt")
    events: queue.Queue = queue.Queue()
    caller.engine.submit(Asked(SUM, AUTO, None, Wish(max_tokens=50), events.put, 1e-6, row))
    failed = events.get(timeout=60)
    assert (failed.refusal.status, failed.refusal.code) == (504, "deadline_exceeded")


def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path, store, tiny_folder):
    engine = Engine(ScalableLM.open(store, load(tiny_folder)), ServingSettings(max_queue=2))
    caller = Caller(engine)  # not started: nothing leaves the queue
    caller.ask(SUM)
    caller.ask(SUM)
    with pytest.raises(Refused, match="2 requests are waiting already: try again in 1 s") as refused:
        caller.ask(SUM)
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "1"


def test_running_requests_keep_the_knowledge_they_were_given(tmp_path, tiny_folder):
    model = make_store(tmp_path / "store", load(tiny_folder))
    library = ScalableLM.open(tmp_path / "store", load(tiny_folder))
    before = library.ask(COOK, max_new_tokens=70)[0]
    engine = Engine(model, ServingSettings())
    begun, events = threading.Event(), queue.Queue()

    def tell(event):
        events.put(event)
        if isinstance(event, Piece) and not begun.is_set():
            begun.set()
            # In the engine's own thread, so that the answer cannot end before.
            model.store.forget("cooking")
            engine.adopt(model.reader.newest())

    row = model.backbone.row(COOK, is_truncating=False, where="prompt")
    engine.submit(Asked(COOK, AUTO, None, Wish(max_tokens=70, is_streaming=True), tell, 60.0, row))
    engine.start()
    decided, texts, _ = Caller.hear(events)
    assert texts[0] == before.text
    assert decided.mixture[0][0] == "cooking"
    after = Caller.hear(Caller(engine).ask(COOK, max_tokens=5)[1])[0]
    assert "cooking" not in dict(after.mixture)
    cooking = next(task for task in small_tasks() if task.name == "cooking")
    engine.drain(10)
    commit(library, cooking, 3)


def test_the_least_temperature_takes_the_likeliest_and_harms_no_other(pair):
    library, caller = pair
    expected = library.ask(SUM, max_new_tokens=8)[0].text
    heard = [caller.ask(SUM, max_tokens=8, temperature=t)[1] for t in (0.7, 1e-38, 5e-324, 1e-6)]
    texts = [caller.hear(events)[1][0] for events in heard]
    assert texts[1:] == [expected] * 3


def test_a_request_whose_knowledge_is_gone_fails_alone(pair, monkeypatch):
    _, caller = pair
    events = caller.ask(SUM, "tiny:gone", "gone")[1]
    other = caller.ask(SUM, max_tokens=3)[1]
    failed = events.get(timeout=60)
    assert (failed.refusal.status, failed.refusal.code) == (404, "task_not_found")
    assert caller.hear(other)[1][0]


def test_increments_of_very_different_ranks_wait_for_each_other(tmp_path, monkeypatch):
    source = save("LLaMA", tmp_path / "model")
    model = make_store(tmp_path / "store", load(source), 1)
    rows = [
        {"prompt": f"the capital of country number {i} please", "completion": f"city {i}"} for i in range(20)
    ]
    commit(model, Task.from_rows("capitals", rows), 5, rank=64)
    model, large = ScalableLM.open(tmp_path / "store", load(source)), rows[3]["prompt"]
    questions = [COOK, large, SUM, COOKING[7][0], large, "what is 5 plus 5?"]
    expected = [model.ask(question, max_new_tokens=12)[0] for question in questions]
    assert {task for answer in expected for task, _ in answer.tasks} >= {"cooking", "sums", "capitals"}
    layers = model.backbone.reparameterizer.layers
    monkeypatch.setattr(
        bank, "MAX_FILLED_BYTES", 400 * sum(sum(layers[name].shape) for name in model.targets)
    )
    batches = []
    load_all = bank.Bank.load
    monkeypatch.setattr(
        bank.Bank, "load", lambda self, own: (batches.append(len(own)), load_all(self, own))[1]
    )
    for answer, own in zip(model.ask(questions, max_new_tokens=12), expected, strict=True):
        assert (answer.text, answer.tasks) == (own.text, own.tasks)
    assert max(batches) > 1  # not each by itself
    engine = Engine(model, ServingSettings(max_rows=8))
    caller = Caller(engine)
    asked = [caller.ask(question, max_tokens=12)[1] for question in questions]
    engine.start()
    try:
        for events, own in zip(asked, expected, strict=True):
            decided, texts, _ = caller.hear(events)
            assert (texts[0], dict(decided.mixture)) == (own.text, pytest.approx(dict(own.tasks)))
    finally:
        engine.drain(10)


def test_an_idle_engine_lets_a_large_bank_go(tmp_path, monkeypatch):
    model = make_store(tmp_path / "store", load(save("LLaMA", tmp_path / "model")), 1)
    monkeypatch.setattr(bank, "KEPT_BYTES", 10)
    engine = Engine(model, ServingSettings())
    engine.start()
    try:
        caller = Caller(engine)
        caller.hear(caller.ask(COOK, max_tokens=4)[1])
        ends = time.monotonic() + 30
        while model.backbone.reparameterizer.bank.size_bytes:
            assert time.monotonic() < ends
            time.sleep(0.01)
    finally:
        engine.drain(10)
