"""Running a stream, and the baseline beside it, on the real MiniLM."""

from __future__ import annotations

import dataclasses

from slm.bench.baselines.sequential import SequentialConfig, SequentialFineTuning
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


def test_sequential_fine_tuning_learns_the_last_task_with_one_head_over_all_labels(languages, moods):
    rival = SequentialFineTuning("minilm", config(1), SequentialConfig(num_epochs=8, learning_rate=1e-4))
    rival.learn(languages)
    rival.learn(moods)
    assert rival.labels == ["french", "german", "bad", "good"]
    answers = rival.ask([e.prompt for e in moods.examples])
    assert sum(a.text == e.target for a, e in zip(answers, moods.examples, strict=True)) >= 0.8 * len(answers)
