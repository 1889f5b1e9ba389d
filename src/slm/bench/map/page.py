"""One HTML page with the map of a store; it needs no other file and asks nothing of the network."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template
from tempfile import TemporaryFile
from typing import Any

from slm.bench.map.confusion_figure import draw_confusion
from slm.bench.map.plane_figure import MIN_WIDTH_PX, draw_plane
from slm.bench.map.store_map import ABSTAINED, Confusion, StoreMap
from slm.bench.map.style import HEIGHT_PX, Figure
from slm.errors import ConfigError
from slm.store.values import replace_bytes

_NUM_MISTAKES = 12
_CONFIG = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 1rem auto;
  padding: 0 1rem; max-width: 1720px; }
h1 { font-size: 1.25rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: .2rem 0; }
ul.numbers { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; list-style: none;
  margin: 0 0 .8rem; padding: 0; }
ul.numbers b { font-size: 1.15rem; }
.row { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: ${beside_width}px) { .two { grid-template-columns: minmax(0, 1.3fr) minmax(0, 1fr); } }
.figure { height: ${height}px; }
p { max-width: 75ch; margin: .5rem 0; color: #444; }
table { border-collapse: collapse; margin: .3rem 0; }
td, th { text-align: left; padding: .1rem 1.2rem .1rem 0; }
td { overflow-wrap: break-word; max-width: 40ch; }
td.number, th.number { text-align: right; }
</style>
</head>
<body>
<h1>$title</h1>
<ul class="numbers">$numbers</ul>
<div class="row $columns">
<section><h2>$heading</h2>
<div class="figure">$plane</div>
$caption</section>
$beside
</div>
<script>
for (const figure of document.querySelectorAll(".plotly-graph-div")) {
  const axes = ["xaxis", "yaxis"].map((name) => [name + ".range", figure.layout[name].range?.slice()]);
  const view = Object.fromEntries(axes.filter(([, range]) => range));
  let width = figure.parentElement.clientWidth;
  addEventListener("resize", () => {
    if (figure.parentElement.clientWidth === width) return;
    width = figure.parentElement.clientWidth;
    Plotly.relayout(figure, { width, ...view });
  });
}
</script>
</body>
</html>
""")


def check_map_file(path: str | Path) -> None:
    """Refuse a page that cannot be made, before anything is computed.

    Raises:
        ConfigError: plotly is missing, or the file is no .html file or cannot be written.
    """
    _plotly()
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path} is no .html file, which a map is: name one, such as map.html")
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"), TemporaryFile(dir=path.parent):  # it is written beside and renamed
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write_map(drawn: StoreMap, path: str | Path, title: str) -> Path:
    """Write the page.

    Args:
        drawn: what :func:`slm.bench.map.survey.map_store` found.
        path: an .html file; one that exists is written over.
        title: what the page is of, a store's name say.

    Raises:
        ConfigError: plotly is missing, or the file cannot be written.
    """
    path, confusion = Path(path), drawn.confusion
    beside = ""
    if confusion is not None:
        beside = (
            "<section><h2>Confusion matrix</h2>\n"
            f'<div class="figure">{_embed(draw_confusion(confusion), "matrix")}</div>\n'
            f"{_tell_matrix(confusion)}</section>"
        )
    page = _PAGE.substitute(
        title=html.escape(title),
        numbers="".join(f"<li><b>{value}</b> {name}</li>" for name, value in _numbers(drawn)),
        plane=_embed(draw_plane(drawn), "map", has_library=True),
        caption=_tell_plane(drawn),
        beside=beside,
        heading="Keys, questions and regions" if drawn.questions else "Keys and regions",
        columns="two" if beside else "",
        beside_width=round(MIN_WIDTH_PX * 2.3 / 1.3 + 50),
        height=HEIGHT_PX,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, page.encode("utf-8", "xmlcharrefreplace"))
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _embed(figure: Figure, name: str, has_library: bool = False) -> str:
    """A figure as HTML; plotly writes its data with < and > escaped."""
    text: str = _plotly().to_html(
        figure, config=_CONFIG, include_plotlyjs=has_library, full_html=False, div_id=name
    )
    return text


def _numbers(drawn: StoreMap) -> list[tuple[str, str]]:
    found = [("tasks", str(len(drawn.tasks))), ("keys", str(len(drawn.keys)))]
    if drawn.questions:
        found.append(("questions", str(len(drawn.questions))))
    shares = {
        "misrouted": drawn.misrouting,
        "of learned tasks refused": drawn.false_refusal_rate,
        "of other tasks let in": drawn.outsiders_let_in,
        "lie in the region of their nearest task": drawn.agreement,
    }
    return found + [(name, f"{100 * share:.1f}%") for name, share in shares.items() if share is not None]


def _tell_plane(drawn: StoreMap) -> str:
    """What the map shows and what it cannot."""
    told = []
    if drawn.num_axes:
        space = (
            "one unit is one standard deviation of a task's own queries"
            if drawn.form == "gaussian"
            else "a query's groups of channels, each of unit length"
        )
        told.append(f"Places lie in the space in which the store decides ({space}).")
    told.append("A question has colour and symbol of its nearest task.")
    if drawn.num_axes < 2:
        told.append(
            "The keys differ in too few directions for a plane, so the height says how far a question is "
            "beyond the threshold of its nearest key. The regions are exact."
        )
    elif drawn.is_exact:
        told.append("The keys differ in no more directions than are drawn: the regions are exact.")
    else:
        which = "keys of different tasks" if len(drawn.tasks) > 1 else "keys"
        told.append(
            f"The keys differ in {drawn.num_directions} directions. These two are the ones that tell {which} "
            f"apart best, and hold {100 * drawn.drawn_share:.0f}% of their squared "
            "distances; the regions are those of the nearest key on paper, a projection of the decision."
        )
    if drawn.reaches and drawn.is_reach_exact:
        told.append("Outside the dotted outline of its nearest key a question is refused.")
    elif drawn.reaches:
        told.append("Outside a key's dotted outline (off at first) it refuses; inside it may.")
    if any(q.is_misrouted for q in drawn.questions):
        told.append("A red ring marks a question nearest to a key of another task than its own.")
    return f"<p>{' '.join(told)}</p>"


def _tell_matrix(confusion: Confusion) -> str:
    """The most frequent mistakes, by name."""
    told = (
        f"Each row is a task's questions, and where they went; “{ABSTAINED}” counts those that were refused. "
        "Blue is right and orange is wrong."
    )
    if confusion.num_learned < len(confusion.rows):
        told += " Tasks below the line were never learned: to refuse them is right."
    mistakes = confusion.mistakes()
    if not mistakes:
        return f"<p>{told} There is no mistake.</p>"
    rows = "".join(
        f'<tr><td>{row}</td><td>{column}</td><td class="number">{count} of {total}</td></tr>'
        for row, column, count, total in mistakes[:_NUM_MISTAKES]
    )
    left = len(mistakes) - _NUM_MISTAKES
    more = f"<p>{left} rarer ones are left out.</p>" if left > 0 else ""
    head = '<tr><th>task</th><th>given</th><th class="number">questions</th></tr>'
    return f"<p>{told}</p><h2>Most frequent mistakes</h2><table>{head}{rows}</table>{more}"


def _unwritable(path: Path, error: OSError) -> ConfigError:
    # What stands where its folder should be is all that can exist too soon.
    is_in_the_way = isinstance(error, FileExistsError)
    reason = "Not a directory" if is_in_the_way else " ".join((error.strerror or str(error)).split())
    return ConfigError(f"{path} cannot be written ({reason}): name a file in a folder you may write to")


def _plotly() -> Any:
    """Import plotly's writer.

    Raises:
        ConfigError: plotly is missing.
    """
    try:
        import plotly.io
    except ImportError as error:
        raise ConfigError("maps need plotly: pip install 'scalable-lm[bench]'") from error
    return plotly.io
