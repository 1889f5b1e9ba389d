"""The map, points on it and evaluations over HTTP, against what the library says of the same store."""

from __future__ import annotations

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from slm.bench.map.survey import map_store
from slm.model import ScalableLM
from slm.retrieval.implied import implied_confusion
from slm.serving import surveyor
from slm.serving.map_routes import map_router
from slm.serving.surveyor import Surveyor
from tests.bench.map.conftest import Teach, four, teach  # noqa: F401

SQL = "SELECT name, price FROM products WHERE price > 10 ORDER BY price DESC"


def serve(model: ScalableLM) -> TestClient:
    app = FastAPI()
    app.include_router(map_router(Surveyor(lambda: model.knowledge, model.queries, "accuracy")))
    return TestClient(app)


@pytest.fixture(scope="module")
def model(teach: Teach, four) -> ScalableLM:  # noqa: F811
    return teach(four)


def test_the_map_is_the_one_that_slm_map_draws(model):
    served, drawn = serve(model).get("/v1/map").json(), map_store(model)
    assert served["store_version"] == model.knowledge.version
    assert served["tasks"] == list(drawn.tasks)
    assert served["num_axes"] == 2
    assert served["is_exact"] == drawn.is_exact
    for key, other in zip(served["keys"], drawn.keys, strict=True):
        assert key["task"] == other.task
        assert key["place"] == pytest.approx(other.place, rel=1e-4)
        assert len(key["ellipse"]) > 20
    assert [region["task"] for region in served["regions"]] == list(drawn.regions)


def test_points_lie_where_slm_map_draws_the_same_questions(model):
    texts = ["what is 7 plus 5?", "fry the fish for 10 minutes", SQL]
    served = serve(model).post("/v1/map/points", json={"input": texts}).json()["data"]
    for point, other in zip(served, map_store(model, questions=texts).questions, strict=True):
        assert point["place"] == pytest.approx(other.place, rel=1e-4)
        assert point["nearest"] == other.nearest
        assert point["region"] == other.region
        assert point["is_abstained"] == other.is_abstained
    assert [point["is_abstained"] for point in served] == [False, False, True]


def test_one_text_is_placed_like_a_list_of_one(model):
    client = serve(model)
    alone = client.post("/v1/map/points", json={"input": SQL}).json()
    assert alone == client.post("/v1/map/points", json={"input": [SQL]}).json()


@pytest.mark.parametrize(
    "body", [{}, {"input": []}, {"input": ""}, {"input": ["a"] * 33}, {"input": "a", "x": 1}]
)
def test_points_of_a_wrong_body_are_refused(model, body):
    assert serve(model).post("/v1/map/points", json=body).status_code == 422


def test_evaluations_hold_the_implied_confusion(model):
    served = serve(model).get("/v1/evaluations").json()
    assert [task["task"] for task in served["tasks"]] == ["languages", "moods", "sums", "cooking"]
    assert served["tasks"][0] == {
        "task": "languages",
        "validation_score": None,
        "validation_metric": "accuracy",
    }
    confusion = served["confusion"]
    assert confusion["columns"] == [*confusion["rows"], "no task"]
    expected = implied_confusion(model.knowledge.retriever)
    assert torch.tensor(confusion["shares"]) == pytest.approx(expected, abs=1e-5)


def test_the_map_is_drawn_once_per_version_and_anew_after_forgetting(teach: Teach, four):  # noqa: F811
    model = teach(four)
    client = serve(model)
    with client:
        before = client.get("/v1/map").json()
        assert client.get("/v1/map").json() == before
        model.forget("moods")
        after = client.get("/v1/map").json()
    assert "moods" not in after["tasks"]
    assert after["store_version"] > before["store_version"]


def test_an_empty_store_has_an_empty_map(teach: Teach):  # noqa: F811
    client = serve(teach([]))
    assert client.get("/v1/map").json()["keys"] == []
    assert client.post("/v1/map/points", json={"input": "a"}).json()["data"] == []
    served = client.get("/v1/evaluations").json()
    assert served["confusion"] is None
    assert served["reason"] == "confusion needs at least two tasks"


def test_two_tasks_are_drawn_with_heights(teach: Teach, four):  # noqa: F811
    client = serve(teach(four[:2]) if isinstance(four, tuple) else teach(list(four)[:2]))
    served = client.get("/v1/map").json()
    assert served["num_axes"] == 1
    assert all(key["ellipse"] == [] for key in served["keys"])
    point = client.post("/v1/map/points", json={"input": SQL}).json()["data"][0]
    assert point["is_abstained"] == (point["place"][1] > 0)


@pytest.mark.parametrize("what", ["tasks", "keys"])
def test_a_store_too_large_for_implied_confusion_says_so(model, monkeypatch, what):
    monkeypatch.setattr(surveyor, f"MOST_MEASURED_{what.upper()}", 3)
    served = serve(model).get("/v1/evaluations").json()
    assert served["confusion"] is None
    assert served["reason"] == f"confusion is drawn of at most 3 {what}, the store has 4"
