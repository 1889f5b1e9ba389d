"""``slm doctor``: what slm finds on this machine, and whether a store is whole."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import AsJson
from slm.cli.output import print_json, print_line, print_table
from slm.errors import SlmError

EXAMPLES = ("slm doctor", "slm doctor notes --repair")

_PACKAGES = ("scalable-lm", "torch", "transformers", "lancedb")


def doctor(
    store: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="A store to check.", show_default=False)
    ] = None,
    is_repairing: Annotated[
        bool, typer.Option("--repair", help="Remove what interrupted writes left in STORE.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report versions, processor and packaged models, check a store; exit 1 when there are problems."""
    if is_repairing and store is None:
        raise typer.BadParameter("--repair needs a STORE")
    found = _examine_machine()
    found["problems"] = [text for text in found["models"].values() if text not in ("ok", "not installed")]
    if store is not None:
        found["repairs"], problems = _examine_store(store, is_repairing)
        found["problems"] += problems
    print_json(found) if as_json else _print_findings(found)
    if found["problems"]:
        raise typer.Exit(1)


def _examine_machine() -> dict[str, Any]:
    import os
    import platform

    from slm.backbone.cache import cache_folder
    from slm.backbone.load import ALIASES, choose_dtype

    device, dtype = choose_dtype()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "models": {alias: _examine_model(alias, model.module) for alias, model in ALIASES.items()},
        "cache_folder": str(cache_folder()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _examine_model(alias: str, module: str) -> str:
    from slm.backbone.load import locate

    if find_spec(module) is None:
        return "not installed"
    try:
        locate(alias)
    except SlmError as error:
        return str(error)
    return "ok"


def _examine_store(folder: Path, is_repairing: bool) -> tuple[list[str], list[str]]:
    from slm.store import Store

    try:
        store = Store.open(folder)
        return store.repair() if is_repairing else [], store.check()
    except SlmError as error:
        return [], [str(error)]


def _print_findings(found: dict[str, Any]) -> None:
    rows = [*found["versions"].items(), *((name, str(found[name])) for name in ("device", "dtype", "cores"))]
    rows += [(f"model {alias}", text) for alias, text in found["models"].items()]
    print_table(("what", "found"), [*rows, ("cache folder", found["cache_folder"])], num_texts=2)
    for line in found.get("repairs", ()):
        print_line(line)
    for problem in found["problems"]:
        print_line(f"problem: {problem}", "red")
    if not found["problems"]:
        print_line("no problems", "green")
