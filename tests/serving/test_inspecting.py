"""What a server tells of retrieval, against what the library decides."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from slm.model import ScalableLM
from slm.serving.answers import Candidate, Retrieval
from slm.serving.engine import Engine
from slm.store import Store
from tests.backbone.families import load
from tests.serving.conftest import fresh_model, serving
from tests.serving.stores import COOK, FRENCH, GOOD, OUTSIDE, SUM, make_store


def test_retrievals_are_the_decisions_of_the_library(address, store, tiny):
    texts = [COOK, FRENCH, GOOD, OUTSIDE, SUM]
    told = httpx2.post(f"{address}/v1/retrievals", json={"input": texts}, timeout=60).json()
    model = ScalableLM.open(store, tiny)
    assert told["store_version"] == model.knowledge.version
    for text, one in zip(texts, told["data"], strict=True):
        assert set(one) == set(Retrieval.model_fields)
        own = model.explain(text)
        assert (one["is_abstained"], one["is_contested"]) == (own.is_abstained, own.is_contested)
        for found, expected in zip(one["candidates"], own.candidates, strict=True):
            assert set(found) == set(Candidate.model_fields)
            assert found["task"] == expected.task
            assert found["distance"] == pytest.approx(expected.distance, rel=1e-4, abs=1e-3)
            assert (found["threshold"] or math.inf) == pytest.approx(expected.threshold, rel=1e-4, abs=1e-3)
            assert found["weight"] == pytest.approx(expected.weight, abs=1e-4)
    assert len({one["candidates"][0]["task"] for one in told["data"]}) > 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/retrievals", {"input": SUM}),
        ("/v1/map", None),
        ("/v1/map/points", {"input": SUM}),
        ("/v1/evaluations", None),
    ],
)
def test_what_another_process_forgot_just_now_is_not_told_of(tmp_path, tiny, tiny_folder, path, body):
    folder = make_store(tmp_path / "store", tiny).store.path
    with serving(ScalableLM.open(folder, load(tiny_folder)), poll_s=600.0) as address:
        Store.open(folder).forget("sums")
        method = "GET" if body is None else "POST"
        answer = httpx2.request(method, address + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "sums" not in answer.text


def test_a_store_that_cannot_be_read_is_told_once(tmp_path, tiny, tiny_folder, caplog):
    folder = make_store(tmp_path / "store", tiny).store.path
    with (
        serving(ScalableLM.open(folder, load(tiny_folder)), poll_s=0.01),
        caplog.at_level("INFO", "slm.serving"),
    ):
        tasks = folder / "catalogue" / "tasks.lance"
        tasks.rename(folder / "elsewhere")
        wait_for(lambda: "could not be read again" in caplog.text)
        time.sleep(0.5)
        (folder / "elsewhere").rename(tasks)
        wait_for(lambda: "the store can be read again" in caplog.text)
    assert caplog.text.count("could not be read again") == 1


def wait_for(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/retrievals", "/v1/map/points"])
def test_what_is_shown_waits_no_longer_than_the_deadline_and_in_no_longer_queue(
    store, tiny_folder, path, monkeypatch
):
    calls, begin = [], Engine.start

    def start(engine):
        calls.append(engine.call)
        begin(engine)

    monkeypatch.setattr(Engine, "start", start)
    done, running = threading.Event(), threading.Event()
    with serving(fresh_model(store, tiny_folder), deadline_s=1.5, max_queue=1) as address:
        calls[0](lambda: running.set() or done.wait(60))
        assert running.wait(20)
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(httpx2.post, address + path, json={"input": SUM}, timeout=60) for _ in range(3)
            ]
            told = sorted(one.result().status_code for one in asked)
        done.set()
    assert told == [429, 429, 504]
