"""Streams from folders: order, names, mixed batches."""

import json
import os
from pathlib import Path

import pytest

from slm.errors import ConfigError, DataError, TaskError
from slm.tasks import Example, Stream, Task, TaskKind

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no task data at {DATA}: set SLM_DATA")


def write_task(folder: Path, name: str, num_rows: int = 8, has_test: bool = True) -> None:
    (folder / name).mkdir(parents=True)
    for part in ("train", "test") if has_test else ("train",):
        rows = [{"text": f"{name} {part} {n}", "label": "ab"[n % 2]} for n in range(num_rows)]
        (folder / name / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_folder_is_read_by_name_and_in_the_order_asked_for(tmp_path):
    write_task(tmp_path, "news")
    write_task(tmp_path, "films", has_test=False)
    (tmp_path / "notes").mkdir()
    stream = Stream.load(tmp_path)
    assert stream.names == ("films", "news")
    assert [len(task.test) for task in stream] == [0, 8]
    assert Stream.load(tmp_path, ["news", "films"]).names == ("news", "films")
    assert stream.order(["news", "films"]) == Stream.load(tmp_path, ["news", "films"])
    assert len(stream) == 2
    assert stream["news"] is stream[1] is stream[-1]


def test_limits_apply_to_each_task(tmp_path):
    write_task(tmp_path, "news", num_rows=20)
    task = Stream.load(tmp_path, limit=6, test_limit=4)["news"]
    assert [e.target for e in task.examples].count("a") == 3
    assert (len(task.examples), len(task.test)) == (6, 4)
    with pytest.raises(ConfigError, match="test_limit must be at least 1, got 0"):
        Stream.load(tmp_path, test_limit=0)


def test_an_unknown_name_is_answered_with_the_nearest_known_one(tmp_path):
    write_task(tmp_path, "news")
    write_task(tmp_path, "films")
    expected = "task 'new' is unknown, known are films, news: did you mean \"news\"?"
    with pytest.raises(TaskError) as caught:
        Stream.load(tmp_path, ["new"])
    assert str(caught.value) == expected
    with pytest.raises(TaskError) as caught:
        Stream.load(tmp_path)["new"]
    assert str(caught.value) == expected
    with pytest.raises(TaskError, match="known are films, news: use one of these"):
        Stream.load(tmp_path).order(["xyz"])


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        Stream.load(tmp_path / "nowhere")
    assert str(caught.value) == (
        f"{tmp_path / 'nowhere'} holds no tasks, expected <name>/train.jsonl inside it: check the path"
    )


def test_two_tasks_of_one_name_are_refused():
    task = Task("t", TaskKind.GENERATION, (Example("a", "b"),))
    with pytest.raises(TaskError) as caught:
        Stream((task, task))
    assert str(caught.value) == 'two tasks of the stream are named "t", names must differ: rename one'


def test_a_mixed_test_draws_from_every_task_and_mixes_them(tmp_path):
    write_task(tmp_path, "news", num_rows=20)
    write_task(tmp_path, "films", num_rows=20)
    stream = Stream.load(tmp_path)
    mixed = stream.mixed_test(8, seed=1)
    names = [name for name, _ in mixed]
    assert names.count("news") == names.count("films") == 8
    assert names not in (sorted(names), sorted(names, reverse=True))
    assert all(example in stream[name].test for name, example in mixed)
    assert [example.target for _, example in mixed].count("a") == 8
    assert mixed == stream.mixed_test(8, seed=1) != stream.mixed_test(8, seed=2)
    everything, otherwise_mixed = stream.mixed_test(99, seed=1), stream.mixed_test(99, seed=2)
    assert everything != otherwise_mixed
    assert set(everything) == set(otherwise_mixed)


def test_a_mixed_test_needs_test_examples(tmp_path):
    write_task(tmp_path, "news", has_test=False)
    with pytest.raises(TaskError) as caught:
        Stream.load(tmp_path).mixed_test(4)
    assert str(caught.value) == 'task "news" has no test examples: load it with a test file'
    with pytest.raises(ConfigError, match="limit_per_task must be at least 1, got 0"):
        Stream(()).mixed_test(0)


@needs_data
def test_the_shared_stream_loads_with_its_documented_sizes():
    stream = Stream.load(DATA, ["cb", "copa", "boolq", "gsm8k"])
    assert [(len(task.examples), len(task.test)) for task in stream] == [
        (250, 56),
        (400, 100),
        (2000, 1000),
        (4000, 1000),
    ]
    assert stream["cb"].labels == ("contradiction", "entailment", "neutral")
    assert stream["boolq"].labels == ("False", "True")
    assert stream["gsm8k"].kind is TaskKind.GENERATION
    assert len(stream["cb"].split(0.1)[1]) == 25
