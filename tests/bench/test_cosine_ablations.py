"""Ablations of the paper's form."""

from __future__ import annotations

import pytest
import torch

from slm.bench.cosine_ablations import ablations, mean_keys, measure
from slm.config import CosineConfig, RetrievalConfig


def queries_of(task: int, num_rows: int, seed: int) -> torch.Tensor:
    """Queries around a centre of the task's own."""
    centre = torch.randn(24, generator=torch.Generator().manual_seed(task))
    return centre + torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(100 * task + seed))


@pytest.fixture(scope="module")
def splits():
    return {f"task{t}": (queries_of(t, 60, 1), queries_of(t, 40, 2)) for t in range(3)}


def test_every_variant_and_both_baselines_are_measured(splits):
    rows = {row.name: row for row in ablations(splits, base=CosineConfig(min_steps=150), top_k=2)}
    assert list(rows) == [
        "6 groups, 4 keys, K = 2, mask 0.2",
        "3 passes and no more",
        "no groups",
        "no mask",
        "1 key per task",
        "2 keys per task",
        "8 keys per task",
        "K = 1",
        "K = 4",
        "mean cosine key",
        "16 k-means keys",
    ]
    learned = rows["6 groups, 4 keys, K = 2, mask 0.2"]
    assert learned.misrouting < 0.25
    assert learned.false_refusals is not None
    assert learned.loss < rows["3 passes and no more"].loss
    assert rows["mean cosine key"].loss is None
    assert rows["16 k-means keys"].false_refusals is None


def test_the_mean_key_baseline_is_plain_cosine_to_the_means(splits):
    keys = {task: mean_keys(train, 1, 0) for task, (train, _) in splits.items()}
    config = RetrievalConfig(form="cosine", top_k=1, cosine=CosineConfig(num_groups=1))
    means = torch.stack([train.mean(0) for train, _ in splits.values()])
    slow = [
        float((torch.cosine_similarity(test[:, None], means, dim=2).argmax(1) != n).double().mean())
        for n, (_, test) in enumerate(splits.values())
    ]
    assert measure(splits, keys, config)[0] == pytest.approx(sum(slow) / 3)
    assert mean_keys(queries_of(0, 60, 1), 16, 0).num_keys == 16
