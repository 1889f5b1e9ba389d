"""Running a stream, on the real MiniLM."""

from __future__ import annotations

import dataclasses

from slm.bench.run import run_stream
from slm.model import ScalableLM
from slm.tasks import Stream
from tests.conftest import config


def with_test(task):
    return dataclasses.replace(task, test=task.examples[::3])


def test_the_matrix_of_asking_after_each_task_is_the_one_evaluate_computes_afterwards(
    tmp_path, minilm, languages, moods
):
    stream = Stream((with_test(languages), with_test(moods)))
    model = ScalableLM.create(tmp_path / "store", minilm, config(2))
    lived = run_stream(model, stream, limit=6)
    computed = model.evaluate(stream, limit=6, has_progress=False)
    assert [row[: i + 1] for i, row in enumerate(lived)] == [list(row) for row in computed.scores]
    assert computed.tasks == ("languages", "moods")
    assert computed.misrouting == 0.0
    assert computed.forgetting is not None
