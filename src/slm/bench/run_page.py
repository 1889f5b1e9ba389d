"""One HTML page of a run; it needs no other file and asks nothing of the network."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from slm.bench.cells import RunFolder
from slm.bench.report import save_figure
from slm.bench.run_figures import draw_figures
from slm.bench.run_notes import drift_notes, notes
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

_LARGE_IS_BEST = ("average", "when learned", "backward transfer", "forward transfer")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --quiet: #555; --bound: #666; --own: #eaf3fa;
  --line: #e4e4e4; --code: #f5f5f5; --focus: #0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --quiet: #b4b4b4; --bound: #a3a3a3; --own: #1b3347;
    --line: #34373b; --code: #212429; --focus: #56B4E9; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 1.5rem auto;
  padding: 0 1.2rem; max-width: 1480px; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 80ch; margin: .4rem 0; color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .28rem .7rem .28rem .3rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid var(--text); font-weight: 600; cursor: pointer; vertical-align: bottom;
  white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 12rem; }
td { border-bottom: 1px solid var(--line); }
tr.bound td { color: var(--bound); font-style: italic; }
tr.own td, tr.own td:first-child { font-weight: 600; background: var(--own); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--focus); }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
figure { margin: .6rem 0; padding: .5rem; overflow-x: auto; background: #fff; border-radius: 4px;
  width: fit-content; max-width: 100%; box-sizing: border-box; }
figure svg { display: block; max-width: 100%; height: auto; }
pre { background: var(--code); padding: .7rem 1rem; white-space: pre-wrap; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 80ch); gap: .1rem 1.2rem; font-size: 14px; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  body { padding: 0 .8rem; }
  table { font-size: 13px; }
  th:first-child, td:first-child { min-width: 7rem; max-width: 9rem; padding-right: .3rem; line-height: 1.25;
    overflow-wrap: anywhere; }
  dl { grid-template-columns: minmax(0, 1fr); } dt { margin-top: .4rem; }
  figure svg { max-width: none; }
}
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
const number = (text) => text === "all" ? Infinity : parseFloat(text.replaceAll(",", ""));
const compare = (x, y, sign) => {
  if (x === "–" || y === "–") return (x === "–") - (y === "–");
  const [a, b] = [number(x), number(y)];
  return sign * (isNaN(a) || isNaN(b) ? x.localeCompare(y) : a < b ? -1 : a > b ? 1 : 0);
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const cell = button.closest("th"), table = cell.closest("table"), at = cell.cellIndex;
    const [first, second] = cell.dataset.best === "large" ? ["descending", "ascending"]
      : ["ascending", "descending"];
    const sort = cell.getAttribute("aria-sort") === first ? second : first;
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", sort);
    const value = (row) => row.cells[at].textContent;
    const sign = sort === "ascending" ? 1 : -1;
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((p, q) => compare(value(p), value(q), sign)));
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
        sections.append(f"<p>{html.escape(what)}</p>{_table(table, _marks(lines, table), table[0][1:])}")
    sections += [_figure_section(name, figures, told) for name in ("matrices", "confusion")]
    drift = drift_rows(results)
    if drift:
        sections.append(
            "<h2>Base-model drift</h2><p>What was never learned: loss on unrelated texts (nats a token) and "
            "zero-shot scores; in brackets the change against the frozen backbone.</p>"
            + _table(drift, [])
            + _paragraphs(drift_notes(results))
        )
    return _PAGE.substitute(
        title=html.escape(run["title"]),
        about=html.escape(
            f"Preset {run['preset']}: {run['about']}. Backbone {run['backbone']}; {describe_cells(results)}."
        ),
        formulas=html.escape(FORMULAS),
        columns=_definitions({name: [COLUMNS[name]] for name in board[0] if name in COLUMNS}),
        leaderboard=_table(board, [_mark(line) for line in lines]),
        notes=_paragraphs(notes(run, results)),
        sections="\n".join(sections),
        command=html.escape(command_of(run, results)),
        environment=_definitions(_environment(results)),
    )


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


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
    # Shrunk no further than it can be read; it scrolls then.
    narrowest = f"min-width: {0.8 * figure.get_figwidth():.1f}in"
    marked = f'<svg role="img" aria-label="{html.escape(title)}" style="{narrowest}"'
    return text[text.index("<svg") :].replace("<svg", marked, 1)


def _table(table: Table, marks: Sequence[str], best: Collection[str] = _LARGE_IS_BEST) -> str:
    """A table that sorts by the columns clicked, the largest first in those of ``best``."""
    header, rows = table
    head = "".join(
        f"<th scope=col{' data-best=large' if name in best else ''}><button>{html.escape(name)}</button></th>"
        for name in header
    )
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
