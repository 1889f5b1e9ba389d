"""Pictures of key learning, and the ablations of the paper's form on queries computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slm.bench.report import open_figure, save_figure
from slm.config import CosineConfig, RetrievalConfig
from slm.errors import ConfigError
from slm.retrieval.cosine import KeyHistory, learn_cosine_keys
from slm.retrieval.keys import TaskKeys, cluster
from slm.retrieval.retriever import Retriever

Splits = Mapping[str, tuple[Tensor, Tensor]]
"""Task -> its training queries (B, C) and its test queries (B', C)."""


def check_key_plot(config: RetrievalConfig) -> None:
    """Refuse to draw key losses where there will be none, before anything is learned.

    Raises:
        ConfigError: the form has keys in closed form, or matplotlib is missing.
    """
    if config.form != "cosine":
        raise ConfigError(
            f"keys of the {config.form} form are computed, not trained, so there is no loss to draw: leave "
            "--plot-keys out, or make a store with --set retrieval.form=cosine"
        )
    open_figure(1, 1)


def plot_key_losses(histories: Mapping[str, KeyHistory], path: str | Path) -> Path:
    """Draw how the loss of each task's keys fell, one line per task.

    Args:
        histories: task -> its history.
        path: the picture, .png or another format of matplotlib.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is missing.
    """
    if not histories:
        raise ConfigError("no key history was given: pass that of at least one task")
    figure = open_figure(6.4, 4.0)
    ax = figure.subplots()
    for name, history in histories.items():
        steps = [history.steps_per_loss * (i + 1) for i in range(len(history.losses))]
        ax.plot(steps, history.losses, label=name)
    ax.set_xlabel("step of key learning")
    ax.set_ylabel("loss: − mean similarity of the kept keys")
    ax.grid(color="0.9")
    ax.legend(frameon=False)
    return save_figure(figure, path)


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One variant of the keys, measured.

    Attributes:
        name: what differs from the paper's settings.
        misrouting: share of test rows whose nearest key is another task's, mean over the tasks.
        false_refusals: share of test rows farther from their own task's nearest key than its threshold, mean
            over the tasks; None for baselines, which have no threshold.
        losses: mean loss of the last steps of key learning over the tasks; None for baselines.
    """

    name: str
    misrouting: float
    false_refusals: float | None
    losses: float | None


def ablations(splits: Splits, *, seed: int = 0, top_k: int = 4) -> list[AblationRow]:
    """The paper's form, one setting changed at a time, and baselines without learning.

    Every row is what a store with these settings decides: keys by :func:`slm.retrieval.cosine.learn_cosine_keys`,
    decisions by :class:`slm.retrieval.retriever.Retriever`, row by row and without any backbone pass.

    Args:
        splits: queries of each task.
        seed: of key learning and k-means.
        top_k: K of the unchanged settings, 4 with BERT and 2 with LLaMA in the paper.
    """
    rows = []
    for name, config in variants(top_k):
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


def variants(top_k: int) -> Iterator[tuple[str, RetrievalConfig]]:
    """Name and settings of each ablation; everything else stays as in the first, the paper's."""
    base = CosineConfig()

    def vary(kept: int = top_k, **change: int | float) -> RetrievalConfig:
        return RetrievalConfig(
            form="cosine",
            top_k=kept,
            cosine=dataclasses.replace(base, **change),  # type: ignore[arg-type]
        )

    yield f"paper (6 groups, 4 keys, K = {top_k}, mask 0.2)", vary()
    yield "3 passes and no more", vary(min_steps=0)
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


def _retriever(tasks: list[TaskKeys], config: RetrievalConfig) -> Callable[[Tensor], Any]:
    return Retriever(tasks, torch.zeros(0, dtype=torch.float64), config)
