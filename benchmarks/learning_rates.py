"""Learning rate and batch size of increments: each task learned alone, scored on held-out training rows.

    python benchmarks/learning_rates.py --data ../shared/data

MiniLM learns classifications from few and from more examples, SmolLM2 classifications, with the library's
other defaults. A task is asked alone, so routing plays no part, and no test row is read. Writes
``<out>/learning_rates.json`` and ``<out>/learning_rates.md``; what stands there is kept, and a run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_stream import environment

from slm import Config, ScalableLM, Stream
from slm.config import BackboneConfig, LearningConfig
from slm.evaluation.scorers import scorer_for
from slm.tasks import Task

RATES = (5e-4, 1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Part:
    """One share of the benchmark: a backbone, how many examples it learns of which tasks, and how."""

    backbone: str
    num_examples: int
    num_epochs: int
    batch_size: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> tuple[str, ...]:
        """What sets it apart, as keys of the results."""
        return (
            self.backbone,
            f"{self.num_examples} examples",
            f"{self.num_epochs} epochs, batch {self.batch_size}",
        )


TOPICS = ("agnews", "yahoo", "yelp", "sst2", "fin_sentiment")
PARTS = (
    Part("minilm", 48, 5, 16, TOPICS),
    Part("minilm", 48, 5, 4, TOPICS),
    Part("minilm", 200, 5, 16, TOPICS),
    Part("minilm", 200, 5, 4, TOPICS),
    Part("smollm2", 48, 3, 16, ("agnews", "fin_sentiment")),
    Part("smollm2", 48, 3, 4, ("agnews", "fin_sentiment")),
)
SCALES = {"minilm": (96, 300), "smollm2": (128, 60)}
"""Backbone -> most tokens of a row, rows held out of each task."""


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--backbones", default=",".join(SCALES))
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def held_out(task: Task, num_rows: int, seed: int) -> Task:
    """The task with rows of its training split in place of its test rows."""
    share = num_rows / len(task.examples)
    train, held = task.split(share, seed + 1, num_rows)  # not the rows kept for early stopping
    return dataclasses.replace(task, examples=train, test=held)


def measure(model: ScalableLM, task: Task, **settings: Any) -> dict[str, float | None]:
    """Learn the task, ask it alone, forget it: score, epochs, seconds of learning."""
    report = model.learn(task, **settings)
    alone = model.restricted([task.name], is_abstaining=False)
    prompts = [example.prompt for example in task.test]
    answers = alone.ask(prompts, max_new_tokens=8, is_truncating=True)
    score = scorer_for(task)([a.text for a in answers], [e.target or "" for e in task.test])
    model.forget(task.name)
    return {
        "score": score,
        "validation": report.validation_score,
        "num_epochs": report.num_epochs,
        "time_s": report.time_s,
    }


def read(file: Path) -> dict[str, Any]:
    """What has been measured so far: backbone -> examples -> steps -> task -> rate -> what came out."""
    return json.loads(file.read_text()) if file.exists() else {"parts": {}}


def fill(part: Part, rates: Sequence[float], args: argparse.Namespace, file: Path) -> None:
    """Measure what the file lacks of one part, and add it rate by rate."""
    max_tokens, num_held = SCALES[part.backbone]
    settings = BackboneConfig(max_tokens=max_tokens)
    learning = LearningConfig(
        num_epochs=part.num_epochs,
        batch_size=part.batch_size,
        is_truncating=True,
        has_progress=False,
        seed=args.seed,
    )
    stream = Stream.load(args.data, part.tasks, limit=part.num_examples + num_held, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(
            Path(folder) / "store", part.backbone, Config(backbone=settings, learning=learning)
        )
        for task in (held_out(task, num_held, args.seed) for task in stream):
            for rate in rates:
                place = (*part.name, task.name, f"{rate:g}")
                if find(read(file)["parts"], place):
                    continue
                found = measure(model, task, learning_rate=rate)
                print(*place, f"{100 * found['score']:.1f}, {found['time_s']:.0f} s", flush=True)
                results = read(file)  # another process may have added to it meanwhile
                add(results["parts"], place, found)
                file.write_text(json.dumps(results | {"environment": environment()}, indent=1) + "\n")


def find(tree: Mapping[str, Any], place: Sequence[str]) -> Mapping[str, Any]:
    """The branch of a tree at a place; empty where there is none."""
    for name in place:
        tree = tree.get(name, {})
    return tree


def add(tree: dict[str, Any], place: Sequence[str], leaf: Mapping[str, Any]) -> None:
    """Set a leaf of a tree."""
    for name in place[:-1]:
        tree = tree.setdefault(name, {})
    tree[place[-1]] = leaf


def table(results: Mapping[str, Any], rates: Sequence[float]) -> list[str]:
    """Markdown: of every part a row with the mean over its tasks at each rate, then a row per task."""
    heads = [f"{rate:g}" for rate in rates]
    lines = [
        "<!-- written by benchmarks/learning_rates.py -->",
        "",
        "Accuracy on held-out training rows of tasks that are learned alone and asked alone, in points. "
        + " ".join(
            f"{name}: {most} tokens, {rows} rows held out of each task."
            for name, (most, rows) in SCALES.items()
        ),
        "",
        f"| backbone | learned from | at most | task | {' | '.join(heads)} |",
        f"|---|---|---|---|{'---:|' * len(heads)}",
    ]
    for part in PARTS:
        of_task = find(results["parts"], part.name)
        rows = {name: [find(of_task, (name, head)).get("score") for head in heads] for name in part.tasks}
        means = [mean(column) for column in zip(*rows.values(), strict=True)]
        for name, scores in {"**mean**": means, **rows}.items():
            shown = ("–" if score is None else f"{100 * score:.1f}" for score in scores)
            lines.append(f"| {' | '.join([*part.name, name, *shown])} |")
    return lines


def mean(scores: Sequence[float | None]) -> float | None:
    """Their mean, where none is missing."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(scores) if len(known) == len(scores) else None


def main() -> None:
    """Measure what is missing, write files, print the table."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "learning_rates.json"
    rates = tuple(float(rate) for rate in args.rates.split(","))
    wanted = args.backbones.split(",")
    for part in PARTS:
        if part.backbone in wanted:
            fill(part, rates, args, file)
    lines = table(read(file), RATES)
    (args.out / "learning_rates.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
