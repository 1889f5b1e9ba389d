"""The paper's form from end to end: taught, asked in mixed batches, reopened, forgotten."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slm.config import CosineConfig, RetrievalConfig
from slm.errors import ConfigError
from slm.learning.learner import own_weights
from slm.model import ScalableLM
from tests.conftest import config

QUESTIONS = [
    "wo ist der Bahnhof",
    "a warm delight",
    "merci beaucoup",
    "terrible acting",
    "das Wetter ist gut",
]
TASKS = ["languages", "moods", "languages", "moods", "languages"]


def cosine(num_epochs: int, **options):
    retrieval = RetrievalConfig(form="cosine", **{"is_abstaining": False, **options})
    return dataclasses.replace(config(num_epochs), retrieval=retrieval)


@pytest.fixture(scope="module")
def model(tmp_path_factory, minilm, languages, moods):
    model = ScalableLM.create(tmp_path_factory.mktemp("cosine") / "store", minilm, cosine(6, top_k=4))
    for task in (languages, moods):
        report = model.learn(task)
        assert report.key_history.losses[-1] < report.key_history.losses[0]
        assert report.as_dict()["key_history"]["steps_per_loss"] >= 1
    return model


def test_every_task_has_four_keys_and_four_increments_that_all_learned_something(model):
    for record in model.tasks:
        assert (record.num_keys, record.num_increments) == (4, 4)
        keys = model.store.keys(record)
        assert keys.increments.tolist() == [0, 1, 2, 3]
        assert len(record.metadata["key_history"]["losses"]) > 10
        learned = [model.store.increment(record, i) for i in range(4)]
        ups = [torch.cat([pair.B.flatten() for pair in own.pairs.values()]) for own in learned]
        assert all(float(up.abs().max()) > 0 for up in ups)
        assert not torch.allclose(ups[0], ups[1])
    assert model.store.check() == []


def test_a_mixed_batch_is_routed_and_answered_as_each_row_alone(model):
    answers = model.ask(QUESTIONS)
    assert [a.tasks[0][0] for a in answers] == TASKS
    assert [a.text for a in answers] == ["german", "good", "french", "bad", "german"]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert sum(weight for _, weight in answer.tasks) == pytest.approx(1.0)
        (alone,) = model.ask(question)
        assert (alone.text, alone.is_abstained) == (answer.text, answer.is_abstained)
        assert [name for name, _ in alone.tasks] == [name for name, _ in answer.tasks]
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-4)


def test_rows_of_a_task_are_taught_with_the_weights_they_retrieve_among_its_own_keys(model, languages):
    alone = model.restricted(["languages"], is_abstaining=False)
    queries = alone.queries([example.prompt for example in languages.examples])
    keys = model.store.keys(model.store.task("languages"))
    weights = own_weights(queries, keys, model.config.retrieval)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(queries)))
    found = alone.retrieve([example.prompt for example in languages.examples])
    for b in range(len(queries)):
        for increment, weight in zip(found.increments[b].tolist(), found.weights[b].tolist(), strict=True):
            assert weight == pytest.approx(float(weights[b, increment]), abs=1e-5)
    assert len({tuple(row) for row in (weights * 1e4).round().tolist()}) > 1  # rows differ


def test_explain_tells_distances_between_0_and_2_and_frozen_thresholds(model):
    before = {c.task: c.threshold for c in model.explain("a warm delight").candidates}
    explanation = model.explain("a warm delight")
    assert explanation.candidates[0].task == "moods"
    assert all(0 <= c.distance <= 2 for c in explanation.candidates)
    assert sum(c.probability for c in explanation.candidates) == pytest.approx(1.0)
    alone = model.restricted(["moods"]).explain("a warm delight").candidates[0]
    assert alone.threshold == before["moods"]  # what else is in the store moves no threshold


def test_rows_farther_than_most_of_the_tasks_own_are_refused(tmp_path, minilm, languages):
    settings = cosine(1, is_abstaining=True, false_refusal_rate=0.1)
    model = ScalableLM.create(tmp_path / "store", minilm, settings)
    model.learn(languages)
    own = model.retrieve([example.prompt for example in languages.examples])
    assert int(own.is_abstained.sum()) == 3  # of 30
    assert torch.equal(own.is_abstained, own.distances[:, 0] > own.thresholds)
    assert not own.weights[own.is_abstained].any()


def test_a_reopened_store_answers_alike(model, minilm):
    again = ScalableLM.open(model.store.path, minilm)
    assert again.config.retrieval == model.config.retrieval
    assert again.ask(QUESTIONS) == model.ask(QUESTIONS)


def test_what_is_left_after_forgetting_is_a_store_never_taught(tmp_path, minilm, languages, moods):
    both = ScalableLM.create(tmp_path / "both", minilm, cosine(1))
    both.learn(languages)
    both.learn(moods)
    both.forget("languages")
    never = ScalableLM.create(tmp_path / "never", minilm, cosine(1))
    never.learn(moods)
    assert both.ask(QUESTIONS) == never.ask(QUESTIONS)
    one, two = (m.store.keys(m.store.task("moods")) for m in (both, never))
    assert torch.equal(one.means, two.means)
    assert torch.equal(one.scales, two.scales)
    assert both.store.check() == []


def test_the_sentence_extractor_serves_this_form_too(tmp_path, minilm, languages, moods):
    pytest.importorskip("sentence_transformers")
    model = ScalableLM.create(tmp_path / "store", minilm, cosine(1, extractor="sentence", top_k=2))
    model.learn(languages)
    model.learn(moods)
    found = model.retrieve(QUESTIONS)
    assert [model.tasks[int(t)].name for t in found.owners[found.nearest]] == TASKS
    assert model.store.keys(model.tasks[0]).num_channels == 384


def test_a_causal_backbone_learns_its_mixtures(tmp_path, smollm2, moods, sums):
    model = ScalableLM.create(tmp_path / "store", smollm2, cosine(1, cosine=CosineConfig(keys_per_task=2)))
    model.learn(sums)
    model.learn(moods)
    answers = model.ask(["what is 3 plus 4?", "i loved it"], max_new_tokens=4)
    assert [a.tasks[0][0] for a in answers] == ["sums", "moods"]
    assert answers[1].text in ("good", "bad")
    assert [record.num_increments for record in model.tasks] == [2, 2]


def test_groups_that_do_not_divide_the_channels_are_refused_before_a_store_is_made(tmp_path, minilm):
    wrong = cosine(1, cosine=CosineConfig(num_groups=5))
    with pytest.raises(
        ConfigError, match=r"^num_groups must divide the 1536 channels of a query, got 5: choose 3 or 4 or 6$"
    ):
        ScalableLM.create(tmp_path / "store", minilm, wrong)
    assert not (tmp_path / "store").exists()
