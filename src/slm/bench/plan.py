"""From what a command line says to the cells of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from slm.bench.baselines import NAMES, rival
from slm.bench.cells import Cell
from slm.bench.rival import settle
from slm.bench.runner import Run, run_suite
from slm.bench.suite import Preset, nearest, shots_text
from slm.bench.suite_file import SUITE_ENDINGS, load_suite
from slm.errors import ConfigError


def plan_run(
    suite: str,
    preset: str,
    *,
    methods: Sequence[str] | None,
    orders: Sequence[str] | None,
    seeds: Sequence[str] | None,
    shots: Sequence[str] | None = None,
    changes: Mapping[str, Any],
    places: tuple[Path | None, Path],
    is_alone: bool = False,
) -> Run:
    """Put a run together and refuse what cannot be run, before anything is computed.

    Args:
        suite: name or file.
        preset: its name.
        methods: names of rivals; None takes all.
        orders: names of the suite's orders; None takes the preset's.
        seeds: whole numbers; None takes the preset's.
        shots: numbers of examples of each label, or "all", of a preset that has several; None takes all.
        changes: fields of the preset with other values; None changes nothing.
        places: folder of the data, None for the hub; folder of the results.
        is_alone: whether every task is learned alone too.

    Raises:
        ConfigError: a name is unknown, a method has no such setting, or a seed is no number.
    """
    chosen = load_suite(suite)
    options = {name: value for name, value in changes.items() if value is not None}
    scale = replace(chosen.preset(preset), **options)
    if orders is not None:
        _check("order", orders, list(chosen.orders))
        scale = replace(scale, orders=tuple(dict.fromkeys(orders)))
    if seeds is not None:
        bad = [seed for seed in seeds if not seed.isdecimal()]
        if bad:
            raise ConfigError(f"--seeds must be whole numbers from 0, got {bad[0]!r}: write --seeds 0,1,2")
        scale = replace(scale, seeds=tuple(dict.fromkeys(map(int, seeds))))
    if methods is not None:
        _check("method", methods, list(NAMES))
    chosen_methods = tuple(dict.fromkeys(methods or NAMES))
    for method in chosen_methods:
        settle(scale.methods.get(method, {}), rival(method).defaults)
    chosen_shots = None if shots is None else _choose_shots(shots, scale)
    data, out = places
    file = suite if suite.endswith(SUITE_ENDINGS) else None
    return Run(chosen, scale, chosen_methods, data, out, is_alone, options, chosen_shots, file)


def _choose_shots(shots: Sequence[str], preset: Preset) -> tuple[int | None, ...]:
    if not preset.per_label:
        raise ConfigError(f"preset {preset.name} has one number of examples, no curve: leave out --shots")
    known = {shots_text(number): number for number in preset.per_label}
    _check("number of shots", shots, list(known))
    return tuple(known[shot] for shot in dict.fromkeys(shots))


def run_with_bar(run: Run, num_jobs: int | None) -> int:
    """Run what is missing with one bar for all cells; see :func:`slm.bench.runner.run_suite`."""
    from slm.bench.cells import RunFolder

    num_there = sum(RunFolder(run.out).has(cell) for cell in run.cells)
    with tqdm(total=len(run.cells), initial=num_there, desc="cells", unit="cell") as bar:

        def note(cell: Cell, time_s: float) -> None:
            bar.update()
            bar.set_postfix_str(f"{cell.name} {time_s:.0f} s")

        return run_suite(run, num_jobs=num_jobs, on_done=note)


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Names parted by commas; None stays None."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _check(what: str, names: Sequence[str], known: list[str]) -> None:
    if not names:
        raise ConfigError(f"no {what} was named, known are {', '.join(known)}: name at least one")
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no {nearest(what, name, known)}")
