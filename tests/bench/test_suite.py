"""Suites as files: what they say, and what is said about a broken one."""

from __future__ import annotations

import dataclasses
import json

import pytest

from slm.bench.suite import METRICS
from slm.bench.suite_data import load_tasks, training_task
from slm.bench.suite_file import load_suite, suite_names
from slm.config import RetrievalConfig
from slm.errors import ConfigError, DataError, TaskError
from slm.evaluation.scorers import SCORERS

SUITE = """
version: 1
title: two tasks
tasks: [hues, sizes]
orders: {"1": [hues, sizes], "2": [sizes, hues]}
prompt: plain
truncation: middle
metrics: 1
label_words: {red: warm}
has_lower_case_labels: true
sources:
  hues: {kind: classification, metric: accuracy}
  sizes: {kind: classification, metric: accuracy}
presets:
  cpu:
    about: seconds
    backbone: minilm
    train: 6
    test: 4
    orders: ["1"]
    seeds: [0]
    config: {backbone: {max_tokens: 32}, learning: {num_epochs: 1}}
"""


def write_data(folder, name, labels, num=12):
    (folder / name).mkdir(parents=True)
    for part, start in (("train", 0), ("test", 100)):
        rows = [{"text": f"{labels[i % 2]} thing {start + i}", "label": labels[i % 2]} for i in range(num)]
        (folder / name / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.yaml").write_text(SUITE)
    write_data(tmp_path / "data", "hues", ("red", "Blue"))
    write_data(tmp_path / "data", "sizes", ("big", "small"))
    return load_suite(tmp_path / "own.yaml")


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_of_the_package_is_complete(name):
    suite = load_suite(name)
    assert {"full", "cpu"} <= set(suite.presets)
    for preset in suite.presets.values():
        assert preset.config.learning.is_truncating
        assert preset.about
    for order in suite.orders.values():
        assert sorted(order) == sorted(suite.tasks)
    assert set(suite.metrics.values()) <= set(SCORERS)


@pytest.mark.parametrize("name", suite_names())
def test_no_input_names_its_task_or_where_it_comes_from(name):
    for task, source in load_suite(name).sources.items():
        ids = {task, source.hub.path.split("/")[-1], source.hub.configuration} if source.hub else {task}
        for word in ids - {"", "main", "default"}:
            assert word.lower() not in source.input.lower()


def test_the_benchmarks_of_the_field_are_there_in_their_orders():
    assert set(suite_names()) == {"bert", "t5-few-shot", "llama", "standard", "long", "mixed", "retention"}
    assert load_suite("bert").orders["6"] == ("dbpedia", "yahoo", "agnews", "amazon", "yelp")
    assert load_suite("long").orders["9"][:4] == ("multirc", "boolq", "wic", "mnli")
    assert len(load_suite("mixed").tasks) == 22
    assert load_suite("bert").presets["full"].train == 115_000


def test_labels_become_the_words_that_the_suite_wants(own, tmp_path):
    tasks = load_tasks(own, tmp_path / "data", own.tasks)
    assert tasks["hues"].labels == ("blue", "warm")
    assert {e.target for e in tasks["hues"].test} == {"blue", "warm"}


def test_a_draw_has_as_many_examples_of_each_label_or_so_many_in_all(own, tmp_path):
    task = load_tasks(own, tmp_path / "data", ["sizes"])["sizes"]
    preset = own.preset("cpu")
    assert len(training_task(task, preset, None, 0).examples) == 6
    few = training_task(task, preset, 2, 0)
    assert sorted(e.target for e in few.examples) == ["big", "big", "small", "small"]
    assert training_task(task, preset, 2, 0) == few
    assert training_task(task, preset, 2, 1) != few


def test_hub_rows_become_inputs_by_the_template_and_a_row_without_a_gold_label_is_left_out(tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    for part in ("train", "test"):
        rows = [{"a": f"x{i}", "b": {"c": [f"y{i}"]}, "label": (0, 1, -1)[i % 3]} for i in range(9)]
        (hub / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = SUITE.replace(
        "hues: {kind: classification, metric: accuracy}",
        f"hues: {{kind: classification, metric: accuracy, hub: {{path: {hub}, train: train, test: test}}, "
        "input: 'first: {{ a }} then {{ b.c[0] }}', target: \"{{ ['no', 'yes'][label] }}\"}",
    )
    (tmp_path / "own.yaml").write_text(text)
    task = load_tasks(load_suite(tmp_path / "own.yaml"), None, ["hues"])["hues"]
    assert len(task.examples) == len(task.test) == 6
    assert task.examples[1].prompt == "first: x1 then y1"
    assert task.examples[1].target == "yes"
    with pytest.raises(DataError, match="is on no hub: give a folder"):
        load_tasks(load_suite(tmp_path / "own.yaml"), None, ["sizes"])


def test_a_copy_of_a_data_set_is_read_by_folder_and_questions_without_an_answer_are_left_out(tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / "hub" / folder).mkdir(parents=True)
        rows = [{"q": f"{folder}{i}", "answer": ("yes", None, " ")[i % 3]} for i in range(6 + 3 * number)]
        for part in ("train", "test"):
            (tmp_path / "hub" / folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = SUITE.replace(
        "hues: {kind: classification, metric: accuracy}",
        f"hues: {{kind: generation, metric: rouge_l, hub: {{path: {tmp_path / 'hub'}, configuration: b, "
        "revision: refs/convert/parquet, train: train, test: test}, "
        "input: '{{ q }}', target: '{{ answer }}'}",
    )
    (tmp_path / "own.yaml").write_text(text)
    task = load_tasks(load_suite(tmp_path / "own.yaml"), None, ["hues"])["hues"]
    assert [(e.prompt, e.target) for e in task.examples] == [(f"b{i}", "yes") for i in (0, 3, 6)]


def test_a_template_that_does_not_fit_names_row_and_column(tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text('{"a": "x", "label": 0}\n')
    text = SUITE.replace(
        "hues: {kind: classification, metric: accuracy}",
        f"hues: {{kind: classification, metric: accuracy, hub: {{path: {hub}, train: train, test: train}}, "
        "input: '{{ missing }}', target: '{{ label }}'}",
    )
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(DataError, match=r"row 1 does not fit the template.*missing"):
        load_tasks(load_suite(tmp_path / "own.yaml"), None, ["hues"])


def test_the_digest_follows_what_is_measured_and_not_which_cells_are_run(own):
    preset = own.preset("cpu")
    assert own.digest(dataclasses.replace(preset, orders=("2",), seeds=(3,), about="")) == own.digest(preset)
    assert own.digest(dataclasses.replace(preset, train=7)) != own.digest(preset)
    assert dataclasses.replace(own, version=2).digest(preset) != own.digest(preset)


def test_the_digest_does_not_follow_where_a_data_set_s_files_lie():
    suite = load_suite("retention")
    preset, source = suite.preset("cpu"), suite.sources["e2e_nlg"]
    assert source.hub.revision
    moved = dataclasses.replace(source, hub=dataclasses.replace(source.hub, revision=""))
    assert dataclasses.replace(suite, sources={**suite.sources, "e2e_nlg": moved}).digest(preset) == (
        suite.digest(preset)
    )
    other = dataclasses.replace(source, hub=dataclasses.replace(source.hub, path="x/y"))
    assert dataclasses.replace(suite, sources={**suite.sources, "e2e_nlg": other}).digest(preset) != (
        suite.digest(preset)
    )


def test_the_digest_follows_the_settings_of_the_file_and_not_the_defaults_of_the_library(own):
    preset = own.preset("cpu")
    later = dataclasses.replace(preset.config, retrieval=RetrievalConfig(top_k=3))
    assert own.digest(dataclasses.replace(preset, config=later)) == own.digest(preset)
    said = {**preset.settings, "retrieval": {"top_k": 3}}
    assert own.digest(dataclasses.replace(preset, settings=said)) != own.digest(preset)


def test_an_order_of_one_task_is_that_task_alone(own):
    assert own.order("alone-sizes") == ("sizes",)
    assert own.order("2") == ("sizes", "hues")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('[hues, sizes], "2"', '[hues], "2"', "order 1 is no order of the suite's tasks"),
        ("metrics: 1", f"metrics: {METRICS + 1}", "was written for version"),
        ("prompt: plain", "prompt: fancy", "prompt must be one of plain, chat"),
        ("title: two tasks\n", "", "'title' is missing"),
        ("tasks: [hues, sizes]", "tasks: [hues, sizes, shapes]", "shapes has no source"),
        ("num_epochs: 1", "num_epoch: 1", "unknown setting 'num_epoch', did you mean 'num_epochs'"),
        ('orders: ["1"]', 'orders: ["7"]', "no order '7', known are 1, 2"),
        ("presets:", "presets: [", "is no YAML"),
        ("label_words:", "label_word:", "unknown name 'label_word', known are .*did you mean 'label_words'"),
        ("train: 6", "trian: 6", "preset cpu has an unknown name 'trian', .*did you mean 'train'"),
        ("test: 4", 'test: "4"', "preset cpu: test must be a whole number from 1, got '4'"),
        ("test: 4", "test: 0", "preset cpu: test must be a whole number from 1, got 0: correct it"),
        ("train: 6", "train: 0", "preset cpu: train must be a whole number from 1, got 0: correct it"),
        ("seeds: [0]", "seeds: [0, 1, 0]", "preset cpu: seeds has 0 more than once: name it once"),
        ('orders: ["1"]', 'orders: ["1", 1]', "preset cpu: orders has '1' more than once"),
        ("seeds: [0]", "seeds: [0]\n    per_label: [4, 4]", "preset cpu: per_label has 4 more than once"),
        ('"2": [sizes', '"a/b": [sizes', "an order needs a name that a task may have .task name 'a/b'"),
        ('"2": [sizes', '"alone-sizes": [sizes', "order alone-sizes begins as that of a task learned alone"),
        ("seeds: [0]", "seeds: [x]", "preset cpu: seeds must be a whole number from 0, got 'x'"),
        ("seeds: [0]", "seeds: [0]\n    methods: {ewcc: {strength: 1}}", "unknown name 'ewcc', .*'ewc'"),
        ("seeds: [0]", "seeds: [0]\n    methods: {ewc: {strength: much}}", "ewc strength must be a number"),
        (
            "hues: {kind: classification, metric: accuracy}",
            "hues: {kind: classification, metric: acc}",
            "no metric",
        ),
        ("  hues: {kind", "  hues: {kidn", "source hues has an unknown name 'kidn'"),
        ("sources:\n", "sources:\nx:\n", "unknown name 'x'"),
    ],
)
def test_a_broken_suite_is_refused_with_what_is_wrong(tmp_path, old, new, message):
    assert old in SUITE
    (tmp_path / "own.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_suite(tmp_path / "own.yaml")


def test_numbers_as_yaml_writes_them_are_taken_for_what_they_are(tmp_path):
    text = SUITE.replace('orders: ["1"]', "orders: [1]").replace(
        "seeds: [0]", "seeds: [0]\n    methods: {ewc: {strength: 1e5}}"
    )
    (tmp_path / "own.yaml").write_text(text)
    preset = load_suite(tmp_path / "own.yaml").preset("cpu")
    assert preset.orders == ("1",)
    assert preset.methods == {"ewc": {"strength": 1e5}}


def test_an_unknown_suite_or_preset_names_the_nearest(own):
    with pytest.raises(ConfigError, match="did you mean 'long'"):
        load_suite("lonng")
    with pytest.raises(ConfigError, match="no preset 'cpx', known are cpu: did you mean 'cpu'"):
        own.preset("cpx")


def test_a_task_without_test_rows_is_refused(own, tmp_path):
    (tmp_path / "data" / "hues" / "test.jsonl").unlink()
    with pytest.raises(TaskError, match="has no test examples"):
        load_tasks(own, tmp_path / "data", own.tasks)
