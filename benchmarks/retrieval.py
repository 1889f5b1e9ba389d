"""Retrieval alone: does a text find its task, is it refused when it has none, and is the weight honest?

    python benchmarks/retrieval.py --data ../shared/data

Every task of the folder, 500 training rows each, single rows, no task-ID, MiniLM and SmolLM2. Nothing is
fine-tuned: keys are learned from the frozen backbone's queries, which is all that retrieval ever sees.
Writes ``<out>/retrieval.json``, ``<out>/retrieval.md`` and a plot of reliability and of abstention for each
backbone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slm import Config, ScalableLM, Stream
from slm.bench.calibration import plot_abstention, plot_reliability
from slm.bench.cosine_ablations import ablations
from slm.config import BackboneConfig, RetrievalConfig
from slm.evaluation.metrics import auroc
from slm.retrieval.keys import TaskKeys, cluster, learn_keys
from slm.retrieval.retriever import Retriever

CLASSIFICATIONS = (
    *("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb"),
    *("yelp", "amazon", "sst2", "dbpedia", "agnews", "multirc", "yahoo"),
)
"""The 15 tasks of the long stream, order 8."""
TWINS = ("mnli", "rte", "cb")
"""Three sets of one task, inference between two sentences, with shared labels."""
RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

Splits = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reading:
    """A backbone and how its query is read."""

    name: str
    backbone: str
    retrieval: RetrievalConfig


READINGS = (
    Reading("minilm", "minilm", RetrievalConfig()),
    Reading("minilm-means", "minilm", RetrievalConfig(pooling="mean")),
    Reading("smollm2", "smollm2", RetrievalConfig()),
    Reading("smollm2-means", "smollm2", RetrievalConfig(pooling="mean")),
)


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--readings", default=",".join(r.name for r in READINGS))
    parser.add_argument("--train", type=int, default=500, help="training rows per task")
    parser.add_argument("--test", type=int, default=200, help="test rows per task")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_queries(reading: Reading, stream: Stream) -> Splits:
    """Training and test queries of every task, from the frozen backbone."""
    config = Config(backbone=BackboneConfig(max_tokens=128), retrieval=reading.retrieval)
    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(Path(folder) / "store", reading.backbone, config)
        bar = tqdm(stream, desc=f"reading {reading.name}", unit="task")
        return {
            task.name: tuple(  # type: ignore[misc]
                model.queries([e.prompt for e in examples], is_truncating=True)
                for examples in (task.examples, task.test)
            )
            for task in bar
        }


def one_key(queries: Tensor, num_keys: int = 1) -> TaskKeys:
    """Gaussian keys of one task."""
    return learn_keys(queries, cluster(queries, num_keys, seed=0))


def retriever_of(keys: Sequence[TaskKeys], **settings: Any) -> Retriever:
    """A gaussian retriever over these tasks."""
    total = sum((k.scatter.double() for k in keys), torch.zeros(1, dtype=torch.float64))
    return Retriever(keys, total, RetrievalConfig(**settings))


def misrouting(splits: Splits, keys: Mapping[str, TaskKeys]) -> tuple[float, dict[str, dict[str, int]]]:
    """Mean over the tasks of the share of test rows nearest to another task's key; and where they went."""
    names = list(keys)
    retriever = retriever_of([keys[name] for name in names], is_abstaining=False)
    shares, confusions = [], {}
    for number, name in enumerate(names):
        found = retriever(splits[name][1])
        routed = found.owners[found.nearest].tolist()
        shares.append(sum(r != number for r in routed) / len(routed))
        elsewhere = [names[r] for r in routed if r != number]
        if elsewhere:
            confusions[name] = {other: elsewhere.count(other) for other in sorted(set(elsewhere))}
    return statistics.mean(shares), confusions


def routing(splits: Splits) -> dict[str, Any]:
    """Misrouting of the gaussian form over three sets of tasks, with few examples, and with several keys."""
    sets = {
        "15": [n for n in splits if n in CLASSIFICATIONS],
        "22": list(splits),
        "20": [n for n in splits if n not in ("rte", "cb")],
    }
    keys = {name: one_key(train) for name, (train, _) in splits.items()}
    few = {name: one_key(train[:16]) for name, (train, _) in splits.items()}
    four = {name: one_key(train, 4) for name, (train, _) in splits.items()}
    found: dict[str, Any] = {"channels": keys[sets["22"][0]].num_channels}
    for title, names in sets.items():
        found[title], confusions = misrouting(splits, {n: keys[n] for n in names})
        if title == "22":
            found["confusions"] = confusions
    found["22, 16 examples"] = misrouting(splits, few)[0]
    found["22, 4 keys per task"] = misrouting(splits, four)[0]
    return found


def thirds(names: Sequence[str], seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """Tasks in the store and tasks left out, three times, every task left out once."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    for i in range(3):
        out = shuffled[i::3]
        yield [n for n in names if n not in out], out


def abstention(splits: Splits, seed: int) -> dict[str, Any]:
    """AUROC of the relative distance, a third of the tasks left out in turn; refusals at stated rates."""
    keys = {name: one_key(train) for name, (train, _) in splits.items()}
    areas: dict[str, float] = {}
    errors: dict[float, list[tuple[float, float]]] = {rate: [] for rate in RATES}
    for inside, outside in thirds(list(splits), seed):
        retriever = retriever_of([keys[n] for n in inside])
        nearest = {n: retriever(splits[n][1]).distances[:, 0].tolist() for n in splits}
        own = [d for n in inside for d in nearest[n]]
        areas.update({n: auroc(nearest[n], own) for n in outside})
        for rate in RATES:
            at_rate = retriever_of([keys[n] for n in inside], false_refusal_rate=rate)
            refused = {n: float(at_rate(splits[n][1]).is_abstained.double().mean()) for n in splits}
            strangers = [1 - refused[n] for n in outside if n not in TWINS]
            errors[rate].append((statistics.mean(refused[n] for n in inside), statistics.mean(strangers)))
    refusals = {}
    for size in (2, 5, 10, len(splits)):
        for rate in (0.01, 0.001):
            shares = []
            for draw in range(1 if size == len(splits) else 5):
                names = random.Random(seed + draw).sample(sorted(splits), size)
                retriever = retriever_of([keys[n] for n in names], false_refusal_rate=rate)
                shares += [float(retriever(splits[n][1]).is_abstained.double().mean()) for n in names]
            refusals[f"{size} tasks at {rate:g}"] = {
                "mean": statistics.mean(shares),
                "median": statistics.median(shares),
            }
    apart = {n: a for n, a in areas.items() if n not in TWINS}
    return {
        "auroc": areas,
        "mean without twins": statistics.mean(apart.values()),
        "worst without twins": min(apart.items(), key=lambda item: item[1]),
        "rates": RATES,
        "false refusals": [statistics.mean(f for f, _ in errors[rate]) for rate in RATES],
        "strangers let in": [statistics.mean(s for _, s in errors[rate]) for rate in RATES],
        "refusals by size": refusals,
    }


def reliability(splits: Splits, file: Path) -> float:
    """Expected calibration error of a row's largest probability over all tasks, drawn as well."""
    keys = [one_key(train) for train, _ in splits.values()]
    retriever = retriever_of(keys, is_abstaining=False)
    confidences: list[float] = []
    is_right: list[bool] = []
    for number, (_, test) in enumerate(splits.values()):
        found = retriever(test)
        confidences += found.posterior.max(1).values.clamp(max=1.0).tolist()
        is_right += (found.owners[found.nearest] == number).tolist()
    return plot_reliability(confidences, is_right, file)


def tables(results: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    """Markdown of everything measured."""
    names = list(results)
    lines = [
        "<!-- written by benchmarks/retrieval.py -->",
        "",
        f"{args.train} training rows and up to {args.test} test rows a task, 128 tokens, single rows, no "
        "task-ID, nothing fine-tuned. `-means` reads mean hidden states alone.",
        "",
        "Misrouted test rows, mean over the tasks, gaussian form (20: without rte and cb, twins of mnli).",
        "",
        "| reading | channels | 15 tasks | 22 tasks | 20 tasks | 22, 16 examples | 22, 4 keys per task |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    columns = ("15", "22", "20", "22, 16 examples", "22, 4 keys per task")
    for name in names:
        found = results[name]["routing"]
        cells = " | ".join(f"{100 * found[c]:.2f}%" for c in columns)
        lines.append(f"| {name} | {found['channels']} | {cells} |")
    lines += [
        "",
        "Abstention, a third of the tasks left out in turn: AUROC of the relative distance, and at stated "
        "rates the rows refused by their own store (two numbers: mean and median task).",
        "",
    ]
    sizes = list(results[names[0]]["abstention"]["refusals by size"])
    lines += [
        "| reading | AUROC without twins | worst | twins | " + " | ".join(sizes) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(sizes),
    ]
    for name in names:
        found = results[name]["abstention"]
        worst, area = found["worst without twins"]
        twins = ", ".join(f"{t} {found['auroc'][t]:.2f}" for t in TWINS if t in found["auroc"])
        by_size = found["refusals by size"]
        cells = " | ".join(
            f"{100 * by_size[s]['mean']:.2f}% / {100 * by_size[s]['median']:.2f}%" for s in sizes
        )
        lines.append(
            f"| {name} | {found['mean without twins']:.3f} | {worst} {area:.2f} | {twins} | {cells} |"
        )
    lines += ["", "Strangers let in (tasks left out that have no twin) at a stated rate of own rows refused."]
    lines += ["", "| reading | " + " | ".join(f"{100 * r:g}%" for r in RATES) + " |"]
    lines += ["|---|" + "---:|" * len(RATES)]
    for name in names:
        cells = " | ".join(f"{100 * s:.1f}%" for s in results[name]["abstention"]["strangers let in"])
        lines.append(f"| {name} | {cells} |")
    lines += ["", "Expected calibration error of a row's largest probability: "]
    lines[-1] += ", ".join(f"{n} {results[n]['calibration error']:.4f}" for n in names) + "."
    for name in names:
        if "cosine" in results[name]:
            lines += ["", f"The paper's form and plain baselines, 15 tasks, {name}.", ""]
            lines += ["| keys | misrouted | own rows refused |", "|---|---:|---:|"]
            for row in results[name]["cosine"]:
                refused = row["false_refusals"]
                own = "-" if refused is None else f"{100 * refused:.2f}%"
                lines.append(f"| {row['name']} | {100 * row['misrouting']:.1f}% | {own} |")
    lines += ["", "Where the misrouted of 22 tasks went:", ""]
    for name in names:
        pairs = [
            (count, f"{task} → {other} {count}")
            for task, others in results[name]["routing"]["confusions"].items()
            for other, count in others.items()
        ]
        best = ", ".join(text for _, text in sorted(pairs, key=lambda p: -p[0])[:8])
        lines.append(f"* {name}: {best}")
    return lines


def main() -> None:
    """Measure every reading, print the tables, write the files."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    names = sorted(p.parent.name for p in args.data.glob("*/train.jsonl"))
    stream = Stream.load(args.data, names, limit=args.train, test_limit=args.test, seed=args.seed)
    results: dict[str, Any] = {}
    for reading in READINGS:
        if reading.name not in args.readings.split(","):
            continue
        begun = time.perf_counter()
        splits = read_queries(reading, stream)
        results[reading.name] = {
            "routing": routing(splits),
            "abstention": abstention(splits, args.seed),
            "calibration error": reliability(splits, args.out / f"reliability_{reading.name}.png"),
        }
        if "means" not in reading.name:
            long = {n: split for n, split in splits.items() if n in CLASSIFICATIONS}
            rows = ablations(long, top_k=4 if reading.backbone == "minilm" else 2)
            results[reading.name]["cosine"] = [vars_of(row) for row in rows]
        found = results[reading.name]["abstention"]
        plot_abstention(
            RATES,
            found["false refusals"],
            found["strangers let in"],
            args.out / f"abstention_{reading.name}.png",
            is_rate=True,
        )
        print(f"{reading.name}: {time.perf_counter() - begun:.0f} s", flush=True)
        (args.out / "retrieval.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "retrieval.md").write_text("\n".join(tables(results, args)) + "\n")
    print("\n".join(tables(results, args)))


def vars_of(row: Any) -> dict[str, Any]:
    """The fields of a slotted dataclass."""
    return {name: getattr(row, name) for name in row.__slots__}


if __name__ == "__main__":
    main()
