"""Writes docs/backbones.md: which backbone family passes which test, from a run of those tests.

python benchmarks/backbone_matrix.py            # some minutes; needs the packages of the test suite
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/backbone/test_families.py",
    "tests/backbone/test_families_exchange.py",
    "tests/backbone/test_quantized_families.py",
)
PAGE = ROOT / "docs" / "backbones.md"
BEGIN, END = "<!-- begin: written by benchmarks/backbone_matrix.py -->", "<!-- end -->"

Cells = dict[tuple[str, str], str]


class Recorder:
    """A pytest plugin that keeps the outcome of every (family, feature)."""

    def __init__(self) -> None:
        self.cells: Cells = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """A cell passes when every test of it does; a skip or a failure stays.

        A test that passed because slm refused, and said so clearly, reports "refused" as its outcome.
        """
        report = (yield).get_result()
        mark = item.get_closest_marker("feature")
        if mark is None or (report.when != "call" and report.outcome == "passed"):
            return
        key = (item.callspec.params["family"], mark.args[0])
        if self.cells.get(key, "passed") == "passed":
            said = dict(report.user_properties).get("outcome", "passed")
            self.cells[key] = said if report.outcome == "passed" else report.outcome


def table(cells: Cells) -> str:
    """The matrix as Markdown: a line per family, a column per feature, in the order of the tests."""
    families = list(dict.fromkeys(family for family, _ in cells))
    features = list(dict.fromkeys(feature for _, feature in cells))
    marks = {"passed": "✓", "failed": "✗", "skipped": "skipped", "refused": "refused"}
    lines = ["| family | " + " | ".join(features) + " |", "|---|" + ":-:|" * len(features)]
    for family in families:
        own = [marks[cells[family, f]] if (family, f) in cells else "–" for f in features]
        lines.append(f"| {family} | " + " | ".join(own) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the tests and put the table between its two marks on the page."""
    os.environ["SLM_ALL_BACKBONES"] = "1"
    recorder = Recorder()
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins are imported before pytest here
    code = pytest.main(
        ["-p", "no:cacheprovider", *quiet, *(str(ROOT / test) for test in TESTS)], plugins=[recorder]
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, at {commit or 'no commit'}"
    )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    written = f"{BEGIN}\n{table(recorder.cells)}\n\n{versions}.\n{END}"
    PAGE.write_text(before + written + after, encoding="utf-8")
    print(f"{PAGE}: {len(recorder.cells)} cells, pytest exit code {int(code)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
