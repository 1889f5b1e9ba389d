"""Folders of cells: what a killed one left goes, what is in use stays."""

from __future__ import annotations

from slm.bench.scratch import clear_scratch, scratch_folder


def test_a_folder_is_gone_after_its_cell_and_leftovers_when_a_run_begins(tmp_path):
    place = tmp_path / "scratch"
    clear_scratch(place)
    with scratch_folder(place) as used:
        (place / "left").mkdir()
        (place / "left" / "file").touch()
        (place / "left.lock").touch()
        clear_scratch(place)
        assert {path.name for path in place.iterdir()} == {used.name, f"{used.name}.lock"}
    assert list(place.iterdir()) == []
