"""``slm map``: draw keys, questions and regions of a store as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import print_json, print_line

if TYPE_CHECKING:
    from slm.bench.map.store_map import StoreMap

EXAMPLES = (
    "slm map notes -o map.html --data data --limit 50",
    "slm map notes -o map.html --file questions.txt --json",
)


def map_(
    store: StoreFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="HTML", help="The page to write.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATA_FOLDER", help="Ask NAME/test.jsonl, whose tasks are known."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask these questions, one a line, or a data file.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask at most N test rows of each task.")
    ] = None,
    is_truncating: IsTruncating = False,
    as_json: AsJson = False,
) -> None:
    """Draw where keys and questions lie, and beside it which task's questions went where.

    Without questions the keys and their regions are drawn.
    """
    if limit is not None and data is None:
        raise typer.BadParameter("--limit needs --data")
    from slm.bench.map.page import check_map_file, write_map
    from slm.bench.map.survey import map_store
    from slm.evaluation.matrix import prompt_of
    from slm.tasks import Example, Stream, read_questions

    stream = None if data is None else Stream.load(data, test_limit=limit)
    questions = [] if file is None else [prompt_of(Example(question)) for question in read_questions(file)]
    model = open_model(store)
    check_map_file(output)
    drawn = map_store(model, stream, questions, is_truncating=is_truncating)
    write_map(drawn, output, f"Map of {store.resolve().name}")
    return print_json({"file": str(output)} | drawn.as_dict()) if as_json else _print_map(drawn, output)


def _print_map(drawn: StoreMap, output: Path) -> None:
    counts = {"tasks": drawn.tasks, "keys": drawn.keys, "questions": drawn.questions}
    print_line(f"wrote {output}: {', '.join(f'{len(items)} {name}' for name, items in counts.items())}")
    shares = {
        "misrouting": drawn.misrouting,
        "false refusals": drawn.false_refusal_rate,
        "outsiders let in": drawn.outsiders_let_in,
        "drawn in the region of their nearest task": drawn.agreement,
    }
    known = [f"{name} {share:.3f}" for name, share in shares.items() if share is not None]
    if known:
        print_line(", ".join(known), "dim")
