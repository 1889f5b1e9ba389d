"""Indexes: exact against a slow reference, whatever the neighbours; the vector index nearly so."""

from __future__ import annotations

import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.config import RetrievalConfig
from slm.errors import ConfigError
from slm.retrieval import index as index_module
from slm.retrieval.index import ExactIndex, KeyIndex, VectorIndex, all_distances, build_index


def some_keys(num_keys: int, num_channels: int = 12, seed: int = 0, num_clusters: int = 10) -> torch.Tensor:
    """Keys in clusters that every seed puts at the same places."""
    places = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(num_clusters, num_channels, generator=places, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_keys, num_channels, generator=generator, dtype=torch.float64)
    return centres[torch.randint(num_clusters, (num_keys,), generator=generator)] + noise


def slow_search(points: torch.Tensor, keys: torch.Tensor, num: int) -> list[list[tuple[float, int]]]:
    """(squared distance, key number) of the nearest keys, one Python loop per row and key."""
    return [
        sorted((float(((key - point) ** 2).sum()), n) for n, key in enumerate(keys))[:num] for point in points
    ]


def assert_same(index: KeyIndex, points: torch.Tensor, num: int) -> None:
    squared, numbers = index.search(points, num)
    slow = slow_search(points, index.keys, num)
    assert numbers.tolist() == [[n for _, n in row] for row in slow]
    expected = torch.tensor([[d for d, _ in row] for row in slow], dtype=torch.float64)
    torch.testing.assert_close(squared, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num", [1, 5, 32, 200, 1000])
def test_the_exact_index_is_a_loop_over_all_keys(num):
    keys = some_keys(200)
    assert_same(ExactIndex(keys), some_keys(9, seed=1), num)


def test_the_vector_index_is_a_loop_over_all_keys_when_it_opens_every_cell():
    pytest.importorskip("faiss")
    keys = some_keys(400)
    assert_same(VectorIndex(keys, num_probes=10), some_keys(9, seed=1), 32)


def test_of_equally_distant_keys_the_smaller_number_comes_first():
    keys = some_keys(60).repeat(20, 1)  # 20 copies of each, far more than the float32 pass keeps
    points = keys[[3, 17]]
    squared, numbers = ExactIndex(keys).search(points, 5)
    assert numbers.tolist() == [[3 + 60 * i for i in range(5)], [17 + 60 * i for i in range(5)]]
    assert squared.tolist() == [[0.0] * 5] * 2


def test_keys_that_float32_cannot_tell_apart_are_ranked_exactly():
    # A thousand keys a float32 rounding apart, far from the origin: the first pass sees noise.
    step = torch.linspace(0, 1e-4, 1000, dtype=torch.float64)[torch.randperm(1000)]
    keys = torch.full((1000, 4), 1000.0, dtype=torch.float64)
    keys[:, 0] += step
    point = torch.full((1, 4), 1000.0, dtype=torch.float64)
    assert ExactIndex(keys).search(point, 8)[1][0].tolist() == step.argsort()[:8].tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), num_rows=st.integers(2, 70), num=st.integers(1, 40))
def test_a_row_finds_the_same_alone_and_among_others(seed, num_rows, num):
    index, points = ExactIndex(some_keys(500, seed=seed)), some_keys(num_rows, seed=seed + 1)
    squared, numbers = index.search(points, num)
    row = seed % num_rows
    alone_squared, alone_numbers = index.search(points[row : row + 1], num)
    assert torch.equal(alone_squared[0], squared[row])
    assert torch.equal(alone_numbers[0], numbers[row])


def test_no_rows_find_nothing():
    squared, numbers = ExactIndex(some_keys(100)).search(torch.zeros(0, 12, dtype=torch.float64), 4)
    assert squared.shape == numbers.shape == (0, 4)


def test_the_vector_index_finds_nearly_all_of_many_keys_and_the_same_twice():
    pytest.importorskip("faiss")
    keys, points = some_keys(20_000, 32, 1, 200), some_keys(50, 32, 2, 200)
    exact, found = ExactIndex(keys).search(points, 32)[1], VectorIndex(keys).search(points, 32)
    hits = (exact[:, :, None] == found[1][:, None, :]).any(2)
    assert float(hits.double().mean()) >= 0.99
    again = VectorIndex(keys).search(points, 32)
    assert torch.equal(again[0], found[0])
    assert torch.equal(again[1], found[1])


def test_cells_with_too_few_keys_are_no_reason_to_return_fewer():
    pytest.importorskip("faiss")
    keys = some_keys(400)
    assert_same(VectorIndex(keys, num_probes=1), some_keys(5, seed=1), 200)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), num_groups=st.sampled_from([1, 2, 3, 6]))
def test_the_nearest_of_group_normalised_keys_is_the_most_similar_by_mean_group_cosine(seed, num_groups):
    """The cosine form is served by the same search: |p − k|² = 2G − 2 pᵀk."""

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.unflatten(1, (num_groups, -1)), dim=2).flatten(1)

    keys, queries = some_keys(200, seed=seed), some_keys(6, seed=seed + 1)
    similarity = torch.stack(
        [
            torch.nn.functional.cosine_similarity(
                q.unflatten(0, (num_groups, -1))[None], keys.unflatten(1, (num_groups, -1)), dim=2
            ).mean(1)
            for q in queries
        ]
    )
    squared, numbers = ExactIndex(normalised(keys)).search(normalised(queries), 10)
    best = similarity.topk(10, dim=1)
    assert torch.equal(numbers, best.indices)
    torch.testing.assert_close(1 - squared / (2 * num_groups), best.values, atol=1e-12, rtol=0)


def test_distances_to_all_keys_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    points, keys = some_keys(4, seed=1), some_keys(50)
    whole = all_distances(points, keys)
    monkeypatch.setattr(index_module, "_CHUNK", 100)
    assert torch.equal(all_distances(points, keys), whole)


def test_the_engine_follows_the_setting_and_the_number_of_keys(monkeypatch):
    pytest.importorskip("faiss")
    keys = some_keys(100)
    monkeypatch.setattr(index_module, "NUM_KEYS_FOR_VECTOR", 100)
    assert isinstance(build_index(keys, RetrievalConfig()), VectorIndex)
    assert isinstance(build_index(keys[:99], RetrievalConfig()), ExactIndex)
    assert isinstance(build_index(keys, RetrievalConfig(index="exact")), ExactIndex)
    assert isinstance(build_index(keys[:50], RetrievalConfig(index="vector")), VectorIndex)


def test_without_faiss_auto_stays_exact_and_vector_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_faiss(name, *args, **options):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    monkeypatch.setattr(index_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(index_module, "NUM_KEYS_FOR_VECTOR", 50)
    assert isinstance(build_index(some_keys(60), RetrievalConfig()), ExactIndex)
    with pytest.raises(
        ConfigError, match=r"^index 'vector' needs FAISS: pip install 'scalable-lm\[index\]', or"
    ):
        build_index(some_keys(60), RetrievalConfig(index="vector"))


@pytest.mark.parametrize(
    ("backend", "precision", "rounding"),
    [("cuda", "tf32", 2.0**-24), ("mkldnn", "tf32", 2.0**-11), ("mkldnn", "bf16", 2.0**-8)],
)
def test_a_precision_set_by_torch_s_newer_switch_is_read_too(backend, precision, rounding):
    matmul = getattr(getattr(torch.backends, backend), "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    if before is None:
        pytest.skip("this torch has the older switch only")
    matmul.fp32_precision = precision
    try:
        assert index_module._product_rounding(torch.device("cpu")) == rounding
        assert_same(ExactIndex(some_keys(200)), some_keys(9, seed=1), 5)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("precision", "rounding"), [("highest", 2.0**-24), ("medium", 2.0**-8)])
def test_a_precision_set_by_torch_s_older_switch_is_read(precision, rounding):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert index_module._product_rounding(torch.device("cpu")) == rounding
    finally:
        torch.set_float32_matmul_precision(before)
