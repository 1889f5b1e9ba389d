"""Arguments and options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
IsTruncating = Annotated[
    bool, typer.Option("--truncate", help="Cut the middle out of over-long texts instead of refusing them.")
]
