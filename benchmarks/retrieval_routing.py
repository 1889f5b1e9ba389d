"""What ``retrieval.py`` measures on queries alone: routing, abstention, and whether a weight is honest."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.bench.calibration import plot_reliability
from slm.config import RetrievalConfig
from slm.evaluation.metrics import auroc, expected_calibration_error
from slm.retrieval.background import Background
from slm.retrieval.keys import TaskKeys, cluster, learn_keys
from slm.retrieval.retriever import Retriever
from slm.retrieval.scoring import GaussianScorer

CLASSIFICATIONS = (
    *("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb"),
    *("yelp", "amazon", "sst2", "dbpedia", "agnews", "multirc", "yahoo"),
)
"""The 15 tasks of the long stream, order 8."""
TWINS = ("mnli", "rte", "cb")
"""Three sets of one task, inference between two sentences, with shared labels."""
RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
SIZES = (1, 2, 5, 10)
STATED = (0.01, 0.001)

Splits = Mapping[str, tuple[Tensor, Tensor]]
"""Task -> its training queries (B, C) and its test queries (B', C)."""
Keys = Mapping[str, TaskKeys]


def keys_of(queries: Tensor, num_keys: int = 1) -> TaskKeys:
    """Gaussian keys of one task."""
    return learn_keys(queries, cluster(queries, num_keys, seed=0))


def label_keys(queries: Tensor, labels: Sequence[str]) -> TaskKeys:
    """One gaussian key per label; one key where answers are free text."""
    names = sorted(set(labels))
    is_free = len(names) > len(labels) / 4
    places = [0 if is_free else names.index(label) for label in labels]
    return learn_keys(queries, torch.tensor(places))


def retriever_of(
    keys: Sequence[TaskKeys], background: Background | None = None, **settings: Any
) -> Retriever:
    """A gaussian retriever over these tasks."""
    total = sum((k.scatter.double() for k in keys), torch.zeros(1, dtype=torch.float64))
    return Retriever(keys, total, RetrievalConfig(**settings), background=background)


def misrouting(splits: Splits, keys: Keys, **settings: Any) -> tuple[float, dict[str, dict[str, int]]]:
    """Mean over the tasks of the share of test rows nearest to another task's key; and where they went."""
    names = list(keys)
    retriever = retriever_of([keys[name] for name in names], is_abstaining=False, **settings)
    shares, confusions = [], {}
    for number, name in enumerate(names):
        found = retriever(splits[name][1])
        routed = found.owners[found.nearest].tolist()
        shares.append(sum(r != number for r in routed) / len(routed))
        elsewhere = [names[r] for r in routed if r != number]
        if elsewhere:
            confusions[name] = {other: elsewhere.count(other) for other in sorted(set(elsewhere))}
    return statistics.mean(shares), confusions


def sets_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The three sets of tasks that are routed among themselves."""
    return {
        "15": [n for n in names if n in CLASSIFICATIONS],
        "22": list(names),
        "20": [n for n in names if n not in ("rte", "cb")],
    }


def routing(splits: Splits, keys: Keys) -> dict[str, Any]:
    """Misrouting of the gaussian form over three sets of tasks, and with few examples."""
    few = {name: keys_of(train[:16]) for name, (train, _) in splits.items()}
    found: dict[str, Any] = {"channels": next(iter(keys.values())).num_channels}
    for title, names in sets_of(list(splits)).items():
        found[title], confusions = misrouting(splits, {n: keys[n] for n in names})
        if title == "22":
            found["confusions"] = confusions
    found["22, 16 examples"] = misrouting(splits, few)[0]
    found["without runoff"] = {
        **shares_of(splits, keys, has_runoff=False),
        "22, 16 examples": misrouting(splits, few, has_runoff=False)[0],
    }
    return found


def shares_of(splits: Splits, keys: Keys, **settings: Any) -> dict[str, float]:
    """Misrouting of the gaussian form over three sets of tasks."""
    sets = sets_of(list(splits)).items()
    return {title: misrouting(splits, {n: keys[n] for n in names}, **settings)[0] for title, names in sets}


def all_rows_routing(splits: Splits) -> dict[str, Any]:
    """Misrouting of the gaussian form over three sets of tasks, and how many training rows it had."""
    keys = {name: keys_of(train) for name, (train, _) in splits.items()}
    return {
        **shares_of(splits, keys),
        "without runoff": shares_of(splits, keys, has_runoff=False),
        "rows": [len(train) for train, _ in splits.values()],
    }


def alternatives(splits: Splits, labels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Misrouting of other routers on the same queries: more keys a task, and a ridge router."""
    found = {}
    for title, keys in (
        ("one key per label", {n: label_keys(train, labels[n]) for n, (train, _) in splits.items()}),
        ("4 k-means keys a task", {n: keys_of(train, 4) for n, (train, _) in splits.items()}),
    ):
        found[title] = shares_of(splits, keys)
    sets = sets_of(list(splits))
    found["ridge router, 2,000 random features"] = {
        s: ridge_misrouting({n: splits[n] for n in names}) for s, names in sets.items()
    }
    return found


def ridge_misrouting(splits: Splits, num_features: int = 2000, weight: float = 1e-2) -> float:
    """Misrouting of a ridge classifier of tasks on random features, closed form and free of order too.

    Features are ReLUs of random projections of the queries, standardised over all tasks. The weight is the
    best of a few tried on these very tasks, which favours it.
    """
    rows = torch.cat([train for train, _ in splits.values()])
    mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(rows.shape[1], num_features, generator=generator) / rows.shape[1] ** 0.5

    def features(queries: Tensor) -> Tensor:
        return torch.relu((queries - mean) / scale @ projection).double()

    gram = torch.zeros(num_features, num_features, dtype=torch.float64)
    sums = []
    for train, _ in splits.values():
        own = features(train)
        gram += own.T @ own
        sums.append(own.mean(0))
    gram += weight * gram.diagonal().mean() * torch.eye(num_features, dtype=torch.float64)
    solved = torch.linalg.solve(gram, torch.stack(sums, dim=1))
    wrong = [
        float((features(test) @ solved).argmax(1).ne(i).double().mean())
        for i, (_, test) in enumerate(splits.values())
    ]
    return statistics.mean(wrong)


def thirds(names: Sequence[str], seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """Tasks in the store and tasks left out, three times, every task left out once."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    for i in range(3):
        out = shuffled[i::3]
        yield [n for n in names if n not in out], out


class Opened:
    """A store of some tasks, asked the test rows of all: how far they are, and who is refused at any rate."""

    def __init__(
        self, splits: Splits, keys: Keys, inside: Sequence[str], background: Background | None = None
    ) -> None:
        self._keys = [keys[name] for name in inside]
        retriever = retriever_of(self._keys, background)
        assert isinstance(retriever.scorer, GaussianScorer)
        self._space = retriever.scorer.space
        found = {name: retriever(test) for name, (_, test) in splits.items()}
        self.distances = {name: own.distances[:, 0].double() for name, own in found.items()}
        self._nearest = {name: own.nearest for name, own in found.items()}

    def refusals(self, rate: float, asked: Sequence[str]) -> dict[str, float]:
        """Share of the test rows of each task asked that is refused at a stated rate."""
        scorer = GaussianScorer(self._space, self._keys, rate, lambda number: self._keys[number].scatter)
        limits = {name: scorer.thresholds(self._nearest[name]) for name in asked}
        return {name: float((self.distances[name] > limits[name]).double().mean()) for name in asked}


def abstention(
    splits: Splits, keys: Keys, background: Background, seed: int, is_whole: bool
) -> dict[str, Any]:
    """AUROC of the relative distance, a third of the tasks left out in turn; both errors at stated rates."""
    areas: dict[str, float] = {}
    errors: dict[float, list[tuple[float, float]]] = {rate: [] for rate in RATES}
    for inside, outside in thirds(list(splits), seed):
        opened = Opened(splits, keys, inside, background)
        own = [d for n in inside for d in opened.distances[n].tolist()]
        areas.update({n: auroc(opened.distances[n].tolist(), own) for n in outside})
        for rate in RATES if is_whole else ():
            refused = opened.refusals(rate, list(splits))
            strangers = [1 - refused[n] for n in outside if n not in TWINS]
            errors[rate].append((statistics.mean(refused[n] for n in inside), statistics.mean(strangers)))
    apart = {n: a for n, a in areas.items() if n not in TWINS}
    found = {
        "auroc": areas,
        "mean without twins": statistics.mean(apart.values()),
        "worst without twins": min(apart.items(), key=lambda item: item[1]),
    }
    if is_whole:
        found |= {
            "rates": RATES,
            "false refusals": [statistics.mean(f for f, _ in errors[rate]) for rate in RATES],
            "strangers let in": [statistics.mean(s for _, s in errors[rate]) for rate in RATES],
            "by size": {
                "with": errors_by_size(splits, keys, background, seed),
                "without": errors_by_size(splits, keys, None, seed),
            },
        }
    return found


def errors_by_size(
    splits: Splits, keys: Keys, background: Background | None, seed: int
) -> list[dict[str, Any]]:
    """Own rows refused, and strangers let in, by stores of several sizes.

    The shuffled tasks are cut into stores, so that every task is measured in one. Strangers are the test rows
    of all tasks that are not in the store, nor have a twin there.
    """
    found = []
    for size in (*SIZES, len(splits)):
        refused: dict[float, dict[str, float]] = {rate: {} for rate in STATED}
        let_in: dict[float, list[float]] = {rate: [] for rate in STATED}
        names = sorted(splits)
        random.Random(seed).shuffle(names)
        for start in range(0, len(names), size):
            inside = [names[(start + i) % len(names)] for i in range(size)]  # the last wraps around
            has_twin = not set(TWINS).isdisjoint(inside)
            strangers = [n for n in names if n not in inside and not (has_twin and n in TWINS)]
            opened = Opened(splits, keys, inside, background)
            for rate in STATED:
                shares = opened.refusals(rate, [*inside, *strangers])
                refused[rate] |= {name: shares[name] for name in names[start : start + size]}
                let_in[rate] += [1 - shares[name] for name in strangers]
        for rate in STATED:
            means = refused[rate]
            found.append(
                {
                    "tasks": size,
                    "rate": rate,
                    "refused": statistics.mean(means.values()),
                    "worst": max(means.items(), key=lambda item: item[1]),
                    "let in": statistics.mean(let_in[rate]) if let_in[rate] else None,
                }
            )
    return found


def reliability(splits: Splits, keys: Keys, file: Path) -> dict[str, float]:
    """Expected calibration error of a row's largest weight at several temperatures; the default is drawn."""
    errors: dict[str, float] = {}
    for temperature in (*TEMPERATURES, None):
        retriever = retriever_of(list(keys.values()), is_abstaining=False, temperature=temperature)
        confidences: list[float] = []
        is_right: list[bool] = []
        for number, (_, test) in enumerate(splits.values()):
            found = retriever(test)
            confidences += found.posterior.max(1).values.clamp(max=1.0).tolist()
            is_right += (found.owners[found.nearest] == number).tolist()
        if temperature is None:
            errors["default"] = plot_reliability(confidences, is_right, file)
        else:
            errors[f"{temperature:g}"] = expected_calibration_error(confidences, is_right, 15)
    return errors
