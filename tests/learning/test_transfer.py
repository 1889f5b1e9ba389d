"""Starting a task from earlier ones: the probe, the gate, and what it may not touch."""

import dataclasses
import hashlib

import pytest
import torch

from slm import ScalableLM, Task
from slm.config import Config, IncrementConfig, LearningConfig
from slm.errors import ConfigError
from slm.increments.increment import Increment, LowRankPair, concatenate, lower_rank
from slm.learning.learnable import Learnable
from slm.learning.learner import training_rows
from slm.learning.transfer import PENALTIES, begin_from, features, fit_probe, is_certain
from slm.store import TaskKnowledge
from tests.backbone.families import load, save
from tests.conftest import LANGUAGES, MOODS, rows_of

QUICK = LearningConfig(num_epochs=1, validation_share=0.0, has_progress=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(save("BERT", tmp_path_factory.mktemp("bert")))


def new_model(folder, backbone, **learning):
    return ScalableLM.create(folder, backbone, Config(learning=dataclasses.replace(QUICK, **learning)))


def digests(folder):
    """Every file of the store that belongs to a task, by its digest."""
    files = sorted(p for p in (folder / "tasks").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def random_increment(like, size, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor):
        return size * torch.randn(tensor.shape, generator=generator)

    pairs = {name: LowRankPair(drawn(pair.A), drawn(pair.B)) for name, pair in like.pairs.items()}
    return Increment(pairs, like.rank, like.alpha)


def knowledge_of(model, name):
    record = model.store.task(name)
    return model.store.increment(record, 0), model.store.head(record)


def are_equal(one, two):
    pairs = zip(one[0].pairs.values(), two[0].pairs.values(), strict=True)
    return all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in pairs) and all(
        torch.equal(one[1][part], two[1][part]) for part in one[1]
    )


def test_the_probe_is_a_ridge_regression_fitted_again_without_each_row():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator)
    labels = torch.tensor([0, 1, 2] * 4)
    scaled = x.double() - x.double().mean(0)
    scaled = scaled / scaled.square().sum(1).mean().sqrt()
    with_one = torch.cat([scaled, torch.ones(12, 1, dtype=torch.float64)], 1)
    wanted = torch.nn.functional.one_hot(labels).double()
    slow = []
    for penalty in PENALTIES:
        errors = []
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            a, b = with_one[rest], wanted[rest]
            weight = torch.linalg.solve(a.T @ a + penalty * torch.eye(6, dtype=torch.float64), a.T @ b)
            errors.append((with_one[i] @ weight - wanted[i]).square().sum())
        slow.append(torch.stack(errors))
    best = min(slow, key=lambda errors: float(errors.mean()))
    torch.testing.assert_close(fit_probe(x, wanted).errors, best)


def test_the_probe_head_on_plain_features_is_the_regression_that_leans_on_earlier_heads():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 20, generator=generator)
    x = torch.randn(30, 20, generator=generator)
    labels = torch.nn.functional.one_hot((x @ heads.T).argmax(1)).double()
    alone, leaning = fit_probe(x, labels), fit_probe(x, labels, heads)
    assert leaning.errors.mean() < alone.errors.mean()  # the labels are what those heads read
    scores = x.double() @ leaning.weight.T + leaning.bias
    assert (scores.argmax(1) == labels.argmax(1)).float().mean() > 0.9
    fresh = torch.randn(500, 20, generator=generator)
    right = [
        ((fresh.double() @ probe.weight.T + probe.bias).argmax(1) == (fresh @ heads.T).argmax(1))
        .float()
        .mean()
        for probe in (alone, leaning)
    ]
    assert right[1] > right[0]


def test_a_lower_rank_keeps_the_largest_singular_values_of_every_layer(tiny, tmp_path):
    generator = torch.Generator().manual_seed(1)
    pair = LowRankPair(torch.randn(6, 9, generator=generator), torch.randn(7, 6, generator=generator))
    lowered = lower_rank(Increment({"x": pair}, 6, 12.0), 2)
    u, s, v = torch.linalg.svd(2.0 * pair.B @ pair.A, full_matrices=False)
    found = lowered.pairs["x"]
    torch.testing.assert_close(
        lowered.scale * found.B @ found.A, u[:, :2] * s[:2] @ v[:2], atol=1e-4, rtol=1e-4
    )
    assert lowered.rank == 2
    assert lower_rank(lowered, 4) is lowered
    half = Increment({"x": LowRankPair(pair.A[:2], pair.B[:, :2])}, 2, 2.0)
    twice = lower_rank(concatenate([half, half], [0.5, 0.5]), 2)  # of rank 4 on paper, 2 in truth
    torch.testing.assert_close(twice.pairs["x"].B @ twice.pairs["x"].A, pair.B[:, :2] @ pair.A[:2])


def test_a_gain_counts_only_beyond_chance():
    noise = torch.tensor([0.1, -0.08] * 8, dtype=torch.float64)  # above zero on average, but not surely
    assert not is_certain(noise)
    assert not is_certain(torch.zeros(16))
    assert not is_certain(torch.ones(1))
    assert is_certain(noise + 0.03)


def test_new_increments_begin_as_what_they_are_started_from(tiny, tmp_path, moods):
    model = new_model(tmp_path / "store", tiny)
    rows = training_rows(model, moods, moods.examples, QUICK)[:6]
    learnable = Learnable(tiny, model.targets, IncrementConfig(), QUICK, 2)
    start = lower_rank(random_increment(learnable.increments()[0], 0.2), 4)  # leaves four ranks free
    head = fit_probe(features(model, rows, start), torch.eye(2).double()[[0, 1] * 3])
    begin_from(learnable, start, head)
    begun = learnable.increments()[0]
    torch.testing.assert_close(
        features(model, rows, begun), features(model, rows, start), atol=1e-4, rtol=1e-4
    )
    for pair in begun.pairs.values():
        assert not pair.B[:, 4:].any()  # what is free changes nothing,
        assert pair.A[4:].any(1).all()  # and can still learn
    torch.testing.assert_close(learnable.head_tensors()["weight"], head.weight.float())
    assert learnable.parameter_groups()[1]["lr"] == QUICK.learning_rate


def test_a_harmful_start_is_refused_and_the_task_is_learned_alone_to_the_bit(
    minilm, tmp_path, moods, languages
):
    alone = new_model(tmp_path / "alone", minilm)
    alone.learn(languages)
    model = new_model(tmp_path / "store", minilm, start="retrieved")
    model.learn(moods)
    record = model.store.task("moods")
    wild = random_increment(model.store.increment(record, 0), 30.0)  # drowns what the backbone says
    keys, head = model.store.keys(record), model.store.head(record)
    model.forget("moods")
    model.store.commit("moods", record.kind, record.labels, 30, TaskKnowledge(keys, (wild,), head), {})
    report = model.learn(languages)
    errors = model.store.task("languages").metadata["start_errors"]
    assert report.started_from == {}
    assert errors["moods"] > errors["none"]
    assert are_equal(knowledge_of(model, "languages"), knowledge_of(alone, "languages"))


def test_without_a_start_what_a_task_learns_does_not_depend_on_earlier_ones(tiny, tmp_path, moods, languages):
    one = new_model(tmp_path / "one", tiny)
    one.learn(moods)
    one.learn(languages)
    two = new_model(tmp_path / "two", tiny)
    two.learn(languages)
    assert are_equal(knowledge_of(one, "languages"), knowledge_of(two, "languages"))
    assert "started_from" not in one.store.task("languages").metadata


@pytest.fixture(scope="module")
def halves():
    """One task's rows cut into two tasks, each with every label."""
    rows = rows_of(MOODS)
    return Task.from_rows("first", rows[0::2]), Task.from_rows("second", rows[1::2])


def test_a_twin_starts_from_its_twin_learns_more_of_it_and_leaves_its_files_alone(minilm, tmp_path, halves):
    first, second = halves
    model = new_model(tmp_path / "store", minilm, start="retrieved", num_epochs=8)
    model.learn(first)
    model.learn(Task.from_rows("languages", rows_of(LANGUAGES)), num_epochs=1)
    before = digests(model.store.path)
    few = dataclasses.replace(second, examples=second.examples[::2])
    report = model.learn(few, num_epochs=1)
    assert report.started_from
    assert "first" in report.started_from
    record = model.store.task("second")
    assert record.metadata["started_from"] == report.started_from
    after = digests(model.store.path)
    assert {name: after[name] for name in before} == before

    alone = new_model(tmp_path / "alone", minilm)
    alone.learn(few)
    rows = training_rows(model, second, second.examples, QUICK)
    labels = torch.tensor([row.label for row in rows])
    losses = []
    for learned in (model, alone):
        increment, head = knowledge_of(learned, "second")
        logits = features(learned, rows, increment) @ head["weight"].T + head["bias"]
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert losses[0] < 0.8 * losses[1]


def test_starts_are_refused_where_no_head_names_labels(tmp_path, moods):
    model = new_model(tmp_path / "store", load(save("LLaMA", tmp_path / "llama")))
    with pytest.raises(ConfigError, match=r"start is 'retrieved'.*causal backbone: set start to 'none'"):
        model.learn(moods, start="retrieved")
    assert model.tasks == ()


def test_an_unknown_start_is_named():
    with pytest.raises(ConfigError, match="start must be one of none, retrieved, got 'retrieve'"):
        LearningConfig(start="retrieve")
