"""Decisions: exactness, row-wise, independent of order, and refusals at the stated rate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.config import CosineConfig, RetrievalConfig
from slm.retrieval.index import all_distances
from slm.retrieval.keys import TaskKeys, learn_keys, shrink, unpack
from slm.retrieval.retriever import Retriever
from slm.retrieval.scoring import fit_scorer

NUM_CHANNELS = 8


def rows_of(task: int, num_rows: int = 200, seed: int = 0) -> torch.Tensor:
    """Rows of a made-up task: own centre, shared directions, own spread of lengths."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    shared = torch.randn(NUM_CHANNELS, NUM_CHANNELS, generator=torch.Generator().manual_seed(7))
    centre = 3 * torch.randn(NUM_CHANNELS, generator=torch.Generator().manual_seed(task))
    length = torch.rand(num_rows, 1, generator=generator) + 0.5
    return centre + length * torch.randn(num_rows, NUM_CHANNELS, generator=generator) @ shared


def keys_of(task: int, num_rows: int = 200) -> TaskKeys:
    return learn_keys(rows_of(task, num_rows), torch.zeros(num_rows, dtype=torch.long))


def retriever_of(tasks: list[TaskKeys], **options) -> Retriever:
    return Retriever(tasks, sum(t.scatter.double() for t in tasks), RetrievalConfig(**options))


@pytest.fixture(scope="module")
def five() -> list[TaskKeys]:
    return [keys_of(task) for task in range(5)]


def test_posteriors_are_those_of_full_gaussian_densities(five):
    covariance, _ = shrink(unpack(sum(t.scatter.double() for t in five), NUM_CHANNELS) / 1000, 1000.0)
    queries = torch.cat([rows_of(task, 4, seed=1) for task in range(5)]).double()
    slow = torch.stack(
        [torch.distributions.MultivariateNormal(t.means[0], covariance).log_prob(queries) for t in five],
        dim=1,
    ).softmax(1)
    found = retriever_of(five, temperature=1.0, has_runoff=False)(queries)
    fast = torch.zeros(20, 5).scatter(1, found.candidates, found.posterior)
    torch.testing.assert_close(fast.double(), slow, atol=1e-6, rtol=1e-5)


def test_relative_distances_are_the_difference_of_two_full_mahalanobis_distances(five):
    pooled = unpack(sum(t.scatter.double() for t in five), NUM_CHANNELS) / 1000
    covariance, _ = shrink(pooled, 1000.0)
    means = torch.cat([t.means for t in five])
    centre = means.mean(0)
    between = (means - centre).T @ (means - centre) / 5
    queries = rows_of(2, 6, seed=1).double()

    def squared(away, matrix):
        return (away * torch.linalg.solve(matrix, away.T).T).sum(1)

    slow = torch.stack(
        [
            squared(queries - mean, covariance) - squared(queries - centre, covariance + between)
            for mean in means
        ],
        dim=1,
    )
    scorer = fit_scorer(five, sum(t.scatter.double() for t in five), 0.01)
    points = scorer.points(queries)
    fast = scorer.relative_distances(points, all_distances(points, scorer.keys))
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=1e-8)


def test_a_row_is_decided_alone_whatever_its_neighbours_are(five):
    retriever = retriever_of(five)
    queries = torch.cat([rows_of(task, 3, seed=2) for task in range(5)])
    together = retriever(queries)
    for i in range(len(queries)):
        alone = retriever(queries[i : i + 1])
        assert torch.equal(alone.tasks[0], together.tasks[i])
        torch.testing.assert_close(alone.weights[0], together.weights[i], atol=1e-6, rtol=0)
        assert alone.is_abstained[0] == together.is_abstained[i]


def test_only_a_row_whose_decision_hangs_on_rounding_is_read_by_itself(five):
    epsilon, two = torch.finfo(torch.bfloat16).eps, five[:2]
    retriever = Retriever(
        two, sum(t.scatter.double() for t in two), RetrievalConfig(is_abstaining=False), epsilon=epsilon
    )
    clear = rows_of(1, 1, seed=3)
    between = (five[0].means + five[1].means).float() / 2
    nudge = 1e-4 * (five[0].means - five[1].means).float()
    alone, together = torch.cat([clear, between + nudge]), torch.cat([clear, between - nudge])
    expected, swayed = retriever(alone), retriever(together)
    assert expected.tasks[1, 0] != swayed.tasks[1, 0]
    asked: list[int] = []

    def reread(row: int) -> torch.Tensor:
        asked.append(row)
        return alone[row]

    found = retriever(together, reread)
    assert asked == [1]
    assert torch.equal(found.tasks, expected.tasks)
    assert torch.equal(together[1], (between - nudge)[0])  # the caller's queries stay as they were


def test_a_row_near_its_threshold_is_read_by_itself(five):
    retriever = Retriever(five, sum(t.scatter.double() for t in five), RetrievalConfig(), epsilon=1e-3)
    key, direction = five[0].means[0], rows_of(0, 1, seed=9)[0] - five[0].means[0]

    def at(length: float) -> torch.Tensor:
        return (key + length * direction)[None].float()

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if retriever(at(middle)).is_abstained[0] else (middle, high)
    inside, outside = at(low - 1e-3), at(high + 1e-3)
    assert not retriever(inside).is_abstained[0]
    found = retriever(torch.cat([outside, key[None].float()]), lambda _: inside[0])
    assert retriever(outside).is_abstained[0]
    assert not found.is_abstained.any()


def last_before(changes, low: float, high: float) -> tuple[float, float]:
    """The two ends of a tiny interval in which what holds at ``low`` stops holding."""
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return low, high


@pytest.mark.parametrize("form", ["gaussian", "cosine"])
def test_a_row_is_read_by_itself_where_a_weight_is_nearly_dropped(five, form):
    two, config = five[:2], RetrievalConfig(is_abstaining=False, has_runoff=False)
    if form == "cosine":
        two = [dataclasses.replace(task, increments=torch.zeros(1, dtype=torch.long)) for task in two]
        config = RetrievalConfig(
            form="cosine", cosine=CosineConfig(num_groups=1), is_abstaining=False, min_weight=0.3
        )
    retriever = Retriever(two, sum(t.scatter.double() for t in two), config, epsilon=1e-3)
    one, other = (task.means[0] for task in two)

    def at(share: float) -> torch.Tensor:
        return ((1 - share) * one + share * other)[None].float()

    apart, both = last_before(lambda share: float(retriever(at(share)).weights.amin()) > 0, 0.0, 0.5)
    alone, together = at(both + 1e-5), torch.cat([at(apart - 1e-5), one[None].float()])
    assert float(retriever(together).weights[0].amin()) == 0
    asked: list[int] = []
    found = retriever(together, lambda row: (asked.append(row), alone[0])[1])
    assert asked == [0]
    assert torch.equal(found.weights[0], retriever(alone).weights[0])


def test_a_row_is_read_by_itself_where_two_keys_would_nearly_be_the_last_kept():
    axes, own = 3 * torch.eye(NUM_CHANNELS).double(), torch.zeros(200, dtype=torch.long)
    rows = torch.randn(200, NUM_CHANNELS, generator=torch.Generator().manual_seed(0)).double()
    tasks = [learn_keys(rows - rows.mean(0) + axes[i], own) for i in range(3)]
    settings = RetrievalConfig(is_abstaining=False, has_runoff=False, temperature=50.0)
    retriever = Retriever(tasks, sum(t.scatter.double() for t in tasks), settings, epsilon=1e-3)

    def at(share: float) -> torch.Tensor:
        return (1.5 * axes[0] + (1 - share) * axes[1] + share * axes[2])[None].float()

    second, third = last_before(lambda share: retriever(at(share)).tasks[0, 1] == 2, 0.0, 1.0)
    alone, together = at(third + 1e-5), torch.cat([at(second - 1e-5), at(0.0)])
    asked: list[int] = []
    found = retriever(together, lambda row: (asked.append(row), alone[0])[1])
    assert asked == [0]
    assert found.tasks.tolist() == [[0, 2], [0, 1]]


def test_a_refused_row_is_not_read_again_for_weights_it_does_not_get(five):
    queries = torch.cat([rows_of(task, 300, seed=3) for task in range(5)]) + 0.4
    plain, mixing = (
        retriever_of(five, top_k=top_k, has_runoff=False, false_refusal_rate=0.3)(queries) for top_k in (1, 3)
    )
    refused = plain.is_abstained
    assert 100 < int(refused.sum()) < 1400
    assert torch.equal(mixing.margins[refused], plain.margins[refused])
    assert bool((mixing.margins[~refused] < plain.margins[~refused]).any())


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_of_tasks_changes_no_decision(order):
    tasks = [keys_of(task) for task in range(5)]
    queries = torch.cat([rows_of(task, 5, seed=3) for task in range(5)])
    retrievers = retriever_of(tasks), retriever_of([tasks[i] for i in order])
    one, two = (retriever(queries) for retriever in retrievers)
    assert torch.equal(one.owners[one.nearest], torch.tensor(order)[two.owners[two.nearest]])
    assert torch.equal(one.is_abstained, two.is_abstained)
    torch.testing.assert_close(one.thresholds, two.thresholds, atol=1e-4, rtol=1e-5)
    one, two = (retriever.task_distances(queries) for retriever in retrievers)
    torch.testing.assert_close(one.thresholds[:, list(order)], two.thresholds, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(one.distances[:, list(order)], two.distances, atol=1e-4, rtol=1e-5)


def test_taking_a_task_away_leaves_the_retriever_of_the_rest(five):
    total = sum(t.scatter.double() for t in five)
    queries = rows_of(1, 20, seed=4)
    subtracted = Retriever(five[:4], total - five[4].scatter.double(), RetrievalConfig())(queries)
    never = retriever_of(five[:4])(queries)
    torch.testing.assert_close(subtracted.distances, never.distances, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subtracted.thresholds, never.thresholds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 12])
def test_tasks_refuse_more_rows_the_higher_the_stated_rate_and_never_more_than_it(num_tasks):
    """On rows like the learned ones; the rate is calibrated for rows unlike them, so it is an upper bound."""
    shares = []
    for rate in (0.01, 0.3):
        retriever = retriever_of([keys_of(task, 400) for task in range(num_tasks)], false_refusal_rate=rate)
        refused = torch.cat([retriever(rows_of(t, 2000, seed=5)).is_abstained for t in range(num_tasks)])
        shares.append(float(refused.float().mean()))
        assert shares[-1] <= rate
    assert shares[0] < shares[1]


def test_thresholds_agree_with_drawing_from_the_model(five):
    """The closed-form tail against Monte Carlo draws of the same quadratic form."""
    scorer = fit_scorer(five, sum(t.scatter.double() for t in five), 0.05)
    generator = torch.Generator().manual_seed(0)
    thresholds = scorer.thresholds(torch.arange(5))
    shares, projection = scorer.space.shares, scorer.space.projection
    for n, task in enumerate(five):
        scatter = unpack(task.scatter, NUM_CHANNELS)
        spread = projection.T @ scatter @ projection / 200
        factor = torch.linalg.cholesky(spread)
        tau = task.scales[torch.randint(0, 33, (40_000,), generator=generator)].sqrt()[:, None]
        noise = torch.randn(40_000, len(factor), generator=generator, dtype=torch.float64)
        y = scorer.keys[n] + tau * noise @ factor.T
        drawn = ((y - scorer.keys[n]) ** 2).sum(1) - (shares * y * y).sum(1)
        share = float((drawn > thresholds[n]).double().mean())
        assert 0.02 <= share <= 0.07  # the stretch for unseen rows makes the real threshold a little larger


def test_thresholds_reach_farther_where_single_words_are_read_after_a_deep_layer(five):
    queries = rows_of(1, 40, seed=3)
    split, ends = (retriever_of(five, pooling=p)(queries) for p in ("split-ends", "ends"))
    assert bool((ends.thresholds > split.thresholds).all())
    torch.testing.assert_close(ends.distances, split.distances)


def test_thresholds_of_a_sentence_extractor_do_not_follow_a_pooling_it_has_not(five):
    queries = rows_of(1, 40, seed=3)
    mean, ends = (
        retriever_of(five, extractor="sentence", pooling=p)(queries).thresholds for p in ("mean", "ends")
    )
    assert torch.equal(mean, ends)


def test_outsiders_are_refused_and_can_be_let_in(five):
    outside = torch.full((3, NUM_CHANNELS), 60.0)
    refused = retriever_of(five)(outside)
    assert refused.is_abstained.all()
    assert float(refused.weights.abs().max()) == 0.0
    let_in = retriever_of(five, is_abstaining=False)(outside)
    assert not let_in.is_abstained.any()
    torch.testing.assert_close(let_in.weights.sum(1), torch.ones(3))


def test_small_weights_are_dropped_and_the_rest_sums_to_one(five):
    halfway = (five[0].means[0] + five[1].means[0])[None] / 2
    mixed = retriever_of(five, is_abstaining=False, top_k=3, min_weight=0.0, temperature=50.0)(halfway)
    assert (mixed.weights > 0).sum() == 3
    kept = retriever_of(five, is_abstaining=False, top_k=3, min_weight=0.3, temperature=50.0)(halfway)
    assert 1 <= (kept.weights > 0).sum() <= 2
    assert float(kept.weights.sum()) == pytest.approx(1.0)


def test_priors_by_size_weigh_as_bayes_would_and_refuse_the_same_rows():
    tasks = [keys_of(task, rows) for task, rows in enumerate((400, 30, 100, 8, 50))]
    total = sum(float(t.counts.sum()) for t in tasks)
    queries = torch.cat([rows_of(t, 20, seed=9) for t in range(5)] + [torch.full((3, NUM_CHANNELS), 60.0)])
    every = {"top_k": 5, "min_weight": 0.0, "temperature": 7.0, "has_runoff": False}
    plain, sized = retriever_of(tasks, **every), retriever_of(tasks, **every, prior="size")
    priors = torch.tensor([float(t.counts.sum()) / total for t in tasks])
    even, found = plain(queries), sized(queries)
    expected = torch.zeros(len(queries), 5).scatter_(1, even.candidates, even.posterior) * priors ** (1 / 7)
    expected /= expected.sum(1, keepdim=True)
    weights = torch.zeros(len(queries), 5).scatter_(1, found.candidates, found.posterior)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)
    same = even.nearest == found.nearest
    assert bool(even.is_abstained[same].any())
    torch.testing.assert_close(even.is_abstained[same], found.is_abstained[same])


def test_of_two_equally_near_tasks_the_larger_is_nearest_with_priors_by_size():
    tasks = [keys_of(0, 20), keys_of(1, 400)]
    halfway = (tasks[0].means[0] * 0.51 + tasks[1].means[0] * 0.49)[None]
    plain = {"is_abstaining": False, "has_runoff": False}
    assert retriever_of(tasks, **plain)(halfway).nearest.item() == 0
    assert retriever_of(tasks, **plain, prior="size")(halfway).nearest.item() == 1


def test_sixteen_rows_are_enough_to_route():
    tasks = [keys_of(task, 16) for task in range(5)]
    wrong = 0.0
    for i in range(5):
        retrieved = retriever_of(tasks)(rows_of(i, 200, seed=6))
        wrong += float((retrieved.owners[retrieved.nearest] != i).float().mean()) / 5
    assert wrong <= 0.08


def test_two_tasks_with_the_same_rows_do_not_break_the_decision():
    twin = keys_of(0)
    retrieved = retriever_of([twin, dataclasses.replace(twin), keys_of(1)])(rows_of(0, 10, seed=7))
    assert torch.isfinite(retrieved.weights).all()
    torch.testing.assert_close(
        retrieved.weights.sum(1)[~retrieved.is_abstained], torch.ones(10)[~retrieved.is_abstained]
    )


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_tasks_that_nothing_tells_apart_still_refuse_outsiders(rounding):
    rows = rows_of(0).double()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) * rounding
    twins = [learn_keys(own, torch.zeros(200, dtype=torch.long)) for own in (rows, rows * (1 + noise))]
    inside, outside = (
        retriever_of(twins)(rows_of(0, 200, seed=8)),
        retriever_of(twins)(torch.full((5, 8), 60.0)),
    )
    assert float(inside.is_abstained.float().mean()) <= 0.05
    assert outside.is_abstained.all()


@pytest.mark.parametrize("is_abstaining", [True, False])
def test_a_query_that_is_no_number_is_refused(five, is_abstaining):
    queries = torch.cat([torch.full((1, NUM_CHANNELS), float("nan")), five[1].means.float()])
    retriever = retriever_of(five, is_abstaining=is_abstaining)
    found = retriever(queries)
    assert found.is_abstained.tolist() == [True, False]
    assert found.weights[0].tolist() == [0.0, 0.0]
    retriever.task_distances(queries)


def test_a_retriever_that_never_abstains_shows_no_threshold_and_reads_no_scatter(five):
    def load(number: int) -> torch.Tensor:
        raise AssertionError(f"the scatter of task {number} was read")

    config = RetrievalConfig(is_abstaining=False, has_runoff=False)
    seen = Retriever(five, sum(t.scatter.double() for t in five), config, load).task_distances(five[0].means)
    assert torch.isinf(seen.thresholds).all()


def test_the_runner_up_is_seen_behind_a_task_of_many_keys():
    rows = rows_of(0, 400)
    many, one = learn_keys(rows, torch.arange(400) % 50), keys_of(1)
    retriever = retriever_of([many, one])
    halfway = torch.stack([rows_of(0).mean(0), rows_of(1).mean(0)]).mean(0)[None]
    queries = halfway + 0.5 * rows_of(0, 40, seed=9)
    found, seen = retriever(queries), retriever.task_distances(queries)
    owners = found.owners[found.candidates]
    assert (owners == 0).any(1).all()
    assert (owners == 1).any(1).all()
    assert torch.equal(found.owners[found.nearest], seen.distances.argmin(1))
