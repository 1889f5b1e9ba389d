"""The folder of a run: what is there is never run again, nor written over."""

from __future__ import annotations

import json

import pytest

from slm.bench.cells import Cell, RunFolder
from slm.errors import ConfigError, DataError
from tests.bench.test_run_page import RUN
from tests.bench.test_run_page import cell as result

WHAT = {**RUN, "data": {"a": "1"}}


def test_a_cell_is_kept_once_and_a_second_result_changes_nothing(tmp_path):
    folder, cell = RunFolder(tmp_path / "run"), Cell("slm", "8", 0)
    folder.begin(WHAT)
    assert not folder.has(cell)
    first = result("slm", "8", [[1], [1, 1]])
    folder.keep(cell, first)
    folder.keep(cell, {**first, "scores": [[2], [2, 2]]})
    assert folder.has(cell)
    assert folder.results() == [folder.result(cell)] == [first]
    assert [p.name for p in (tmp_path / "run" / "cells").iterdir()] == ["slm--order-8--seed-0.json"]


def test_cells_differ_by_method_order_seed_and_examples():
    cells = [Cell(m, o, s, n) for m in ("slm", "ewc") for o in ("1", "2") for s in (0, 1) for n in (None, 16)]
    assert len({cell.name for cell in cells}) == 16


def test_a_run_goes_on_where_it_was_and_refuses_another_one(tmp_path):
    RunFolder(tmp_path).begin(WHAT)
    RunFolder(tmp_path).begin({**WHAT, "options": {"test": 3}})
    assert RunFolder(tmp_path).description() == WHAT
    with pytest.raises(ConfigError, match="differ in digest and data from what is asked for: choose another"):
        RunFolder(tmp_path).begin({**WHAT, "digest": "e", "data": {}})


def test_two_that_begin_at_once_go_on_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.exists", lambda _: False)  # as the slower one saw it
    for _ in range(2):
        RunFolder(tmp_path).begin(WHAT)
    RunFolder(tmp_path / "other").begin({**WHAT, "outside_data": {"b": "2"}})
    with pytest.raises(ConfigError, match="differ in data of tasks outside"):
        RunFolder(tmp_path / "other").begin({**WHAT, "outside_data": {"b": "3"}})


def test_a_result_that_is_no_number_is_not_written(tmp_path):
    folder, cell = RunFolder(tmp_path), Cell("slm", "8", 0)
    folder.begin(WHAT)
    for odd, told in (({"a": [1, {"b": float("nan")}]}, "a.1.b nan"), ({"c": float("-inf")}, "c -inf")):
        with pytest.raises(DataError, match=f"^its result has {told}, which no table can hold: lower"):
            folder.keep(cell, odd)
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"run.json does not exist: name the --out folder"):
        RunFolder(tmp_path).description()
    RunFolder(tmp_path).begin(WHAT)
    (tmp_path / "cells" / "x.json").write_text(json.dumps({"a": 1})[:-2])
    with pytest.raises(DataError, match=r"x.json cannot be read .*: delete it and run its cell again"):
        RunFolder(tmp_path).results()
    (tmp_path / "cells" / "x.json").write_text("[]")
    with pytest.raises(DataError, match=r"x.json holds no result"):
        RunFolder(tmp_path).results()
    (tmp_path / "cells" / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x.json is no result of a cell, it lacks cell"):
        RunFolder(tmp_path).results()


def test_a_file_that_lacks_what_is_always_written_is_named_with_it(tmp_path):
    folder, whole = RunFolder(tmp_path), result("slm", "8", [[1], [1, 1]])
    folder.begin(WHAT)
    file = tmp_path / "cells" / "x.json"
    for part in ("title", "environment", "num_refused"):
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != part}))
        with pytest.raises(DataError, match=f"x.json is no result of a cell, it lacks {part}: delete it"):
            folder.results()
    file.write_text(json.dumps({**whole, "cell": {"method": "slm"}}))
    with pytest.raises(DataError, match=r"it lacks cell\.order"):
        folder.results()
    (tmp_path / "run.json").write_text(json.dumps({"suite": "long"}))
    with pytest.raises(DataError, match=r"run\.json describes no run, it lacks preset: delete it"):
        folder.description()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").begin(WHAT)
