"""``slm init``: make an empty store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.options import AsJson, StoreFolder
from slm.cli.output import print_json, print_line, show_activity
from slm.cli.settings import read_config

EXAMPLES = (
    "slm init notes",
    "slm init notes --backbone smollm2 --set retrieval.top_k=1 --set learning.num_epochs=5",
)


def init(
    store: StoreFolder,
    backbone: Annotated[
        str, typer.Option(help="minilm, smollm2, a model folder, a .gguf file or a hub id.")
    ] = "minilm",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the store, .json or .yaml.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="One setting; repeat it for more, it wins over --config."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an empty store in a new or empty folder, for one backbone and its settings."""
    settings = read_config(config, assignments or ())
    with show_activity(f"making the store {store}"):
        from slm.model import ScalableLM

        model = ScalableLM.create(store, backbone, settings)
    made = {
        "store": str(model.store.path),
        "backbone": model.backbone.source,
        "kind": model.backbone.kind.value,
        "fingerprint": model.backbone.fingerprint,
        "config": model.config.as_dict(),
    }
    if as_json:
        return print_json(made)
    print_line(f"made the store {store} for the {made['kind']} backbone {made['backbone']}")
    print_line(f"next: slm learn {store} NAME SOURCE", "dim")
