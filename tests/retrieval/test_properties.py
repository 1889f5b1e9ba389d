"""What may not change a decision: order, split of data, neighbours, duplicates, scale, forgetting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.config import RetrievalConfig
from slm.increments.increment import Increment, LowRankPair
from slm.retrieval.keys import TaskKeys, learn_keys, pack, unpack
from slm.retrieval.retriever import Retrieved, Retriever
from slm.store import Manifest, Store, TaskKnowledge

NUM_CHANNELS, NUM_TASKS, NUM_ROWS = 6, 4, 80


def rows_of(task: int, num_rows: int = NUM_ROWS, seed: int = 0) -> torch.Tensor:
    """Rows of a made-up task, float64: two clusters around a centre of its own."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    mixing = torch.randn(NUM_CHANNELS, NUM_CHANNELS, generator=torch.Generator().manual_seed(5))
    centre = 3 * torch.randn(NUM_CHANNELS, generator=torch.Generator().manual_seed(task))
    rows = centre + torch.randn(num_rows, NUM_CHANNELS, generator=generator) @ mixing
    rows[::2] += 2
    return rows.double()


def keys_of(rows: torch.Tensor) -> TaskKeys:
    """Two keys, of the even rows and the odd ones."""
    return learn_keys(rows, torch.arange(len(rows)) % 2)


def retriever_of(tasks: list[TaskKeys]) -> Retriever:
    return Retriever(tasks, sum(t.scatter.double() for t in tasks), RetrievalConfig(temperature=3.0))


TASKS = [keys_of(rows_of(task)) for task in range(NUM_TASKS)]
# Mostly rows of the tasks, and a few of none.
QUERIES = torch.cat([*(rows_of(task, 12, seed=1) for task in range(NUM_TASKS)), 40 * torch.eye(6).double()])
DECIDED = retriever_of(TASKS)(QUERIES)


def weights_per_task(found: Retrieved, names: list[int] | None = None) -> torch.Tensor:
    """(B, t) weights, task ``names[i]`` being the i-th one taught."""
    names = list(range(NUM_TASKS)) if names is None else names
    weights = torch.zeros(len(found.tasks), NUM_TASKS)
    return weights.scatter_add(1, torch.tensor(names)[found.tasks], found.weights)


def assert_same_decisions(one: Retrieved, two: Retrieved, names: list[int] | None = None) -> None:
    assert torch.equal(one.is_abstained, two.is_abstained)
    torch.testing.assert_close(weights_per_task(one), weights_per_task(two, names), atol=1e-4, rtol=0)
    torch.testing.assert_close(one.distances, two.distances, atol=1e-3, rtol=1e-4)


def test_some_rows_are_clear_some_are_mixed_and_some_are_refused():
    """The properties below say nothing unless every kind of decision is among the rows."""
    largest = DECIDED.weights.max(1).values
    assert (largest > 0.99).any()
    assert ((largest > 0) & (largest < 0.9)).any()
    assert DECIDED.is_abstained.any()


@settings(max_examples=24, deadline=None)
@given(order=st.permutations(range(NUM_TASKS)))
def test_order_of_tasks(order):
    assert_same_decisions(DECIDED, retriever_of([TASKS[i] for i in order])(QUERIES), list(order))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_rows(seed):
    shuffled = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(seed))
    tasks = [
        learn_keys(rows_of(t)[shuffled], (torch.arange(NUM_ROWS) % 2)[shuffled]) for t in range(NUM_TASKS)
    ]
    assert_same_decisions(DECIDED, retriever_of(tasks)(QUERIES))


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(2, NUM_ROWS // 2 - 2))
def test_split_of_data(cut):
    """Statistics of two parts of each task add up to those of the whole."""
    tasks = []
    for number, task in enumerate(TASKS):
        rows = rows_of(number)
        parts = [keys_of(rows[: 2 * cut]), keys_of(rows[2 * cut :])]
        n, m = (part.counts[:, None].double() for part in parts)
        means = (n * parts[0].means + m * parts[1].means) / (n + m)
        scatter = sum(unpack(part.scatter, NUM_CHANNELS) for part in parts)
        away = parts[0].means - parts[1].means
        scatter = scatter + (away * n * m / (n + m)).T @ away
        tasks.append(dataclasses.replace(task, means=means, scatter=pack(scatter).float()))
    assert_same_decisions(DECIDED, retriever_of(tasks)(QUERIES))


@settings(max_examples=20, deadline=None)
@given(chosen=st.lists(st.integers(0, len(QUERIES) - 1), min_size=1, max_size=80))
def test_batch_neighbours_and_duplicates_among_them(chosen):
    found = retriever_of(TASKS)(QUERIES[chosen])
    torch.testing.assert_close(found.weights, DECIDED.weights[chosen], atol=1e-6, rtol=0)
    assert torch.equal(found.candidates, DECIDED.candidates[chosen])
    assert torch.equal(found.is_abstained, DECIDED.is_abstained[chosen])


@pytest.mark.parametrize("times", [2, 5])
def test_training_rows_said_more_than_once_name_no_other_task(times):
    """Rows said twice count as twice the evidence, so the shrinkage follows; no clear row goes elsewhere."""
    tasks = [keys_of(rows_of(task).repeat(times, 1)) for task in range(NUM_TASKS)]
    found = retriever_of(tasks)(QUERIES)
    is_clear = DECIDED.weights.max(1).values > 0.8
    is_clear[12 * NUM_TASKS :] = False  # rows of no task lie where a little shrinkage moves much
    assert int(is_clear.sum()) >= 20
    assert torch.equal(found.nearest[is_clear], DECIDED.nearest[is_clear])


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-10, 10))
def test_scale_of_the_features(exponent):
    scale = 2.0**exponent
    tasks = [keys_of(scale * rows_of(task)) for task in range(NUM_TASKS)]
    assert_same_decisions(DECIDED, retriever_of(tasks)(scale * QUERIES))


@pytest.mark.parametrize("forgotten", [0, 2, 3])
def test_forgetting_restores_a_store_never_taught(tmp_path: Path, forgotten: int):
    kept = [number for number in range(NUM_TASKS) if number != forgotten]
    taught = {"both": range(NUM_TASKS), "never": kept}
    increment = Increment({"layer": LowRankPair(torch.zeros(1, 2), torch.zeros(2, 1))}, 1, 1.0)
    stores = {name: Store.create(tmp_path / name, Manifest("b", "f", {})) for name in taught}
    for name, numbers in taught.items():
        for number in numbers:
            knowledge = TaskKnowledge(
                dataclasses.replace(TASKS[number], increments=torch.zeros(2).long()), (increment,)
            )
            stores[name].commit(f"task-{number}", "classification", ("a",), NUM_ROWS, knowledge)
    stores["both"].forget(f"task-{forgotten}")
    sums, decisions = [], []
    for store in stores.values():
        records = store.tasks()
        assert [record.name for record in records] == [f"task-{number}" for number in kept]
        keys = store.all_keys(records, has_scatter=False)
        sums.append(store.scatter_sum(records))
        lazy = Retriever(keys, sums[-1], RetrievalConfig(), lambda n, s=store, r=records: s.scatter(r[n]))
        decisions.append(lazy(QUERIES))
    assert torch.equal(*sums)
    for field in dataclasses.fields(Retrieved):
        assert torch.equal(*(getattr(found, field.name) for found in decisions)), field.name
