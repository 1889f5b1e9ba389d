"""The ablations of the paper's form of DTKR, on queries computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.config import CosineConfig, RetrievalConfig
from slm.retrieval.cosine import learn_cosine_keys
from slm.retrieval.keys import TaskKeys, cluster
from slm.retrieval.retriever import Retriever

Splits = Mapping[str, tuple[Tensor, Tensor]]
"""Task -> its training queries (B, C) and its test queries (B', C)."""


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One variant of the keys, measured.

    Attributes:
        name: what differs from the paper's settings.
        misrouting: share of test rows whose nearest key is another task's, mean over the tasks.
        false_refusals: share of test rows farther from their own task's nearest key than its threshold, mean
            over the tasks; None for baselines, which have no threshold.
        loss: of the last steps of key learning, mean over the tasks; None for baselines.
    """

    name: str
    misrouting: float
    false_refusals: float | None
    loss: float | None


def ablations(
    splits: Splits, *, base: CosineConfig | None = None, top_k: int = 4, seed: int = 0
) -> list[AblationRow]:
    """The paper's form, one setting changed at a time, and baselines without learning.

    Every row is what a store with these settings decides, row by row: keys by
    :func:`slm.retrieval.cosine.learn_cosine_keys`, decisions by :class:`slm.retrieval.retriever.Retriever`.

    Args:
        splits: queries of each task.
        base: the unchanged settings; None takes the paper's.
        top_k: K of the unchanged settings, 4 with BERT and 2 with LLaMA in the paper.
        seed: of key learning and k-means.
    """
    rows = []
    for name, config in variants(base or CosineConfig(), top_k):
        learned = {
            task: learn_cosine_keys(train, config.cosine, config.top_k, seed)
            for task, (train, _) in splits.items()
        }
        keys = {task: own for task, (own, _) in learned.items()}
        losses = [history.losses[-1] for _, history in learned.values()]
        misrouting, refusals = measure(splits, keys, config)
        rows.append(AblationRow(name, misrouting, refusals, sum(losses) / len(losses)))
    plain = RetrievalConfig(form="cosine", top_k=1, cosine=CosineConfig(num_groups=1))
    for name, count in (("mean cosine key", 1), ("16 k-means keys", 16)):
        keys = {task: mean_keys(train, count, seed) for task, (train, _) in splits.items()}
        rows.append(AblationRow(name, measure(splits, keys, plain)[0], None, None))
    return rows


def variants(base: CosineConfig, top_k: int) -> Iterator[tuple[str, RetrievalConfig]]:
    """Name and settings of each ablation; everything else stays as in the first."""

    def vary(kept: int = top_k, **change: int | float) -> RetrievalConfig:
        return RetrievalConfig(
            form="cosine",
            top_k=kept,
            cosine=dataclasses.replace(base, **change),  # type: ignore[arg-type]
        )

    yield f"{base.num_groups} groups, {base.keys_per_task} keys, K = {top_k}, mask {base.key_mask:g}", vary()
    yield f"{base.num_epochs} passes and no more", vary(min_steps=0)
    yield "no groups", vary(num_groups=1)
    yield "no mask", vary(key_mask=0.0)
    for count in (1, 2, 8):
        yield f"{count} key{'s' if count > 1 else ''} per task", vary(keys_per_task=count)
    for kept in (1, 2, 4):
        if kept != top_k:
            yield f"K = {kept}", vary(kept)


def mean_keys(queries: Tensor, num_keys: int, seed: int) -> TaskKeys:
    """Baseline keys: the means of k-means clusters of the queries, (N_t, C), compared by plain cosine."""
    rows = cluster(queries, num_keys, seed)
    means = torch.stack([queries[rows == n].double().mean(0) for n in range(int(rows.max()) + 1)])
    return TaskKeys(
        means=means,
        counts=torch.bincount(rows),
        scatter=torch.zeros(0),
        increments=torch.zeros(len(means), dtype=torch.long),
    )


def measure(splits: Splits, keys: Mapping[str, TaskKeys], config: RetrievalConfig) -> tuple[float, float]:
    """Misrouting over all tasks' keys and false refusals against the own task's, means over the tasks."""
    never = dataclasses.replace(config, is_abstaining=False)
    retriever = _retriever([keys[task] for task in splits], never)
    wrong, refused = [], []
    for number, (task, (_, test)) in enumerate(splits.items()):
        found = retriever(test)
        wrong.append(float((found.owners[found.nearest] != number).double().mean()))
        refused.append(float(_retriever([keys[task]], config)(test).is_abstained.double().mean()))
    return sum(wrong) / len(wrong), sum(refused) / len(refused)


def _retriever(tasks: list[TaskKeys], config: RetrievalConfig) -> Retriever:
    return Retriever(tasks, torch.zeros(0, dtype=torch.float64), config)
