"""Opening a store on the command line: what computes is imported only here, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.output import show_activity

if TYPE_CHECKING:
    from slm.model import ScalableLM


def open_model(store: Path, *, is_learning: bool = False) -> ScalableLM:
    """Open a store for a command, which has checked by then what needs no backbone.

    Args:
        store: its folder.
        is_learning: import what learning takes as well, so that this wait too is seen.

    Raises:
        StoreError: no store is there, it is damaged, or it was made with another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    with show_activity(f"opening {store}"):
        from slm.model import ScalableLM

        if is_learning:
            import slm.learning  # noqa: F401
        return ScalableLM.open(store)
