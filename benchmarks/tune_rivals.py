"""Tuning of the rivals: three values of the setting that matters most, on validation rows of three tasks.

    python benchmarks/tune_rivals.py --data ../shared/data

MiniLM learns the first three tasks of order 1 (dbpedia, amazon, yahoo) in turn, from 3/4 of 160 examples
each; the score is the mean accuracy on the other quarters after the last task, asked in one shuffled list. No
test row is read. Writes ``<out>/tuning.json`` and ``<out>/tuning.md``; what stands there is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core_stream import environment

from slm import Stream
from slm.backbone.load import load_backbone
from slm.bench.baselines import rival
from slm.bench.rival import Setup
from slm.config import BackboneConfig, Config, LearningConfig

TASKS = ("dbpedia", "amazon", "yahoo")

GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "sequential": ("learning_rate", (2e-5, 5e-5, 2e-4)),
    "sequential-lora": ("learning_rate", (2e-4, 5e-4, 2e-3)),
    "replay-1": ("replayed_per_row", (0.25, 0.5, 1.0)),
    "replay-10": ("replayed_per_row", (0.25, 0.5, 1.0)),
    "ewc": ("strength", (1e2, 1e4, 1e6)),
    "l2p": ("learning_rate", (3e-3, 1e-2, 3e-2)),
    "o-lora": ("strength", (0.05, 0.5, 5.0)),
    "progressive-prompts": ("learning_rate", (3e-3, 1e-2, 3e-2)),
    "joint": ("learning_rate", (2e-4, 5e-4, 2e-3)),
}
"""Method -> the setting that is tuned, and the values tried: the same number for every method."""


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--methods", default=",".join(GRID))
    parser.add_argument("--train", type=int, default=160, help="examples per task, validation rows included")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def validation_stream(args: argparse.Namespace) -> Stream:
    """The tasks with a quarter of their training rows in place of the test rows."""
    tasks = []
    for task in Stream.load(args.data, TASKS, limit=args.train, seed=args.seed):
        train, held = task.split(0.25, seed=args.seed + 1)  # not the rows kept for early stopping
        tasks.append(dataclasses.replace(task, examples=train, test=held))
    return Stream(tuple(tasks))


def measure(name: str, settings: Mapping[str, float], stream: Stream, setup: Setup) -> dict[str, float]:
    """Learn the stream and score it: mean accuracy over the tasks, that of each, seconds."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cell = dataclasses.replace(setup, settings=dict(settings), scratch=Path(folder) / "scratch")
        method = rival(name)(cell)
        if method.is_joint:
            method.learn_all(stream)
        else:
            for task in stream:
                method.learn(task)
        rows = stream.mixed_test(10_000, setup.seed)
        names = [name for name, _ in rows]
        answers = method.ask([e.prompt for _, e in rows], names if method.needs_task_id else None)
    right = {task: [] for task in stream.names}
    for answer, (task, example) in zip(answers, rows, strict=True):
        right[task].append(answer.text == example.target)
    scores = {task: sum(own) / len(own) for task, own in right.items()}
    return {"average": sum(scores.values()) / len(scores), **scores, "time_s": time.perf_counter() - begun}


def table(results: Mapping[str, Any]) -> list[str]:
    """Markdown of what was tried, the best value of each method in bold once all are measured."""
    budget = results["budget"]
    lines = [
        "<!-- written by benchmarks/tune_rivals.py -->",
        "",
        f"MiniLM, {', '.join(TASKS)} in this order, {budget['train']} examples each of which a quarter is "
        f"scored, at most {budget['epochs']} epochs, batch {budget['batch_size']}, {budget['max_tokens']} "
        f"tokens, seed {budget['seed']}. Mean accuracy after the last task, in points; no test row was read.",
        "",
        "| method | setting | tried: score |",
        "|---|---|---|",
    ]
    for name, (setting, values) in GRID.items():
        tried = results["methods"].get(name, {})
        known = {v: tried[f"{v:g}"]["average"] for v in values if f"{v:g}" in tried}
        best = max(known.values()) if len(known) == len(values) else None  # no verdict before all are in
        cells = [
            f"**{v:g}: {100 * score:.1f}**" if score == best else f"{v:g}: {100 * score:.1f}"
            for v, score in known.items()
        ]
        lines.append(f"| {name} | {setting} | {' · '.join(cells)} |")
    return lines


def fill(methods: Sequence[str], stream: Stream, setup: Setup, budget: Mapping[str, Any], file: Path) -> None:
    """Measure what the file lacks, and add it value by value."""
    for name in methods:
        setting, values = GRID[name]
        for value in values:
            if f"{value:g}" in read(file)["methods"].get(name, {}):
                continue
            found = measure(name, {setting: value}, stream, setup)
            print(
                f"{name} {setting} {value:g}: {100 * found['average']:.1f}, {found['time_s']:.0f} s",
                flush=True,
            )
            results = read(file)  # another process may have added to it meanwhile
            results["methods"].setdefault(name, {})[f"{value:g}"] = {"setting": setting, **found}
            results |= {"budget": dict(budget), "environment": environment()}
            file.write_text(json.dumps(results, indent=1) + "\n")


def read(file: Path) -> dict[str, Any]:
    """What has been measured so far."""
    return json.loads(file.read_text()) if file.exists() else {"methods": {}}


def main() -> None:
    """Measure what is missing, write files, print the table."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "tuning.json"
    names = ("train", "epochs", "batch_size", "max_tokens", "seed")
    budget = {name: getattr(args, name) for name in names}
    config = Config(
        backbone=BackboneConfig(max_tokens=args.max_tokens),
        learning=LearningConfig(
            num_epochs=args.epochs, batch_size=args.batch_size, is_truncating=True, has_progress=False
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            backbone=load_backbone("minilm", config.backbone),
            config=config,
            seed=args.seed,
            scratch=Path(folder),
            learned=Path(folder) / "learned",
            settings={},
        )
        fill(args.methods.split(","), validation_stream(args), setup, budget, file)
    lines = table(read(file))
    (args.out / "tuning.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
