"""Running cells for real: MiniLM, two small tasks, in one process and in several."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import psutil
import pytest

from slm.bench.cells import RunFolder
from slm.bench.plan import plan_run, run_with_bar
from slm.bench.runner import _expect_same_settings, describe, run_cell
from slm.bench.suite_data import load_tasks
from slm.cli.main import main
from slm.errors import ConfigError, LearningError
from tests.bench.test_run_page import cell as result
from tests.bench.test_suite import SUITE, write_data

TIMES = ("time_s", "learn_s", "ask_s", "retrieve_s", "started")


@pytest.fixture
def planned(tmp_path):
    (tmp_path / "own.yaml").write_text(SUITE.replace("num_epochs: 1", "num_epochs: 2, has_progress: false"))
    write_data(tmp_path / "data", "hues", ("red", "blue"))
    write_data(tmp_path / "data", "sizes", ("big", "small"))

    def plan(out="run", **options):
        chosen = {"methods": ("slm", "oracle"), "orders": None, "seeds": None, "changes": {}, **options}
        return plan_run(
            str(tmp_path / "own.yaml"), "cpu", places=(tmp_path / "data", tmp_path / out), **chosen
        )

    return plan


def told(run):
    """What the cells say, times aside."""
    results = RunFolder(run.out).results()
    return [{name: value for name, value in r.items() if name not in TIMES} for r in results]


def test_two_runs_with_one_seed_say_the_same_and_finished_cells_are_not_run_again(planned, monkeypatch):
    first, second = planned("a"), planned("b")
    assert run_with_bar(first, 1) == 2
    assert run_with_bar(second, 1) == 2
    assert told(first) == told(second)
    # The oracle took over what slm had learned, and says what that had cost.
    times = {r["cell"]["method"]: sum(r["learn_s"]) for r in RunFolder(first.out).results()}
    assert 0.5 * times["slm"] < times["oracle"] < 2 * times["slm"]
    monkeypatch.setattr("slm.bench.runner.run_cell", lambda *_: pytest.fail("a finished cell was run again"))
    assert run_with_bar(first, 1) == 0


def test_a_run_that_was_killed_goes_on_with_the_cells_that_are_missing(planned):
    run = planned()
    run_with_bar(run, 1)
    lost = run.out / "cells" / "oracle--order-1--seed-0.json"
    kept = (run.out / "cells" / "slm--order-1--seed-0.json").read_bytes()
    before = told(run)
    lost.unlink()
    assert run_with_bar(run, 1) == 1
    assert told(run) == before
    assert (run.out / "cells" / "slm--order-1--seed-0.json").read_bytes() == kept


def test_cells_in_processes_of_their_own_give_the_same_scores(planned):
    alone, apart = planned("a"), planned("b")
    run_with_bar(alone, 1)
    run_with_bar(apart, 2)
    scores = [[r["scores"] for r in RunFolder(run.out).results()] for run in (alone, apart)]
    assert scores[0] == scores[1]


def test_a_cell_tells_what_a_number_depends_on(planned):
    run = planned()
    cell = run.cells[0]
    found = run_cell(run, cell)
    assert found["tasks"] == ["hues", "sizes"]
    assert [len(row) for row in found["scores"]] == [1, 2]
    assert found["num_examples"] == [6, 6]
    assert found["metrics"] == ["accuracy", "accuracy"]
    assert found["digest"] == run.suite.digest(run.preset)
    assert found["environment"]["torch"]
    assert found["config"]["learning"]["num_epochs"] == 2
    assert sum(map(sum, found["confusion"])) == found["num_asked"] == 8
    assert found["size_bytes"][1] > found["size_bytes"][0] > 0
    json.dumps(found, allow_nan=False)


def test_nothing_in_a_cell_depends_on_the_names_of_tasks(planned, tmp_path):
    """A name in an input would be a task-ID: other names would then give other scores and queries."""
    run = planned("a", methods=("slm", "sequential-lora"))
    text = (tmp_path / "own.yaml").read_text()
    for old, new in (("hues", "zebra"), ("sizes", "quartz")):
        text = text.replace(old, new)
        (tmp_path / "data" / old).rename(tmp_path / "data" / new)
    (tmp_path / "other.yaml").write_text(text)
    (tmp_path / "data2").mkdir()
    other = plan_run(
        str(tmp_path / "other.yaml"),
        "cpu",
        methods=("slm", "sequential-lora"),
        orders=None,
        seeds=None,
        changes={},
        places=(tmp_path / "data", tmp_path / "b"),
    )
    renamed = [run_cell(other, cell) for cell in other.cells]
    for old, new in (("hues", "zebra"), ("sizes", "quartz")):
        (tmp_path / "data" / new).rename(tmp_path / "data" / old)
    own = [run_cell(run, cell) for cell in run.cells]
    assert [(r["scores"], r["confusion"]) for r in own] == [(r["scores"], r["confusion"]) for r in renamed]


@pytest.mark.parametrize("error", [LearningError("the loss became nan"), TypeError("odd")])
def test_a_failed_cell_is_told_and_the_others_are_kept(planned, monkeypatch, error):
    run = planned(methods=("sequential-lora", "slm"))
    given = run_cell

    def fail(run, cell, num_threads=None):
        if cell.method == "sequential-lora":
            raise error
        return given(run, cell, num_threads)

    monkeypatch.setattr("slm.bench.runner.run_cell", fail)
    with pytest.raises(
        LearningError, match=f"1 of 2 cells failed, the others are kept: sequential-lora.*{error}"
    ):
        run_with_bar(run, 1)
    assert [r["cell"]["method"] for r in RunFolder(run.out).results()] == ["slm"]


def test_a_result_that_is_no_number_is_the_failure_of_its_cell(planned, monkeypatch):
    run = planned(methods=("ewc", "slm"))

    def spoil(run, cell, num_threads=None):
        score = float("nan") if cell.method == "ewc" else 0.5
        return result(cell.method, cell.order, [[score], [0.5, 0.5]])

    monkeypatch.setattr("slm.bench.runner.run_cell", spoil)
    for num_left in (2, 1):  # and again when it goes on
        message = f"1 of {num_left} cells failed, .*: ewc--order-1--seed-0: its result has scores.0.0 nan"
        with pytest.raises(LearningError, match=message):
            run_with_bar(run, 1)
    assert [r["cell"]["method"] for r in RunFolder(run.out).results()] == ["slm"]


def test_a_run_says_of_how_many_examples_its_bytes_are_and_where_its_suite_was_read(planned, tmp_path):
    run = planned(shots=("2",), changes={"per_label": (1, 2)})
    told = describe(run, load_tasks(run.suite, run.data, run.suite.tasks))
    assert (told["per_label_of_1_percent"], told["num_examples_of_1_percent"]) == (2, 8)
    assert told["suite_file"] == str(tmp_path / "own.yaml")
    whole = planned()
    told = describe(whole, load_tasks(whole.suite, whole.data, whole.suite.tasks))
    assert (told["per_label_of_1_percent"], told["num_examples_of_1_percent"]) == (None, 12)


def test_cells_with_other_settings_of_their_method_do_not_lie_side_by_side(planned):
    run_with_bar(planned(methods=("ewc",)), 1)
    other = planned(methods=("ewc",), changes={"methods": {"ewc": {"strength": 7.0}}})
    with pytest.raises(ConfigError, match=r"with strength 10000, this run gives it 7: choose another"):
        run_with_bar(other, 1)


def test_settings_that_the_suite_no_longer_names_are_compared_too(planned):
    named = planned(methods=("ewc",), changes={"methods": {"ewc": {"strength": 7.0}}})
    cell = named.cells[0]
    folder = RunFolder(named.out)
    folder.begin(describe(named, load_tasks(named.suite, named.data, named.suite.tasks)))
    folder.keep(cell, result("ewc", cell.order, [[1], [1, 1]], settings={"strength": 7.0}))
    with pytest.raises(ConfigError, match=r"with strength 7, this run gives it 10000: choose another"):
        _expect_same_settings(planned(methods=("ewc",)), folder)
    _expect_same_settings(named, folder)


def test_workers_leave_when_the_one_they_work_for_is_killed(planned, tmp_path):
    planned()
    words = [str(tmp_path / "own.yaml"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "slm.cli.main", "bench", *words, "--jobs", "2"]
    parent = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = []
    while parent.is_running() and len(workers) < 2:
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert len(workers) == 2
    assert not alive


def test_alone_nothing_joint_is_learned(planned):
    run = dataclasses.replace(planned(methods=("slm", "joint")), is_alone=True)
    assert [cell.method for cell in run.cells if cell.order.startswith("alone-")] == ["slm", "slm"]


def test_the_command_runs_and_reports(planned, tmp_path, capsys):
    planned()
    words = [str(tmp_path / "own.yaml"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main(["bench", *words, "--methods", "slm", "--jobs", "1"]) == 0
    assert main(["bench", "report", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["leaderboard"][0]["method"].startswith("slm")
    assert main(["bench", *words, "--methods", "slmm"]) == 1
    assert "there is no method 'slmm'" in capsys.readouterr().err
    assert main(["bench", *words, "--methods", "slm", "--test", "3"]) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert main(["bench", "list"]) == 0
    assert "t5-few-shot" in capsys.readouterr().out


def test_a_name_said_twice_is_run_once(planned):
    run = planned(methods=("slm", "slm"), orders=("1", "1"), seeds=("0", "0"))
    assert len(run.cells) == 1


def test_some_of_a_curve_can_be_run(planned):
    curve = (16, 64, None)
    run = planned(shots=("64", "all", "64"), changes={"per_label": curve})
    assert [cell.per_label for cell in run.cells if cell.method == "slm"] == [64, None]
    assert [cell.per_label for cell in planned(changes={"per_label": curve}).cells][::2] == list(curve)
    with pytest.raises(ConfigError, match="no number of shots '17', known are 16, 64, all: use one of these"):
        planned(shots=("17",), changes={"per_label": curve})
    with pytest.raises(ConfigError, match="preset cpu has one number of examples, no curve"):
        planned(shots=("16",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("emc",)}, "no method 'emc', known are .*did you mean 'ewc'"),
        ({"orders": ("9",)}, "no order '9', known are 1, 2"),
        ({"changes": {"methods": {"slm": {"odd": 1.0}}}}, "no setting 'odd', known are none"),
        ({"seeds": ("-1",)}, "--seeds must be whole numbers from 0, got '-1'"),
        ({"methods": ()}, "no method was named"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(planned, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(**options)
