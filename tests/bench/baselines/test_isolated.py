"""Knowledge learned in isolation: once per run, whole or not at all, and the same as learning again."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from slm.bench.baselines import rival
from slm.bench.baselines.isolated import learn_alone
from slm.errors import LearningError
from slm.model import ScalableLM
from tests.bench.baselines.conftest import SETTINGS, colours, sizes, texts_of


def same(one, two):
    """Whether two tasks' knowledge is the same to the bit."""
    pairs = [(one.keys.means, two.keys.means), (one.keys.scatter, two.keys.scatter)]
    pairs += [(one.head[name], two.head[name]) for name in one.head]
    for a, b in zip(one.increments, two.increments, strict=True):
        pairs += [(getattr(a.pairs[n], half), getattr(b.pairs[n], half)) for n in a.pairs for half in "AB"]
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_a_later_cell_takes_is_what_it_would_have_learned(setup, tmp_path):
    one, two = setup(learned=tmp_path / "shared"), setup(learned=tmp_path / "shared")
    apart = setup(learned=tmp_path / "apart")
    first = learn_alone(one, one.config, colours())
    taken = learn_alone(two, two.config, colours())
    again = learn_alone(apart, apart.config, colours())
    assert (first.is_new, taken.is_new, again.is_new) == (True, False, True)
    assert taken.time_s == first.time_s > 0
    assert same(first.knowledge, taken.knowledge)
    assert same(first.knowledge, again.knowledge)


def test_methods_with_slms_increments_learn_a_task_once_and_another_seed_learns_it_anew(setup, tmp_path):
    shared = tmp_path / "shared"
    for name in ("slm", "mean-key", "oracle"):
        method = rival(name)(setup(learned=shared))
        method.learn(colours())
        assert (method.borrowed_s > 0) == (name != "slm")
    folders = [path for path in shared.iterdir() if path.is_dir()]
    assert len(folders) == 1
    for name in ("slm-cosine", "slm-cosine-voting"):
        rival(name)(setup(settings=SETTINGS[name], learned=shared)).learn(colours())
    assert len([path for path in shared.iterdir() if path.is_dir()]) == 2


def test_the_name_and_the_test_rows_of_a_task_are_not_part_of_what_is_learned(setup, tmp_path):
    cell = setup(learned=tmp_path)
    learn_alone(cell, cell.config, colours())
    renamed = dataclasses.replace(colours(), name="hues", test=())
    assert not learn_alone(cell, cell.config, renamed).is_new
    assert learn_alone(dataclasses.replace(cell, seed=1), cell.config, renamed).is_new


def test_a_failed_learning_leaves_nothing_behind(setup, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise LearningError("the loss became nan")

    cell = setup(learned=tmp_path / "shared")
    with monkeypatch.context() as patch:
        patch.setattr("slm.learning.learn_task", fail)
        with pytest.raises(LearningError, match="nan"):
            learn_alone(cell, cell.config, colours())
    assert not [path for path in (tmp_path / "shared").iterdir() if path.is_dir()]
    assert learn_alone(cell, cell.config, colours()).is_new


def test_cells_that_race_for_a_task_learn_it_once(setup, tmp_path):
    cells = [setup(learned=tmp_path / "shared") for _ in range(3)]
    found = []

    def work(cell):
        found.append(learn_alone(cell, cell.config, colours()))

    threads = [threading.Thread(target=work, args=(cell,)) for cell in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(learned.is_new for learned in found) == [False, False, True]


def taught(setup, name):
    method = rival(name)(setup(settings=SETTINGS.get(name)))
    for task in (colours(), sizes()):
        method.learn(task)
    return method


def test_the_oracle_answers_as_the_model_restricted_to_the_true_task(setup):
    oracle, ours = (taught(setup, name) for name in ("oracle", "slm"))
    questions = texts_of(colours())
    alone = ours.model.restricted(["colours"], is_abstaining=False)
    assert oracle.ask(questions, ["colours"] * len(questions)) == alone.ask(questions)


@pytest.mark.parametrize("name", ["slm", "slm-never-abstaining", "oracle", "mean-key", "slm-cosine"])
def test_asking_again_gives_the_same_and_computes_only_rows_of_another_mixture(setup, monkeypatch, name):
    method = rival(name)(setup(settings=SETTINGS.get(name)))
    asked: list[str] = []
    ask = ScalableLM.ask

    def count(model, questions, **options):
        asked.extend(questions)
        return ask(model, questions, **options)

    for task in (colours(), sizes()):
        method.learn(task)
        known = (colours(), sizes())[: len(method.model.tasks)]
        questions = [text for own in known for text in texts_of(own)]
        owners = [own.name for own in known for _ in texts_of(own)] if method.needs_task_id else None
        expected = method.ask(questions, owners)
        with monkeypatch.context() as patch:
            patch.setattr(ScalableLM, "ask", count)
            again, once_more = (method.ask_again(questions, owners) for _ in range(2))
        for one, two in zip(again, expected, strict=True):
            assert (one.text, one.kind) == (two.text, two.kind)
            assert one.confidence == pytest.approx(two.confidence, abs=1e-5)
            assert dict(one.tasks) == pytest.approx(dict(two.tasks), abs=1e-5)
        assert again == once_more
    # Colours were answered when they were all there was; in the paper's form every row mixes both tasks.
    assert len(asked) == len(questions) + (len(texts_of(colours())) if name == "slm-cosine" else 0)


def test_a_mean_key_is_the_mean_of_the_tasks_queries(setup):
    method = taught(setup, "mean-key")
    record = method.model.store.task("colours")
    queries = method.model.queries([e.prompt for e in colours().examples], is_truncating=True)
    mean = queries.double().mean(0)
    torch.testing.assert_close(method.model.store.keys(record).means[0], mean / mean.norm())
    for question, name in zip(texts_of(sizes()), method.nearest(texts_of(sizes())), strict=True):
        query = method.model.queries([question])[0].double()
        cosines = {
            task: float(torch.cosine_similarity(query, method.model.store.keys(r).means[0], dim=0))
            for task, r in ((r.name, r) for r in method.model.tasks)
        }
        assert name == max(cosines, key=cosines.get)


def test_voting_of_one_row_is_retrieving_for_that_row(setup):
    rows, voting = (taught(setup, name) for name in ("slm-cosine", "slm-cosine-voting"))
    voting.settings["batch_size"] = 1.0
    questions = texts_of(colours()) + texts_of(sizes())
    for one, two in zip(rows.ask(questions), voting.ask(questions, ["any"] * len(questions)), strict=True):
        assert one.text == two.text
        assert one.confidence == pytest.approx(two.confidence, abs=1e-4)
        assert dict(one.tasks) == pytest.approx(dict(two.tasks), abs=1e-4)


def test_voting_of_a_batch_averages_the_similarities_of_its_rows(setup):
    voting = taught(setup, "slm-cosine-voting")
    questions = texts_of(sizes())
    decided = voting.vote(questions)
    scorer = voting.model.knowledge.retriever.scorer
    queries = voting.model.queries(questions).double()
    total = torch.zeros(len(scorer.keys), dtype=torch.float64)
    for query in queries:
        for n, key in enumerate(scorer.keys):
            slices = zip(query.chunk(4), key.chunk(4), strict=True)
            total[n] += sum(torch.cosine_similarity(q, k, dim=0) for q, k in slices) / 4
    best = (total / len(questions)).topk(4)
    assert decided.candidates.tolist() == [best.indices.tolist()] * len(questions)
    torch.testing.assert_close(
        decided.weights[0].double(), best.values / best.values.sum(), atol=1e-5, rtol=1e-4
    )
    answers = voting.ask(questions, ["sizes"] * len(questions))
    assert len({answer.tasks for answer in answers}) == 1
