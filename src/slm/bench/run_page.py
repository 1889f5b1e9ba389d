"""One HTML page of a run; it needs no other file and asks nothing of the network."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from slm.bench.cells import RunFolder
from slm.bench.report import save_figure
from slm.bench.run_figures import draw_figures
from slm.bench.run_text import (
    COLUMNS,
    DEFINITIONS,
    FORMULAS,
    Table,
    captions,
    command_of,
    describe_cells,
    drift_rows,
    leaderboard_table,
    markdown,
    notes,
    short_commit,
    task_tables,
)
from slm.bench.tables import Line, Result, leaderboard
from slm.errors import ConfigError

PAGE = "report.html"
_TITLES = {
    "curves": "Forgetting",
    "costs": "What it costs",
    "shots": "Few examples",
    "matrices": "Accuracy matrices",
    "confusion": "Routing",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 1.5rem auto;
  padding: 0 1.2rem; max-width: 1480px; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { max-width: 80ch; margin: .4rem 0; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .28rem .7rem .28rem .3rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #222; font-weight: 600; cursor: pointer; vertical-align: bottom;
  white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td { border-bottom: 1px solid #e6e6e6; }
tr.bound td { color: #777; font-style: italic; }
tr.own td { font-weight: 600; background: #f1f7fb; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072B2; }
figure { margin: .6rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .7rem 1rem; white-space: pre-wrap; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; font-size: 14px; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$about</p>
<h2>Leaderboard</h2>
$leaderboard
$notes
<h3>What the columns say</h3>
<p>$formulas</p>
<dl>$columns</dl>
$sections
<h2>How to repeat it</h2>
<pre>$command</pre>
<dl>$environment</dl>
<script>
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const cell = button.closest("th"), table = cell.closest("table"), at = cell.cellIndex;
    const value = (row) => row.cells[at].textContent.replaceAll(",", "");
    const isUp = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const compare = (a, b) => {
      const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
      if (isNaN(x) && isNaN(y)) return value(a).localeCompare(value(b));
      return isNaN(x) ? 1 : isNaN(y) ? -1 : x - y;
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    if (!isUp) rows.reverse();
    table.tBodies[0].append(...rows);
  });
}
</script>
</body>
</html>
""")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html``, ``report.md``, ``summary.json`` and a PNG per figure beside a run's cells.

    Args:
        folder: the --out folder of a run.

    Raises:
        DataError: no run lies there, or none of its cells is finished.
        ConfigError: matplotlib is missing, or the folder cannot be written.
    """
    run_folder = RunFolder(folder)
    run, results = run_folder.description(), run_folder.results()
    lines = leaderboard(results)
    figures = draw_figures(results, lines)
    path = run_folder.path / PAGE
    try:
        for name, figure in figures.items():
            save_figure(figure, run_folder.path / f"{name}.png")
        path.write_text(_page(run, results, figures), encoding="utf-8")
        text = f"{markdown(run, results)}\n{DEFINITIONS}\n"
        (run_folder.path / "report.md").write_text(text, encoding="utf-8")
        summary = {"run": run, "leaderboard": table_as_dicts(leaderboard_table(lines))}
        (run_folder.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{run_folder.path} cannot be written ({error.strerror}): check its permissions"
        ) from None
    return path


def table_as_dicts(table: Table) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns."""
    header, rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def _page(run: Mapping[str, Any], results: Sequence[Result], figures: Mapping[str, Any]) -> str:
    lines = leaderboard(results)
    board = leaderboard_table(lines)
    told = captions(results)
    sections = [_figure_section(name, figures, told) for name in ("curves", "costs", "shots")]
    sections.append("<h2>Every task</h2>")
    for what, table in task_tables(lines):
        sections.append(f"<p>{html.escape(what)}</p>{_table(table, _marks(lines, table))}")
    sections += [_figure_section(name, figures, told) for name in ("matrices", "confusion")]
    drift = drift_rows(results)
    if drift:
        sections.append(
            "<h2>Base-model drift</h2><p>What was never learned: loss on unrelated texts (nats a token) and "
            "zero-shot scores; in brackets the change against the frozen backbone.</p>" + _table(drift, [])
        )
    return _PAGE.substitute(
        title=html.escape(run["title"]),
        about=html.escape(
            f"Preset {run['preset']}: {run['about']}. Backbone {run['backbone']}; {describe_cells(results)}."
        ),
        formulas=html.escape(FORMULAS),
        columns=_definitions({name: [COLUMNS[name]] for name in board[0] if name in COLUMNS}),
        leaderboard=_table(board, [_mark(line) for line in lines]),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes(run, results)),
        sections="\n".join(sections),
        command=html.escape(command_of(run, results)),
        environment=_definitions(_environment(results)),
    )


def _mark(line: Line) -> str:
    return "bound" if line.is_bound else "own" if line.method == "slm" else ""


def _marks(lines: Sequence[Line], table: Table) -> list[str]:
    """Of the rows of a table whose first column is titles."""
    marks = {line.title: _mark(line) for line in lines}
    return [marks[row[0]] for row in table[1]]


def _figure_section(name: str, figures: Mapping[str, Any], told: Mapping[str, str]) -> str:
    if name not in figures:
        return ""
    title = _TITLES[name]
    return f"<h2>{title}</h2><p>{html.escape(told[name])}</p><figure>{_svg(figures[name], title)}</figure>"


def _svg(figure: Any, title: str) -> str:
    """A figure as an SVG element."""
    import matplotlib

    held = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(held, format="svg", metadata={"Date": None})
    text = held.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def _table(table: Table, marks: Sequence[str]) -> str:
    header, rows = table
    head = "".join(f"<th scope=col><button>{html.escape(cell)}</button></th>" for cell in header)
    body = []
    for number, row in enumerate(rows):
        mark = marks[number] if number < len(marks) else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f'<tr class="{mark}">{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _environment(results: Sequence[Result]) -> dict[str, list[str]]:
    found = {
        name.replace("_", " "): sorted({str(result["environment"][name]) for result in results})
        for name in results[0]["environment"]
    }
    return {**found, "commit": sorted({short_commit(r["environment"]["commit"]) for r in results})}


def _definitions(terms: Mapping[str, Sequence[str]]) -> str:
    """The rows of a definition list."""
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(', '.join(texts))}</dd>"
        for name, texts in terms.items()
    )
