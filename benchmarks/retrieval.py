"""Retrieval alone: does a text find its task, is it refused when it has none, and is the weight honest?

    python benchmarks/retrieval.py --data ../shared/data

Every task of the folder, 500 training rows each, single rows, no task-ID, MiniLM and SmolLM2. For the first
part nothing is fine-tuned: keys are learned from the frozen backbone's queries, which is all that retrieval
ever sees. The second part (``retrieval_learned.py``) teaches MiniLM the tasks, to see what a confusion costs
and what mixing gives; the third is what reading the query costs, the
fourth whether a row is decided otherwise in company than alone. What searching many keys and adding tasks
cost is measured by ``retrieval_cost.py``, which wants a quiet machine.
Writes ``<out>/retrieval.json``, ``<out>/retrieval.md`` and a plot of reliability and of abstention for each
backbone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retrieval_learned import OVERLAPPING, confusion_costs, overlap
from retrieval_reading import reading_cost
from retrieval_rounding import rounding
from retrieval_routing import (
    CLASSIFICATIONS,
    RATES,
    Splits,
    abstention,
    all_rows_routing,
    alternatives,
    keys_of,
    reliability,
    routing,
)
from retrieval_tables import tables
from retrieval_versions import versions
from torch import Tensor
from tqdm import tqdm

from slm import Config, ScalableLM, Stream
from slm.bench.calibration import plot_abstention
from slm.bench.cosine_ablations import ablations
from slm.config import BackboneConfig, RetrievalConfig
from slm.retrieval.background import Background, background_texts, learn_background
from slm.retrieval.features import query_parts, settle_reading
from slm.retrieval.keys import TaskKeys
from slm.retrieval.retriever import STRETCHES


@dataclass(frozen=True)
class Reading:
    """A backbone and how its query is read.

    Attributes:
        name: what the tables call it.
        backbone: its alias.
        retrieval: settings of the reading.
        is_whole: whether everything is measured with it, or routing and abstention alone.
    """

    name: str
    backbone: str
    retrieval: RetrievalConfig
    is_whole: bool = False


READINGS = (
    Reading("minilm", "minilm", RetrievalConfig(), is_whole=True),
    Reading("minilm-ends", "minilm", RetrievalConfig(pooling="ends")),
    Reading("minilm-means", "minilm", RetrievalConfig(pooling="mean")),
    Reading("minilm-all-layers", "minilm", RetrievalConfig(pooling="mean", layers=(1, 2, 3, 4, 5, 6))),
    Reading("smollm2", "smollm2", RetrievalConfig(), is_whole=True),
    Reading("smollm2-split-ends", "smollm2", RetrievalConfig(pooling="split-ends")),
    Reading("smollm2-means", "smollm2", RetrievalConfig(pooling="mean", layers=(2, 6))),
    Reading("smollm2-more-layers", "smollm2", RetrievalConfig(pooling="mean", layers=(0, 2, 4, 6))),
)


DEPTHS = {"minilm": 6, "smollm2": 30}
"""Layers of the backbones."""


def arguments() -> argparse.Namespace:
    """The command line; the defaults are what the documents cite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>/{train,test}.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--parts", default="routing,all-rows,abstention,costs,overlap,versions,reading,rounding"
    )
    parser.add_argument("--readings", default=",".join(r.name for r in READINGS))
    parser.add_argument("--train", type=int, default=500, help="training rows per task")
    parser.add_argument("--test", type=int, default=200, help="test rows per task")
    parser.add_argument("--learned-test", type=int, default=100, help="test rows per task of part two")
    parser.add_argument("--keep", action="store_true", help="measure only what the files do not hold yet")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_queries(readings: Sequence[Reading], stream: Stream) -> dict[str, tuple[Splits, Background]]:
    """Queries of every task and the background, for several readings of one backbone, from one pass."""
    backbone = readings[0].backbone
    config = Config(backbone=BackboneConfig(max_tokens=128), retrieval=readings[0].retrieval)
    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(Path(folder) / "store", backbone, config)
        own = {r.name: query_parts(r.retrieval, model.backbone.num_layers) for r in readings}
        read = model.extractor.parts = tuple(sorted({part for parts in own.values() for part in parts}))
        width = model.backbone.num_channels
        places = {
            name: torch.cat([torch.arange(width) + width * read.index(part) for part in parts])
            for name, parts in own.items()
        }
        found: dict[str, dict[str, Any]] = {reading.name: {} for reading in readings}
        for task in tqdm(stream, desc=f"reading {backbone}", unit="task"):
            both = [
                model.queries([e.prompt for e in rows], is_truncating=True)
                for rows in (task.examples, task.test)
            ]
            for name, columns in places.items():
                found[name][task.name] = tuple(queries[:, columns] for queries in both)
        texts = background_texts()
        queries = model.queries(texts, is_truncating=True)
        return {name: (splits, learn_background(queries[:, places[name]])) for name, splits in found.items()}


def all_queries(wanted: Sequence[Reading], stream: Stream) -> Iterator[tuple[Reading, Splits, Background]]:
    """Every reading with its queries and background, one backbone after the other."""
    for backbone in dict.fromkeys(reading.backbone for reading in wanted):
        own = [reading for reading in wanted if reading.backbone == backbone]
        found = read_queries(own, stream)
        for reading in own:
            yield reading, *found[reading.name]


def measure_routing(
    reading: Reading, splits: Splits, stream: Stream, args: argparse.Namespace
) -> dict[str, Any]:
    """Where rows go, read one way, with this router and others, and whether weights are honest."""
    keys = {name: keys_of(train) for name, (train, _) in splits.items()}
    found: dict[str, Any] = {"routing": routing(splits, keys)}
    if not reading.is_whole:
        return found
    labels = {task.name: [e.target or "" for e in task.examples] for task in stream}
    found["alternatives"] = alternatives(splits, labels)
    found["calibration error"] = reliability(splits, keys, args.out / f"reliability_{reading.name}.png")
    long = {n: split for n, split in splits.items() if n in CLASSIFICATIONS}
    found["cosine"] = [
        dataclasses.asdict(row) for row in ablations(long, top_k=4 if reading.backbone == "minilm" else 2)
    ]
    return found


def measure_abstention(
    reading: Reading, splits: Splits, background: Background, args: argparse.Namespace
) -> dict[str, Any]:
    """Who is refused, read one way."""
    pooling = settle_reading(reading.retrieval, DEPTHS[reading.backbone]).pooling or ""
    stretch = STRETCHES.get(pooling, 1.0)
    keys = {n: learned_keys(train, stretch) for n, (train, _) in splits.items()}
    found = abstention(splits, keys, background, args.seed, reading.is_whole)
    if reading.is_whole:
        file = args.out / f"abstention_{reading.name}.png"
        plot_abstention(RATES, found["false refusals"], found["strangers let in"], file, is_rate=True)
    return found


def learned_keys(train: Tensor, stretch: float) -> TaskKeys:
    """Gaussian keys of one task whose requests are expected farther away by a factor."""
    keys = keys_of(train)
    return dataclasses.replace(keys, scales=keys.scales * stretch)


def wanted_readings(
    args: argparse.Namespace, known: Mapping[str, Mapping[str, Any]], parts: set[str]
) -> list[Reading]:
    """The readings asked for that lack one of some parts."""
    names = args.readings.split(",")
    return [r for r in READINGS if r.name in names and not parts <= known.get(r.name, {}).keys()]


def main() -> None:
    """Measure every part, print the tables, write the files after each."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.parts.split(",")
    file = args.out / "retrieval.json"
    results: dict[str, Any] = json.loads(file.read_text()) if args.keep and file.exists() else {}

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "retrieval.md").write_text(tables(results, args.train, args.test))

    if "reading" in parts:
        results["reading cost"] = reading_cost()
        keep()
    if "rounding" in parts:
        names = sorted(p.parent.name for p in args.data.glob("*/train.jsonl"))
        some = Stream.load(args.data, names, limit=100, test_limit=40, seed=args.seed)
        results["rounding"] = {
            f"{backbone}, {form}": rounding(some, backbone, form)
            for backbone in DEPTHS
            for form in ("gaussian", "cosine")
        }
        keep()
    asked = {"routing", "abstention"} & set(parts)
    if asked:
        names = sorted(p.parent.name for p in args.data.glob("*/train.jsonl"))
        stream = Stream.load(args.data, names, limit=args.train, test_limit=args.test, seed=args.seed)
        known = results.setdefault("readings", {})
        wanted = wanted_readings(args, known, asked)
        for reading, splits, background in all_queries(wanted, stream):
            begun = time.perf_counter()
            found = known.setdefault(reading.name, {})
            if "routing" in asked - found.keys():
                found |= measure_routing(reading, splits, stream, args)
            if "abstention" in asked - found.keys():
                found["abstention"] = measure_abstention(reading, splits, background, args)
            print(f"{reading.name}: {time.perf_counter() - begun:.0f} s", flush=True)
            keep()
    if "all-rows" in parts:
        names = sorted(p.parent.name for p in args.data.glob("*/train.jsonl"))
        whole = Stream.load(args.data, names, test_limit=args.test, seed=args.seed)
        known = results.setdefault("readings", {})
        wanted = [r for r in wanted_readings(args, known, {"all rows"}) if r.is_whole]
        for reading, splits, _ in all_queries(wanted, whole):
            known.setdefault(reading.name, {})["all rows"] = all_rows_routing(splits)
            keep()
    if "costs" in parts:
        long = Stream.load(
            args.data, CLASSIFICATIONS, limit=args.train, test_limit=args.learned_test, seed=args.seed
        )
        with tempfile.TemporaryDirectory() as folder:
            results["costs"] = confusion_costs(long, Path(folder))
        keep()
    if "overlap" in parts:
        pairs = Stream.load(args.data, OVERLAPPING, limit=400, seed=args.seed)
        with tempfile.TemporaryDirectory() as folder:
            results["overlap"] = overlap(pairs, Path(folder))
        keep()
    if "versions" in parts:
        names = sorted(p.parent.name for p in args.data.glob("*/train.jsonl"))[::4]
        some = Stream.load(args.data, names, limit=300, test_limit=60, seed=args.seed)
        whole_ones = [reading for reading in READINGS if reading.is_whole]
        results["versions"] = {
            reading.name: versions(
                splits, background, settle_reading(reading.retrieval, DEPTHS[reading.backbone])
            )
            for reading, splits, background in all_queries(whole_ones, some)
        }
        keep()
    keep()
    print(tables(results, args.train, args.test))


if __name__ == "__main__":
    main()
