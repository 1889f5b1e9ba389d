"""``slm bench``: run the field's benchmarks, and write their reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import AsJson
from slm.cli.output import print_json, print_line, print_table

EXAMPLES = (
    "slm bench long --data data --methods slm,oracle,replay-10 --out runs/long",
    "slm bench report runs/long",
)
_DATA = typer.Option(metavar="DATA_FOLDER", help="Holds TASK/{train,test}.jsonl; without it the hub is read.")


class _Bench(typer.core.TyperGroup):
    """A group whose first word may be a suite: ``slm bench long`` is ``slm bench run long``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(cls=_Bench, no_args_is_help=True, help="Run a suite of tasks with rivals beside slm.")


@app.command(epilog="\n\n  ".join(("Examples:", *EXAMPLES)))
def run(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A name of `slm bench list`, or a .yaml file.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Results; finished cells are not run again.")],
    data: Annotated[Path | None, _DATA] = None,
    methods: Annotated[str | None, typer.Option(metavar="NAME,...", show_default="all")] = None,
    preset: Annotated[str, typer.Option(help="Scale: full, cpu, or another of the suite.")] = "cpu",
    orders: Annotated[str | None, typer.Option(metavar="NAME,...", show_default="the preset's")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,...", show_default="the preset's")] = None,
    shots: Annotated[str | None, typer.Option(metavar="N,...,all", show_default="the whole curve")] = None,
    backbone: Annotated[str | None, typer.Option(metavar="MODEL", show_default="the preset's")] = None,
    train: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most examples of a task.")] = None,
    test: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most test rows of a task.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Cells computed at once.")] = None,
    is_alone: Annotated[bool, typer.Option("--alone", help="Learn each task alone too.")] = False,
) -> None:
    """Run the cells of a suite that are not in the folder yet; a killed run goes on where it was."""
    from slm.bench.plan import plan_run, run_with_bar, split_names

    planned = plan_run(
        suite,
        preset,
        methods=split_names(methods),
        orders=split_names(orders),
        seeds=split_names(seeds),
        shots=split_names(shots),
        changes={"backbone": backbone, "train": train, "test": test},
        places=(data, out),
        is_alone=is_alone,
    )
    num_done = run_with_bar(planned, jobs)
    print_line(f"{num_done} cells computed, {len(planned.cells)} in {out}: slm bench report {out}")


@app.command(epilog=f"Examples:\n\n  {EXAMPLES[1]}\n\n  slm bench report runs/long --json")
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The --out folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html, report.md and pictures into the folder of a run."""
    from slm.bench.cells import RunFolder
    from slm.bench.run_page import table_as_dicts, write_report
    from slm.bench.run_text import leaderboard_table
    from slm.bench.tables import leaderboard

    path = write_report(folder)
    header, rows = leaderboard_table(leaderboard(RunFolder(folder).results()))
    if as_json:
        return print_json({"file": str(path), "leaderboard": table_as_dicts((header, rows))})
    print_table(header, rows)
    return print_line(f"\nwrote {path}")


@app.command("list", epilog="Examples:\n\n  slm bench list\n\n  slm bench list --json")
def list_(as_json: AsJson = False) -> None:
    """List suites, presets and methods."""
    from slm.bench.baselines import NAMES
    from slm.bench.suite_file import load_suite, suite_names

    suites = {name: load_suite(name) for name in suite_names()}
    if as_json:
        told = {n: {"title": s.title, "presets": list(s.presets)} for n, s in suites.items()}
        return print_json({"suites": told, "methods": list(NAMES)})
    for name, suite in suites.items():
        print_line(f"{name:<12} {suite.title} ({', '.join(suite.presets)})")
    return print_line(f"\nmethods: {', '.join(NAMES)}")
