"""``slm tasks``: list what a store has learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slm.cli.options import AsJson, StoreFolder
from slm.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from slm.store import TaskRecord

EXAMPLES = ("slm tasks notes", "slm tasks notes --json")


def tasks(store: StoreFolder, as_json: AsJson = False) -> None:
    """List the learned tasks in the order in which they were learned."""
    from slm.store import Store

    opened = Store.open(store)
    learned = [_describe(record, opened.size_bytes(record)) for record in opened.tasks()]
    if as_json:
        return print_json(learned)
    if not learned:
        return print_line(f"no tasks yet: slm learn {store} NAME SOURCE")
    print_table(
        ("task", "kind", "labels", "examples", "keys", "MB", "learned"),
        [_cells(row) for row in learned],
        num_texts=3,
    )


def _describe(record: TaskRecord, size_bytes: int) -> dict[str, Any]:
    return {
        "task": record.name,
        "kind": record.kind,
        "labels": list(record.labels),
        "num_examples": record.num_examples,
        "num_keys": record.num_keys,
        "size_bytes": size_bytes,
        "validation_score": record.metadata.get("validation_score"),
        "created": record.created,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    labels = row["labels"]
    shown = ", ".join(labels) if len(labels) <= 4 else f"{', '.join(labels[:3])} and {len(labels) - 3} more"
    numbers = str(row["num_examples"]), str(row["num_keys"]), f"{row['size_bytes'] / 1e6:.2f}"
    return row["task"], row["kind"], shown, *numbers, row["created"][:10]
