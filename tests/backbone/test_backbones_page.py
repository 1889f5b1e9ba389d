"""``docs/backbones.md`` shows what the tests of the families cover, no more and no less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.backbone_matrix import BEGIN, END, table

from tests.backbone import test_families, test_families_exchange, test_quantized_families

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


def pairs_tested() -> set[tuple[str, str]]:
    """(family, feature) of every test."""
    found = set()
    tests = [vars(module) for module in (test_families, test_families_exchange, test_quantized_families)]
    for test in (value for module in tests for value in module.values()):
        marks: dict[str, Any] = {mark.name: mark for mark in getattr(test, "pytestmark", ())}
        if "feature" in marks:
            found |= {(family, marks["feature"].args[0]) for family in marks["parametrize"].args[1]}
    return found


def shown() -> dict[tuple[str, str], str]:
    """The cells of the page's table, those that do not apply left out."""
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in written.splitlines()
        if line.startswith("|")
    ]
    features = lines[0][1:]
    return {
        (family, feature): cell
        for family, *cells in lines[2:]
        for feature, cell in zip(features, cells, strict=True)
        if cell != "–"
    }


REFUSED = {"assisted generation"}
"""Features that no family has."""


def test_the_page_shows_every_family_and_feature_that_is_tested_and_each_passes_or_is_refused():
    cells = shown()
    assert set(cells) == pairs_tested()
    refused = {cell for cell in cells if cells[cell] == "refused"}
    assert refused == {cell for cell in cells if cell[1] in REFUSED} | {("GPT-2", "int8")}
    assert {cells[cell] for cell in set(cells) - refused} == {"✓"}


def test_the_table_is_made_from_outcomes():
    cells = {("A", "one"): "passed", ("A", "two"): "failed", ("B", "one"): "skipped", ("C", "two"): "refused"}
    assert table(cells).splitlines()[2:] == ["| A | ✓ | ✗ |", "| B | skipped | – |", "| C | – | refused |"]
