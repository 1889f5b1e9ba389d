"""The core claim: a stream of real tasks, no task-ID, hardly any forgetting.

    python benchmarks/core_stream.py --data ../shared/data

Act one: MiniLM learns five classifications in three orders, 1,000 examples each, and sequential fine-tuning
beside it learns the same rows. Act two: SmolLM2 learns a classification, a multiple choice and free answers,
600 examples each, is compared with the frozen model, and every answer is followed to its last token.
Writes ``<out>/core_stream.json``, ``<out>/core_stream.md`` and ``<out>/core_stream.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import slm
from slm import Answer, Config, ScalableLM, Stream
from slm.bench.baselines.sequential import SequentialFineTuning
from slm.bench.report import Panel, plot_matrices
from slm.bench.rival import Setup
from slm.bench.run import run_stream
from slm.config import BackboneConfig, LearningConfig
from slm.evaluation.metrics import average, backward_transfer, forgetting
from slm.evaluation.scorers import scorer_for
from slm.store import TaskKnowledge

ORDERS = (
    ("agnews", "imdb", "boolq", "dbpedia", "qqp"),
    ("qqp", "dbpedia", "boolq", "imdb", "agnews"),
    ("boolq", "agnews", "qqp", "imdb", "dbpedia"),
)
CAUSAL_TASKS = ("fin_sentiment", "mmlu_history", "medquad")


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--acts", default="encoder,causal", help="which acts to run")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000, help="training examples per task (encoder)")
    parser.add_argument("--test", type=int, default=100, help="test rows per task (encoder)")
    parser.add_argument("--causal-train", type=int, default=600)
    parser.add_argument("--causal-test", type=int, default=150)
    parser.add_argument("--causal-epochs", type=int, default=2)
    parser.add_argument("--relearn", action="store_true", help="learn every task again in every order")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def settings(max_tokens: int, num_epochs: int, batch_size: int = 16) -> Config:
    """Settings that differ from the defaults: window, epochs and batch fit two cores."""
    return Config(
        backbone=BackboneConfig(max_tokens=max_tokens),
        learning=LearningConfig(num_epochs=num_epochs, batch_size=batch_size, is_truncating=True),
    )


def arrive_in_order(source: ScalableLM, target: ScalableLM, names: Sequence[str]) -> None:
    """Commit what ``source`` has learned to ``target`` in another order.

    Learning looks at nothing but the task itself, so learning again would give the same bytes
    (``tests/test_model.py``); ``--relearn`` does it all the same.
    """
    for name in names:
        record = source.store.task(name)
        knowledge = TaskKnowledge(
            source.store.keys(record),
            tuple(source.store.increment(record, i) for i in range(record.num_increments)),
            source.store.head(record),
        )
        target.store.commit(name, record.kind, record.labels, record.num_examples, knowledge, record.metadata)


def encoder_act(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """MiniLM in several orders, and sequential fine-tuning beside it."""
    stream = Stream.load(args.data, ORDERS[0], limit=args.train, test_limit=args.test, seed=args.seed)
    config = settings(max_tokens=96, num_epochs=3)
    results = []
    first: ScalableLM | None = None
    for number, order in enumerate(ORDERS[: args.orders], start=1):
        ordered = stream.order(order)
        with timed(f"order {number}, slm") as spent:
            model = ScalableLM.create(root / str(number), "minilm", config)
            if first is None or args.relearn:
                reports = [model.learn(task, seed=args.seed).as_dict() for task in ordered]
                first = first or model
            else:
                arrive_in_order(first, model, ordered.names)
                reports = []
            learned_s = spent()
            ours = model.evaluate(ordered, seed=args.seed, is_truncating=True).as_dict()
            # The same store made to answer every row: what routing alone costs, without refusals.
            eager = model.restricted(ordered.names, is_abstaining=False)
            answering = eager.evaluate(ordered, seed=args.seed, is_truncating=True).as_dict()
        with timed(f"order {number}, sequential fine-tuning") as spent:
            rival = SequentialFineTuning(sequential_setup(model, args.seed, root))
            theirs = run_stream(rival, ordered, limit=args.test, seed=args.seed)
            rival_s = spent()
        results.append(
            {
                "order": order,
                "slm": {**ours, "learning_s": learned_s, "reports": reports},
                "slm_never_abstaining": answering,
                "sequential": {
                    "scores": theirs,
                    "average": average(theirs),
                    "forgetting": forgetting(theirs),
                    "backward_transfer": backward_transfer(theirs),
                    "total_s": rival_s,
                },
            }
        )
    return {"orders": results, "train": args.train, "test": args.test}


def sequential_setup(model: ScalableLM, seed: int, root: Path) -> Setup:
    """What sequential fine-tuning is given: the same rows, two epochs of all of them."""
    config = model.config
    learning = dataclasses.replace(config.learning, num_epochs=2, validation_share=0.0)
    return Setup(
        backbone=model.backbone,
        config=dataclasses.replace(config, learning=learning),
        seed=seed,
        scratch=root,
        learned=root,
        settings={},
    )


def causal_act(args: argparse.Namespace) -> dict[str, Any]:
    """SmolLM2: before and after each task, every answer compared with the one before."""
    stream = Stream.load(
        args.data, CAUSAL_TASKS, limit=args.causal_train, test_limit=args.causal_test, seed=args.seed
    )
    rows = stream.mixed_test(args.causal_test, args.seed)
    names = [name for name, _ in rows]

    def ask(model: ScalableLM) -> list[Answer]:
        # One fixed list in fixed batches: whatever changes then is knowledge, not arithmetic.
        return model.ask([e.prompt for _, e in rows], max_new_tokens=64, batch_size=12, is_truncating=True)

    def score(answers: Sequence[Answer]) -> dict[str, float]:
        return {
            task.name: scorer_for(task)(
                [a.text for a, name in zip(answers, names, strict=True) if name == task.name],
                [e.target or "" for name, e in rows if name == task.name],
            )
            for task in stream
        }

    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(
            Path(folder) / "store", "smollm2", settings(192, args.causal_epochs, batch_size=8)
        )
        with timed("SmolLM2, frozen"):
            before = frozen = ask(model)
            candidates = frozen_choices(model, stream, rows)
        stages, reports = [], []
        for task in stream:
            with timed(f"SmolLM2, {task.name}"):
                reports.append(model.learn(task, seed=args.seed).as_dict())
                after = ask(model)
            same_route = [
                [n for n, _ in a.tasks] == [n for n, _ in b.tasks] and bool(a.tasks)
                for a, b in zip(before, after, strict=True)
            ]
            unchanged = [a.text == b.text for a, b, s in zip(before, after, same_route, strict=True) if s]
            stages.append(
                {
                    "learned": task.name,
                    "scores": score(after),
                    "rows_with_route_unchanged": len(unchanged),
                    "of_these_answer_unchanged": sum(unchanged),
                    "refused": sum(a.is_abstained for a in after),
                }
            )
            before = after
        known = [a.tasks[0][0] if a.tasks else None for a in before]
    return {
        "num_epochs": args.causal_epochs,
        "train": {task.name: len(task.examples) for task in stream},
        "test": {task.name: len(task.test) for task in stream},
        "metrics": {task.name: scorer_for(task).name for task in stream},
        "frozen_generation": score(frozen),
        "frozen_best": {**score(frozen), **candidates},
        "stages": stages,
        "misrouting": sum(k not in (None, n) for k, n in zip(known, names, strict=True)) / len(names),
        "false_refusals": sum(k is None for k in known) / len(names),
        "reports": reports,
    }


def frozen_choices(model: ScalableLM, stream: Stream, rows: Sequence[Any]) -> dict[str, float]:
    """The frozen model at its best where the answer is one of a few: the candidates' texts are scored."""
    from slm.backbone.decode import prefill, score_labels

    best = {}
    for name in ("fin_sentiment", "mmlu_history"):
        task = stream[name]
        labels = sorted({e.target or "" for e in task.examples})
        own = [e for n, e in rows if n == name]
        right = 0
        for start in range(0, len(own), 12):
            chunk = own[start : start + 12]
            batch = model.backbone.batch(
                [model.backbone.row(e.prompt, is_truncating=True, where="row") for e in chunk]
            )
            begun = prefill(model.backbone, batch)
            scores = score_labels(model.backbone, begun, range(len(chunk)), [labels] * len(chunk))
            right += sum(labels[int(s.argmax())] == e.target for s, e in zip(scores, chunk, strict=True))
        best[name] = right / len(own)
    return best


@contextmanager
def timed(title: str) -> Iterator[Callable[[], float]]:
    """Say what runs and how long it took."""
    begun = time.perf_counter()
    print(f"{title} ...", flush=True)
    yield lambda: time.perf_counter() - begun
    print(f"{title}: {time.perf_counter() - begun:.0f} s", flush=True)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "slm": slm.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "num_processes": 1,
    }


def encoder_table(act: dict[str, Any]) -> list[str]:
    """Markdown of the first act."""
    lines = [
        f"MiniLM, five tasks, {act['train']} training examples and {act['test']} test rows each, "
        "asked row by row in shuffled mixed batches, no task-ID. Points of accuracy.",
        "",
        "| order | method | average | forgetting | oracle gap | misrouting | false refusals |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in act["orders"]:
        order = " → ".join(result["order"])
        for method, key in (("slm", "slm"), ("slm, never abstaining", "slm_never_abstaining")):
            if key in result:
                ours = result[key]
                lines.append(
                    f"| {order} | {method} | {100 * ours['average']:.1f} | {100 * ours['forgetting']:.2f} | "
                    f"{100 * ours['oracle_gap']:.2f} | {100 * ours['misrouting']:.2f}% | "
                    f"{100 * ours['false_refusal_rate']:.2f}% |"
                )
        theirs = result["sequential"]
        lines.append(
            f"| {order} | sequential fine-tuning | {100 * theirs['average']:.1f} | "
            f"{100 * theirs['forgetting']:.2f} | - | - | - |"
        )
    first = act["orders"][0]["slm"]
    lines += ["", "Per task after the last one (first order): "]
    lines[-1] += ", ".join(
        f"{name} {100 * score:.1f} (oracle {100 * oracle:.1f})"
        for name, score, oracle in zip(first["tasks"], first["scores"][-1], first["oracle"], strict=True)
    )
    return lines


def causal_table(act: dict[str, Any]) -> list[str]:
    """Markdown of the second act."""
    lines = [
        f"SmolLM2, three tasks, training examples {act['train']}, test rows {act['test']}, one "
        "shuffled list, no task-ID. `frozen` is the better of free generation and scoring the answer texts.",
        "",
        "| task | metric | frozen | " + " | ".join(f"after {s['learned']}" for s in act["stages"]) + " |",
        "|---|---|---:|" + "---:|" * len(act["stages"]),
    ]
    for name, metric in act["metrics"].items():
        best = max(act["frozen_best"][name], act["frozen_generation"][name])
        scores = " | ".join(f"{100 * stage['scores'][name]:.1f}" for stage in act["stages"])
        lines.append(f"| {name} | {metric} | {100 * best:.1f} | {scores} |")
    lines += [
        "",
        f"Misrouting {100 * act['misrouting']:.2f}%, false refusals {100 * act['false_refusals']:.2f}%.",
    ]
    for stage in act["stages"][1:]:
        lines.append(
            f"After {stage['learned']}: of {stage['rows_with_route_unchanged']} rows whose route is "
            f"unchanged, {stage['of_these_answer_unchanged']} gave the same answer to the last token."
        )
    return lines


def main() -> None:
    """Run the acts, print the tables, write the files."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "core_stream.json"
    results: dict[str, Any] = {}
    acts = args.acts.split(",")
    if "encoder" in acts:
        with tempfile.TemporaryDirectory() as folder:
            act = encoder_act(args, Path(folder))
        results["encoder"] = {**act, "environment": environment(), "seed": args.seed}
    if "causal" in acts:
        results["causal"] = {**causal_act(args), "environment": environment(), "seed": args.seed}
    if file.exists():  # acts may be run apart
        results = {**json.loads(file.read_text()), **results}
    file.write_text(json.dumps(results, indent=1) + "\n")
    lines = ["<!-- written by benchmarks/core_stream.py -->", ""]
    if "encoder" in results:
        lines += encoder_table(results["encoder"])
        panels = []
        for result in results["encoder"]["orders"][:1]:
            panels = [
                Panel("slm", result["order"], result["slm"]["scores"]),
                Panel("sequential fine-tuning", result["order"], result["sequential"]["scores"]),
            ]
        plot_matrices(panels, args.out / "core_stream.png")
    if "causal" in results:
        lines += ["", *causal_table(results["causal"])]
    (args.out / "core_stream.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
