"""``slm key``: make a bearer key for ``slm serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.options import AsJson
from slm.cli.output import print_json, print_line

EXAMPLES = ("slm key keys.json app", "slm key keys.json trainer --scope teach --scope ask")


def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Keys file; made if it is not there.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who the key is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="ask (the default), teach or admin.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and add its hash to a keys file; the key itself is shown this once."""
    from slm.serving.keys import add_key

    scopes = scope or ["ask"]
    made = add_key(file, name, scopes)
    if as_json:
        return print_json({"name": name, "scopes": scopes, "key": made})
    print_line(made)
    print_line(f"for {name}: {', '.join(scopes)}; only its hash is kept, in {file}", "dim")
