"""Opening a store on the command line: what computes is imported only here, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.output import show_activity

if TYPE_CHECKING:
    from slm.model import ScalableLM


def open_model(store: Path) -> ScalableLM:
    """Open a store for a command, which has checked by then what needs no backbone.

    Raises:
        StoreError: no store is there, it is damaged, or it was made with another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    with show_activity(f"opening {store}"):
        from slm.model import ScalableLM

        return ScalableLM.open(store)
