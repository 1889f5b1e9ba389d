"""Forward transfer: does a few-shot task learn better from what is stored than alone?

    python benchmarks/forward_transfer.py --data ../shared/data --work ~/.cache/slm/forward-transfer

The tasks of order 8 arrive one after another at MiniLM with a few examples a class. Each is learned with
``start: retrieved`` in a store of those before it, and alone as well where it took a start; where it did
not, both are the same to the bit. The tasks before it were learned from as few examples, or from ``--stored``
rows (then give the files another ``--name``). Test rows are answered with the task's own increment and head,
so that routing does not enter. A killed run goes on where it stopped when given the same ``--work`` folder.
Writes ``<out>/<name>.json``, ``<out>/<name>.md`` and ``<out>/<name>.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from core_stream import environment, timed

from slm import Config, ScalableLM, Stream, Task
from slm.backbone.backbone import Backbone
from slm.backbone.heads import apply_head
from slm.backbone.load import load_backbone
from slm.bench.report import open_figure, save_figure
from slm.config import BackboneConfig, LearningConfig
from slm.learning.learner import training_rows
from slm.learning.transfer import features

ORDER = "mnli,cb,wic,copa,qqp,boolq,rte,imdb,yelp,amazon,sst2,dbpedia,agnews,multirc,yahoo"
"""Order 8 of the long stream."""

RICH_EPOCHS = 3
"""Of tasks that are learned from many rows."""


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and finished cells")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", default=ORDER, help="names in order of arrival")
    parser.add_argument("--shots", default="16", help="examples of each class, such as 16,64,256")
    parser.add_argument("--draws", type=int, default=2, help="draws of the examples")
    parser.add_argument("--first-draw", type=int, default=0, help="number of the first draw")
    parser.add_argument("--stored", type=int, default=0, help="rows that earlier tasks were learned from")
    parser.add_argument("--name", default="forward_transfer", help="of the written files")
    parser.add_argument("--test", type=int, default=300, help="most test rows of each task")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def settings(args: argparse.Namespace, seed: int) -> Config:
    """All examples are learned: of so few, none can be spared to stop by."""
    return Config(
        backbone=BackboneConfig(max_tokens=args.max_tokens),
        learning=LearningConfig(
            num_epochs=args.epochs,
            batch_size=16,  # of the committed results, larger than the library's default for so few
            validation_share=0.0,
            is_truncating=True,
            start="retrieved",
            seed=seed,
            has_progress=False,
        ),
    )


def opened(folder: Path, backbone: Backbone, config: Config) -> ScalableLM:
    """The store in a folder, made where there is none yet."""
    if (folder / "store.json").is_file():
        return ScalableLM.open(folder, backbone)
    return ScalableLM.create(folder, backbone, config)


def knows(model: ScalableLM, task: Task) -> bool:
    """Whether a killed run has learned the task already."""
    return any(record.name == task.name for record in model.tasks)


def score(model: ScalableLM, task: Task, limit: int) -> float:
    """Accuracy on the task's test rows, answered with its own increment and head."""
    shown = [example for _, example in Stream((task,)).mixed_test(limit, 0)]
    rows = training_rows(model, task, shown, model.config.learning)
    record = model.store.task(task.name)
    head = model.store.head(record)
    assert head is not None
    logits = apply_head(head, features(model, rows, model.store.increment(record, 0)))
    return float((logits.argmax(1) == torch.tensor([row.label for row in rows])).float().mean())


def store_before(
    args: argparse.Namespace, backbone: Backbone, earlier: Sequence[Task], folder: Path, seed: int
) -> ScalableLM:
    """The store that a task arrives at, in a folder of its draw: the tasks before it, and no other one."""
    if not args.stored:
        return opened(folder, backbone, settings(args, seed))
    rich = opened(args.work / f"stored{args.stored}", backbone, settings(args, 0))
    for task in earlier:
        if not knows(rich, task):
            rich.learn(task.sample(args.stored), start="none", num_epochs=RICH_EPOCHS)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(args.work / f"stored{args.stored}", folder)
    model = ScalableLM.open(folder, backbone)
    for name in {record.name for record in model.tasks} - {task.name for task in earlier}:
        model.forget(name)
    return model


def run_cell(
    args: argparse.Namespace, backbone: Backbone, earlier: Sequence[Task], task: Task, shots: int, seed: int
) -> dict[str, Any]:
    """One task of one draw: learned from what is stored, and alone where that is something else."""
    folder = args.work / f"stored{args.stored}-shots{shots}-draw{seed}"
    cell = folder / f"{task.name}.json"
    if cell.is_file():
        found: dict[str, Any] = json.loads(cell.read_text())
        return found
    drawn = task.sample_per_label(shots, seed)
    started = store_before(args, backbone, earlier, folder / "started", seed)
    if not knows(started, task):
        started.learn(drawn, seed=seed)
    metadata = started.store.task(task.name).metadata
    found = {"task": task.name, "shots": shots, "draw": seed, "num_examples": len(drawn.examples)}
    found |= {"started_from": metadata["started_from"], "start_errors": metadata["start_errors"]}
    found["started"] = found["alone"] = score(started, drawn, args.test)
    if metadata["started_from"]:
        alone = opened(folder / "alone", backbone, settings(args, seed))
        if not knows(alone, task):
            alone.learn(drawn, start="none", seed=seed)
        found["alone"] = score(alone, drawn, args.test)
    folder.mkdir(parents=True, exist_ok=True)
    cell.write_text(json.dumps(found, indent=1))
    return found


def summary(cells: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Means over the draws of one number of shots, in points of accuracy."""
    own = {name: [cell for cell in cells if cell["task"] == name] for name in tasks}
    gains = {name: 100 * fmean(c["started"] - c["alone"] for c in found) for name, found in own.items()}
    total = sum(gains.values())
    largest = max(gains, key=lambda name: gains[name])
    return {
        "alone": {name: 100 * fmean(c["alone"] for c in found) for name, found in own.items()},
        "started": {name: 100 * fmean(c["started"] for c in found) for name, found in own.items()},
        "gains": gains,
        "mean_gain": total / len(tasks),
        "worst": min(gains.values()),
        "largest": largest,
        "share_of_largest": gains[largest] / total if total > 0 else None,
    }


def table(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    lines = [
        f"MiniLM, {len(results['tasks'])} tasks in order of arrival, {results['draws']} draws, "
        f"at most {results['test']} test rows a task, {results['epochs']} epochs, {results['max_tokens']} "
        f"tokens; the tasks before were learned from {results['stored'] or 'as few'} examples. Forward "
        "transfer is the score with `start: retrieved` less that of the same learner alone. Points of "
        "accuracy, means over draws; a task without a start is the same learned alone. Commit "
        f"{results['environment']['commit'][:7]}."
    ]
    for shots, found in results["summaries"].items():
        lines += ["", f"{shots} examples a class:", "", "| task | alone | started | gain | started from |"]
        lines.append("|---|---:|---:|---:|---|")
        for name in results["tasks"]:
            sources = [
                "+".join(cell["started_from"]) or "none"
                for cell in results["cells"]
                if cell["task"] == name and str(cell["shots"]) == shots
            ]
            numbers = [f"{found[key][name]:.1f}" for key in ("alone", "started")]
            lines.append(
                f"| {name} | {' | '.join(numbers)} | {found['gains'][name]:+.1f} | {'; '.join(sources)} |"
            )
        share = found["share_of_largest"]
        part = "" if share is None else f"; {100 * share:.0f}% of it from {found['largest']}"
        lines += ["", f"Mean gain {found['mean_gain']:+.2f}, worst task {found['worst']:+.2f}{part}."]
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Gains per task, and the few-shot curve where there is more than one number of shots."""
    figure = open_figure(11, 4.5)
    bars, curve = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 1]})
    names, summaries = results["tasks"], results["summaries"]
    width = 0.8 / len(summaries)
    for i, (shots, found) in enumerate(summaries.items()):
        places = [j + i * width for j in range(len(names))]
        bars.bar(places, [found["gains"][name] for name in names], width, label=f"{shots} a class")
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_xticks(range(len(names)), names, rotation=45, ha="right")
    bars.set_ylabel("gain over learning alone (points)")
    bars.legend()
    for key in ("alone", "started"):
        means = [fmean(found[key].values()) for found in summaries.values()]
        curve.plot(range(len(means)), means, marker="o", label=key)
    curve.set_xticks(range(len(summaries)), list(summaries))
    curve.set_xlabel("examples of each class")
    curve.set_ylabel("mean accuracy (%)")
    curve.legend()
    save_figure(figure, path)


def main() -> None:
    """Run or pick up every cell, write the files."""
    args = arguments()
    names, shots = args.tasks.split(","), [int(number) for number in args.shots.split(",")]
    stream = Stream.load(args.data, names)
    backbone = load_backbone("minilm", settings(args, 0).backbone)
    cells = []
    draws = range(args.first_draw, args.first_draw + args.draws)
    for place, task in enumerate(stream):
        for number, seed in itertools.product(shots, draws):
            with timed(f"{number} shots, draw {seed}, {task.name}"):
                cells.append(run_cell(args, backbone, stream.tasks[:place], task, number, seed))
    by_shots = {str(n): [cell for cell in cells if cell["shots"] == n] for n in shots}
    results = {
        "tasks": names,
        "draws": args.draws,
        "test": args.test,
        "epochs": args.epochs,
        "stored": args.stored,
        "max_tokens": args.max_tokens,
        "summaries": {n: summary(own, names) for n, own in by_shots.items()},
        "cells": cells,
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["<!-- written by benchmarks/forward_transfer.py -->", "", *table(results)]
    (args.out / f"{args.name}.md").write_text("\n".join(lines) + "\n")
    draw(results, args.out / f"{args.name}.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
