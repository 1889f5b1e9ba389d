"""What ``slm doctor`` asks of a store, and the one repair that can lose nothing."""

from __future__ import annotations

from contextlib import suppress

from slm.errors import StoreError
from slm.store.folders import TaskFolders, remove_entry
from slm.store.records import TaskRecord
from slm.store.sums import Snapshots
from slm.store.tables import Tables, keys_problem


def find_problems(tables: Tables, folders: TaskFolders, snapshots: Snapshots) -> list[str]:
    """One line for everything in a store that is not as the catalogue says; empty when all is well."""
    records, rows = tables.tasks(), tables.key_rows()
    problems = [problem for record in records for problem in _task_problems(record, folders)]
    for record in records:
        problem = keys_problem(record, rows.get(record.commit_id, []))
        if problem is not None:
            problems.append(problem)
    for entry in folders.orphans(records):
        problems.append(f"tasks/{entry.name} belongs to no task, a write was cut short: repair removes it")
    for commit_id in sorted(rows.keys() - {record.commit_id for record in records}):
        problems.append(
            f"{len(rows[commit_id])} keys of commit {commit_id} belong to no task, a write was cut short: "
            "repair removes them"
        )
    for entry in snapshots.strays([record.commit_id for record in records]):
        problems.append(
            f"pooled/{entry.name} is no sum of the present tasks, a write was cut short: repair removes it"
        )
    return problems


def remove_orphans(tables: Tables, folders: TaskFolders, snapshots: Snapshots) -> list[str]:
    """Remove folders, key rows and sums that are not of the visible tasks; a line for each. Needs the lock.

    Visible tasks are never touched, damaged or not. Rows deleted earlier are erased from the disk as well,
    as whoever deleted them may have been killed before that.
    """
    records, rows = tables.tasks(), tables.key_rows()
    done = []
    for entry in folders.orphans(records):
        remove_entry(entry)
        done.append(f"removed tasks/{entry.name}")
    for entry in snapshots.strays([record.commit_id for record in records]):
        remove_entry(entry)
        done.append(f"removed pooled/{entry.name}")
    orphans = sorted(rows.keys() - {record.commit_id for record in records})
    if orphans:
        tables.delete_keys(orphans)
        done += [f"removed {len(rows[commit_id])} keys of commit {commit_id}" for commit_id in orphans]
    tables.erase_deleted()
    return done


def _task_problems(record: TaskRecord, folders: TaskFolders) -> list[str]:
    problems = []
    for file in record.files:
        try:
            folders.read(record, file.path, is_forced=True)
        except StoreError as error:
            problems.append(str(error))
    with suppress(StoreError):  # a row that leads out of the store; said above
        for path in folders.strays(record):
            problems.append(
                f"{record.folder}/{path} is not in the catalogue: nothing reads it, you may delete it"
            )
    return problems
