"""What storing increments in float16 costs: the same tasks learned once, answered unrounded and rounded.

    python benchmarks/increment_rounding.py --data ../shared/data

MiniLM learns four classifications, SmolLM2 a classification, a multiple choice and free answers. Each store
is kept twice, with the increments as they were trained and with those that slm stores, and both answer the
same test rows in float32. Writes ``<out>/increment_rounding.json`` and ``<out>/increment_rounding.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from core_stream import environment

from slm import Config, ScalableLM, Stream
from slm.config import BackboneConfig, LearningConfig
from slm.evaluation.scorers import scorer_for
from slm.increments.increment import Increment
from slm.store import TaskKnowledge

TASKS = {
    "minilm": ("agnews", "imdb", "boolq", "qqp"),
    "smollm2": ("fin_sentiment", "mmlu_history", "medquad"),
}


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--backbones", default=",".join(TASKS))
    parser.add_argument("--train", type=int, default=200, help="examples per task")
    parser.add_argument("--test", type=int, default=100, help="test rows per task")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def round_increments(source: ScalableLM, target: ScalableLM) -> None:
    """Commit what ``source`` has learned to ``target``, with its increments in float16."""
    for record in source.tasks:
        increments = (source.store.increment(record, index) for index in range(record.num_increments))
        knowledge = TaskKnowledge(
            source.store.keys(record),
            tuple(increment.in_float16() for increment in increments),
            source.store.head(record),
        )
        name, kind, labels = record.name, record.kind, record.labels
        target.store.commit(name, kind, labels, record.num_examples, knowledge, record.metadata)


def measure(source: str, stream: Stream, seed: int, root: Path) -> dict[str, Any]:
    """Scores of each task from both stores, and how many answers differ."""
    config = Config(
        backbone=BackboneConfig(max_tokens=96, dtype="float32"),
        learning=LearningConfig(num_epochs=2, batch_size=16, is_truncating=True),
    )
    models = {name: ScalableLM.create(root / name, source, config) for name in ("unrounded", "float16")}
    with mock.patch.object(Increment, "in_float16", lambda self: self):
        for task in stream:
            models["unrounded"].learn(task, seed=seed)
    round_increments(models["unrounded"], models["float16"])
    scores: dict[str, dict[str, float]] = {task.name: {} for task in stream}
    texts: dict[str, list[str]] = {}
    for name, model in models.items():
        texts[name] = []
        for task in stream:
            prompts = [example.prompt for example in task.test]
            answers = [answer.text for answer in model.ask(prompts, max_new_tokens=32, is_truncating=True)]
            scores[task.name][name] = scorer_for(task)(
                answers, [example.target or "" for example in task.test]
            )
            texts[name] += answers
    return {
        "scores": scores,
        "num_changed": sum(one != other for one, other in zip(*texts.values(), strict=True)),
        "num_rows": len(texts["float16"]),
    }


def render(found: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "<!-- written by benchmarks/increment_rounding.py -->",
        "",
        f"{found['train']} examples a task, answered in float32; scores in points of 100. "
        f"Commit {found['environment']['commit']}.",
        "",
        "| backbone | task | unrounded | float16 |",
        "|---|---|---:|---:|",
    ]
    for source, own in found["backbones"].items():
        for task, both in own["scores"].items():
            lines.append(
                f"| {source} | {task} | {100 * both['unrounded']:.1f} | {100 * both['float16']:.1f} |"
            )
    lines.append("")
    for source, own in found["backbones"].items():
        lines.append(f"{source}: {own['num_changed']} of {own['num_rows']} answers differ in any character.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure and write both files."""
    args = arguments()
    found: dict[str, Any] = {"train": args.train, "environment": environment(), "backbones": {}}
    for source in args.backbones.split(","):
        stream = Stream.load(args.data, TASKS[source], limit=args.train, test_limit=args.test, seed=args.seed)
        with tempfile.TemporaryDirectory() as folder:
            found["backbones"][source] = measure(source, stream, args.seed, Path(folder))
        print(render(found), flush=True)
    (args.out / "increment_rounding.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "increment_rounding.md").write_text(render(found))


if __name__ == "__main__":
    main()
