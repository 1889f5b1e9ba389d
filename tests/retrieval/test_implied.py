"""The confusion that keys imply against rows that were really drawn, and against a formula."""

from __future__ import annotations

import math

import pytest
import torch

from slm.retrieval.implied import implied_confusion
from tests.retrieval.test_chart import make, rows_of


def test_it_foretells_where_rows_never_seen_go():
    learned, fresh = rows_of(4, 500, seed=1, distance=0.7), rows_of(4, 4000, seed=2, distance=0.7)
    retriever = make(learned, is_abstaining=False, has_runoff=False)
    implied = implied_confusion(retriever, num_draws=4000)
    for task, own in enumerate(fresh):
        found = retriever(own)
        seen = torch.bincount(found.owners[found.nearest], minlength=5) / len(own)
        assert float(seen[task]) < 0.97  # there is something to foretell
        assert implied[task].tolist() == pytest.approx(seen.tolist(), abs=0.06)


def test_rows_of_distant_tasks_are_refused_at_the_stated_rate_and_never_confused():
    implied = implied_confusion(
        make(rows_of(4, 500, seed=1, distance=9.0), false_refusal_rate=0.1), num_draws=4000
    )
    assert implied.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert implied[:, -1].tolist() == pytest.approx([0.1] * 4, abs=0.02)
    assert (implied[:, :-1] - torch.diag(implied.diagonal())).sum() == 0


def test_two_tasks_on_a_line_are_confused_as_often_as_the_normal_tail_says():
    rows = [
        centre + torch.randn(2000, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, centre in enumerate((-1.0, 1.0))
    ]
    implied = implied_confusion(make(rows, is_abstaining=False), num_draws=20000)
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    assert implied[0, 1].item() == pytest.approx(tail, abs=0.03)
    assert implied[1, 0].item() == pytest.approx(tail, abs=0.03)


def test_with_priors_shares_still_sum_to_one():
    retriever = make(rows_of(3, 80, seed=1), prior="size")
    implied = implied_confusion(retriever)
    assert implied.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_the_same_store_gives_the_same_shares():
    retriever = make(rows_of(3, 80, seed=1))
    assert torch.equal(implied_confusion(retriever), implied_confusion(retriever))


def test_one_task_implies_nothing():
    assert implied_confusion(make(rows_of(1, 80, seed=1))) is None
