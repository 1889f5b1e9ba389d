"""The paper's form: grouped cosine, learned keys, the random keys mask, weights and refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.config import CosineConfig, RetrievalConfig
from slm.errors import ConfigError, DataError
from slm.retrieval.cosine import (
    CosineScorer,
    attract_keys,
    draw_mask,
    learn_cosine_keys,
    similarities,
    start_keys,
    tail_threshold,
)
from slm.retrieval.keys import TaskKeys
from slm.retrieval.retriever import Retriever

NUM_CHANNELS = 24


def rows_of(task: int, num_rows: int = 200, seed: int = 0) -> torch.Tensor:
    """Rows of a made-up task: two places, which noise hardly moves."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    places = torch.randn(2, NUM_CHANNELS, generator=torch.Generator().manual_seed(task))
    noise = torch.randn(num_rows, NUM_CHANNELS, generator=generator)
    return places[torch.arange(num_rows) % 2] + 0.5 * noise


def keys_of(task: int, num_rows: int = 200, top_k: int = 2, **options) -> TaskKeys:
    config = CosineConfig(**{"min_steps": 300, **options})
    return learn_cosine_keys(rows_of(task, num_rows), config, top_k, seed=0)[0]


def retriever_of(tasks: list[TaskKeys], **options) -> Retriever:
    return Retriever(tasks, torch.zeros(0).double(), RetrievalConfig(form="cosine", **options))


@pytest.fixture(scope="module")
def five() -> list[TaskKeys]:
    return [keys_of(task) for task in range(5)]


def slow_similarity(query, key, num_groups: int) -> float:
    width, total = len(query) // num_groups, 0.0
    for g in range(num_groups):
        q, k = (v[g * width : (g + 1) * width].tolist() for v in (query, key))
        dot = sum(a * b for a, b in zip(q, k, strict=True))
        total += dot / math.sqrt(sum(a * a for a in q)) / math.sqrt(sum(b * b for b in k))
    return total / num_groups


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6, 8, 24])
def test_similarity_is_the_mean_of_the_cosines_of_the_groups(num_groups):
    queries, keys = rows_of(0, 5), rows_of(1, 3)
    slow = [[slow_similarity(q.double(), k.double(), num_groups) for k in keys] for q in queries]
    torch.testing.assert_close(similarities(queries, keys, num_groups), torch.tensor(slow).double())


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ConfigError) as caught:
        keys_of(0, num_groups=5)
    assert str(caught.value) == (
        "num_groups must divide the 24 channels of a query, got 5: choose 3 or 4 or 6"
    )


@pytest.mark.parametrize("num_keys", [1, 4, 12])
def test_keys_start_orthonormal_within_every_group(num_keys):
    keys = start_keys(num_keys, NUM_CHANNELS, 2, torch.Generator().manual_seed(3))
    for group in keys.split(12, dim=1):
        torch.testing.assert_close(group @ group.T, torch.eye(num_keys).double())


def test_more_keys_than_channels_of_a_group_are_orthonormal_by_blocks():
    keys = start_keys(6, NUM_CHANNELS, 6, torch.Generator().manual_seed(3))
    for group in keys.split(4, dim=1):
        torch.testing.assert_close(group[:4] @ group[:4].T, torch.eye(4).double())
        torch.testing.assert_close(group[4:] @ group[4:].T, torch.eye(2).double())


def test_the_mask_hits_each_key_at_its_rate_and_never_all_of_them():
    mask = draw_mask(20_000, 4, 0.2, torch.Generator().manual_seed(0))
    assert float(mask.double().mean()) == pytest.approx(0.2 - 0.2**4 / 4, abs=0.005)
    assert not draw_mask(2_000, 3, 0.99, torch.Generator().manual_seed(0)).all(1).any()
    assert not draw_mask(2_000, 3, 0.0, torch.Generator().manual_seed(0)).any()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_learned_keys_are_those_of_a_loop_over_rows_groups_and_keys(top_k):
    """The slow reference: one row, one group, one key at a time; the same draws, AdamW written out."""
    config = CosineConfig(num_groups=3, batch_size=8, num_epochs=2, min_steps=0, learning_rate=0.01)
    queries = rows_of(0, 20).double()
    fast, losses = attract_keys(queries, config, top_k, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    keys = start_keys(4, NUM_CHANNELS, 3, generator)
    first, second, step, slow = torch.zeros_like(keys), torch.zeros_like(keys), 0, []
    for _ in range(2):
        order = torch.randperm(20, generator=generator)
        for at in range(0, 20, 8):
            rows = order[at : at + 8]
            mask = draw_mask(len(rows), 4, 0.2, generator)
            leaf = keys.clone().requires_grad_()
            kept = []
            for b, row in enumerate(rows):
                free = [n for n in range(4) if not mask[b, n]]
                likeness = {n: slow_similarity(queries[row], keys[n], 3) for n in free}
                for n in sorted(free, key=lambda n: -likeness[n])[:top_k]:
                    cosines = [
                        torch.cosine_similarity(
                            queries[row][8 * g : 8 * g + 8], leaf[n][8 * g : 8 * g + 8], 0
                        )
                        for g in range(3)
                    ]
                    kept.append(sum(cosines) / 3)
            loss = -sum(kept) / len(kept)
            loss.backward()
            gradient = leaf.grad * min(1.0, 0.1 / float(leaf.grad.norm() + 1e-6))
            step += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            keys = keys * (1 - 0.01 * 0.01)
            keys -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            slow.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(slow), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fast, keys, atol=1e-6, rtol=1e-6)


def test_the_loss_falls_and_is_remembered_in_at_most_200_means():
    config = CosineConfig(min_steps=1000)
    keys, history = learn_cosine_keys(rows_of(0), config, 2, seed=0)
    assert history.losses[-1] < history.losses[0] - 0.3
    assert (len(history.losses), history.steps_per_loss) == (167, 6)  # 77 passes of 13 steps
    assert keys.num_keys == 4
    assert int(keys.counts.sum()) == 200
    assert keys.increments.tolist() == [0, 1, 2, 3]
    assert keys.scatter.shape == (0,)
    for group in keys.means.split(4, dim=1):
        torch.testing.assert_close(group.norm(dim=1), torch.ones(4).double())


def test_the_same_seed_gives_the_same_keys_to_the_bit_and_another_gives_others():
    one, two, other = (
        learn_cosine_keys(rows_of(0), CosineConfig(min_steps=50), 2, seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one.means, two.means)
    assert torch.equal(one.scales, two.scales)
    assert not torch.allclose(one.means, other.means)


def test_the_papers_passes_alone_can_be_asked_for():
    history = learn_cosine_keys(rows_of(0), CosineConfig(min_steps=0), 2, seed=0)[1]
    assert len(history.losses) * history.steps_per_loss == 3 * math.ceil(200 / 16)


def test_the_mask_lets_more_than_one_key_win_rows():
    lone = keys_of(0, top_k=1, key_mask=0.0)
    shared = keys_of(0, top_k=1, key_mask=0.2)
    assert int((shared.counts > 0).sum()) >= int((lone.counts > 0).sum())
    assert int((shared.counts > 0).sum()) > 1


def test_a_query_that_is_not_finite_is_named_by_its_row():
    queries = rows_of(0)
    queries[6, 2] = float("inf")
    with pytest.raises(DataError, match=r"^the query of training row 7 is not finite"):
        learn_cosine_keys(queries, CosineConfig(), 2, seed=0)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01, 0.0001])
def test_a_threshold_is_the_quantile_of_the_tasks_own_distances(rate):
    rows, keys = rows_of(0, 4000), keys_of(0, 4000)
    distances = 1 - similarities(rows, keys.means, 6).max(1).values
    refused = float((distances > tail_threshold(keys.scales, rate)).double().mean())
    assert refused == pytest.approx(rate, rel=0.15, abs=1 / 4000)


@pytest.mark.parametrize("num_tasks", [1, 5])
def test_tasks_refuse_their_own_new_rows_at_the_stated_rate_however_many_there_are(num_tasks):
    retriever = retriever_of([keys_of(task, 1000) for task in range(num_tasks)], false_refusal_rate=0.1)
    refused = torch.cat([retriever(rows_of(t, 1000, seed=5)).is_abstained for t in range(num_tasks)])
    assert 0.07 <= float(refused.double().mean()) <= 0.13


def test_rows_find_their_task_and_their_weights_are_similarities_over_their_sum(five):
    retriever = retriever_of(five, is_abstaining=False, top_k=4, min_weight=0.0)
    keys = torch.cat([task.means for task in five])
    for task in range(5):
        queries = rows_of(task, 20, seed=3)
        found = retriever(queries)
        assert float((found.owners[found.nearest] == task).double().mean()) >= 0.85
        for b, query in enumerate(queries):
            slow = torch.tensor([slow_similarity(query.double(), key, 6) for key in keys])
            best = slow.topk(4)
            assert found.tasks[b].tolist() == [int(n) // 4 for n in best.indices]
            assert found.increments[b].tolist() == [int(n) % 4 for n in best.indices]
            expected = best.values.clamp_min(0) / best.values.clamp_min(0).sum()
            torch.testing.assert_close(found.weights[b], expected.float(), atol=1e-5, rtol=1e-5)


def test_a_row_that_resembles_no_key_is_refused_or_given_to_the_nearest(five):
    against = -sum(task.means.sum(0) for task in five)[None].float()
    assert retriever_of(five)(against).is_abstained.all()
    weights = retriever_of([five[0]], is_abstaining=False, top_k=3)(
        -five[0].means.sum(0)[None].float()
    ).weights
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


def test_a_smaller_temperature_sharpens_and_no_number_of_keys_leaves_a_row_without_weights(five):
    queries = rows_of(2, 10, seed=4)
    plain = retriever_of(five, is_abstaining=False, top_k=4)(queries).weights
    sharp = retriever_of(five, is_abstaining=False, top_k=4, temperature=0.1)(queries).weights
    assert (sharp[:, 0] > plain[:, 0]).all()
    many = [dataclasses.replace(five[0], means=five[0].means.clone()) for _ in range(8)]
    spread = retriever_of(many, is_abstaining=False, top_k=32, min_weight=0.3)(rows_of(0, 5, seed=4)).weights
    torch.testing.assert_close(spread.sum(1), torch.ones(5))


def test_a_row_is_decided_alone_and_whatever_its_length(five):
    retriever = retriever_of(five)
    queries = torch.cat([rows_of(task, 3, seed=2) for task in range(5)])
    together, scaled = retriever(queries), retriever(queries * 37)
    for i in range(len(queries)):
        alone = retriever(queries[i : i + 1])
        for other in (alone.tasks[0], scaled.tasks[i]):
            assert torch.equal(other, together.tasks[i])
        torch.testing.assert_close(alone.weights[0], together.weights[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(scaled.weights[i], together.weights[i], atol=1e-6, rtol=0)
        assert alone.is_abstained[0] == together.is_abstained[i] == scaled.is_abstained[i]


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_of_tasks_changes_no_decision(five, order):
    queries = torch.cat([rows_of(task, 5, seed=3) for task in range(5)])
    one, two = retriever_of(five)(queries), retriever_of([five[i] for i in order])(queries)
    assert torch.equal(one.owners[one.nearest], torch.tensor(order)[two.owners[two.nearest]])
    assert torch.equal(one.is_abstained, two.is_abstained)
    assert torch.equal(one.weights, two.weights)


def test_distances_are_one_minus_similarity(five):
    scorer = CosineScorer(five, 6, 0.01)
    queries = rows_of(1, 6)
    queries[2, :4] = 0.0  # a slice of zeros has cosine 0 with everything
    points = scorer.points(queries)
    squared = ((points[:, None] - scorer.keys) ** 2).sum(2)
    expected = 1 - similarities(queries, torch.cat([t.means for t in five]), 6)
    torch.testing.assert_close(scorer.relative_distances(points, squared), expected)
    assert torch.isfinite(expected).all()


def test_the_vector_index_serves_this_form_as_the_exact_one_does(five):
    pytest.importorskip("faiss")
    queries = torch.cat([rows_of(task, 10, seed=8) for task in range(5)])
    exact, vector = (retriever_of(five, index=engine)(queries) for engine in ("exact", "vector"))
    assert torch.equal(exact.candidates, vector.candidates)
    assert torch.equal(exact.weights, vector.weights)
    assert torch.equal(exact.is_abstained, vector.is_abstained)
