"""Replay: what is kept, and that every batch of a later task really holds some of it."""

from __future__ import annotations

import pytest

from slm.bench.baselines import rival
from slm.bench.baselines.replay import Mixed
from slm.bench.baselines.rows import label_rows
from tests.bench.baselines.conftest import colours, sizes


@pytest.mark.parametrize(("name", "num_kept"), [("replay-1", 1), ("replay-10", 4)])
def test_every_batch_of_a_later_task_holds_rows_of_the_earlier_one(name, num_kept, setup):
    method = rival(name)(setup("BERT", {"replayed_per_row": 0.25}, batch_size=8))
    method.learn(colours(40))
    assert len(method.kept) == num_kept
    assert len({example.target for _, example in method.kept}) == min(num_kept, 2)
    batches = []
    inner = method.knowledge.outcome

    def watched(batch, labels, weights):
        if method.knowledge.training:
            batches.append(labels.tolist())
        return inner(batch, labels, weights)

    method.knowledge.outcome = watched
    method.learn(sizes(40))
    old = [method.knowledge.labels.index(label) for label in colours().labels]
    assert len(batches) == 5  # 36 rows are left to learn from
    assert all(sum(label in old for label in batch) in (1, 2) for batch in batches)
    assert sum(label in old for batch in batches for label in batch) in (9, 10)


def test_kept_rows_take_turns_and_new_rows_stay_as_they_are(setup):
    backbone = setup("BERT").backbone
    new, old = (
        label_rows(backbone, task.examples, task.labels, True, task.name) for task in (colours(12), sizes(6))
    )
    mixed = Mixed(new, old, 1.5, seed=0)
    taken = [mixed[i] for i in range(len(mixed))]
    assert [row.row for row in taken] == [row.row for row in new]
    companions = [row.row for item in taken for row in item.companions]
    assert len(companions) == 18
    assert all(companions.count(row.row) == 3 for row in old)


def test_the_kept_words_count_as_bytes(setup):
    plain, replay = (rival(name)(setup("BERT")) for name in ("sequential-lora", "replay-10"))
    plain.learn(colours(40))
    replay.learn(colours(40))
    words = sum(len(e.prompt_text.encode()) + len(e.target.encode()) for _, e in replay.kept)
    assert replay.size_bytes == plain.size_bytes + words
