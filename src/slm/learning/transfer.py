"""Forward transfer: starting a new task from the increments of earlier ones (method section 4).

The task's own queries retrieve among the stored tasks. Every candidate start, an earlier task's increment or
the retrieved mixture of them at the same rank, is judged by a probe: a ridge regression of the labels on the
features the backbone gives when bent by it, with the leave-one-out error of the task's own rows in closed
form. A start is taken only where it beats the frozen backbone by two standard errors of the paired
difference; otherwise the task is learned alone, to the bit. Only increments and keys of earlier tasks are
used, and none of their files is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.backbone.backbone import BackboneKind
from slm.backbone.reparameterize import LearningBinding, Mixture
from slm.errors import ConfigError
from slm.increments.increment import Increment, concatenate, lower_rank
from slm.learning.trainer import Learnable, TrainingRow
from slm.model import ScalableLM
from slm.tasks.sampling import rank as rank_by_seed

MAX_SOURCES = 4
"""Earlier tasks that are tried, the most retrieved first: what this costs does not grow with the store."""

MAX_PROBE_ROWS = 512
"""Rows of the task that judge a start."""

NUM_ERRORS = 2.0
"""By how many standard errors a start must beat learning alone."""

PENALTIES = (3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""λ of the probe; the best one is taken for each start."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a task begins from.

    Attributes:
        increment: of at most the rank that is learned; None begins alone.
        sources: weight of each earlier task in it, by name; empty where the task begins alone.
        errors: mean leave-one-out error of the probe by start, ``none`` among them.
    """

    increment: Increment | None
    sources: Mapping[str, float]
    errors: Mapping[str, float]

    def as_metadata(self) -> dict[str, Any]:
        """What the task's record says of it."""
        return {"started_from": dict(self.sources), "start_errors": dict(self.errors)}


def choose_start(model: ScalableLM, queries: Float[Tensor, "B C"], rows: Sequence[TrainingRow]) -> Start:
    """Pick what a task starts from, by its own rows alone.

    Args:
        model: gives the backbone and the earlier tasks.
        queries: (B, C) of the rows.
        rows: the task's training rows, without those kept for validation.

    Raises:
        ConfigError: the backbone is no encoder.
    """
    if model.backbone.kind is not BackboneKind.ENCODER:
        raise ConfigError(
            f"start is 'retrieved', which judges starts by an encoder's labels; {model.backbone.source!r} is "
            f"a {model.backbone.kind.value} backbone: set start to 'none'"
        )
    candidates = _candidates(model, queries)
    chosen = sorted(range(len(rows)), key=lambda i: rank_by_seed(0, repr(rows[i].row.prompt)))
    probed = [rows[i] for i in chosen[:MAX_PROBE_ROWS]]
    labels = torch.tensor([item.label for item in probed])
    alone = probe_errors(features(model, probed, None), labels)
    means, best = {"none": float(alone.mean())}, (0.0, "none")
    for name, (increment, _) in candidates.items():
        errors = probe_errors(features(model, probed, increment), labels)
        means[name] = float(errors.mean())
        lead = certain_gain(alone, errors)
        best = max(best, (lead, name), key=lambda item: item[0])
    if best[0] <= 0:
        return Start(None, {}, means)
    increment, sources = candidates[best[1]]
    return Start(increment, sources, means)


def certain_gain(alone: Float[Tensor, " B"], started: Float[Tensor, " B"]) -> float:
    """Mean paired gain of a start over learning alone, less ``NUM_ERRORS`` standard errors of it."""
    gains = alone - started
    return float(gains.mean() - NUM_ERRORS * gains.std() / len(gains) ** 0.5) if len(gains) > 1 else 0.0


def begin_from(learnable: Learnable, start: Increment) -> None:
    """Set the parameters of new increments to those of a start; ranks it leaves free stay as drawn."""
    num = learnable.num_increments
    for name, binding in zip(learnable.names, learnable.bindings, strict=True):
        pair = start.pairs.get(name)
        if pair is None:
            continue
        assert isinstance(binding, LearningBinding)
        down, up = binding.A.detach(), binding.B.detach()
        down.view(num, -1, down.shape[1])[:, : start.rank] = pair.A.to(down.device)
        raised = (pair.B * (start.scale / binding.scale)).to(up.device)
        up.view(up.shape[0], num, -1)[:, :, : start.rank] = raised[:, None]


def _candidates(
    model: ScalableLM, queries: Float[Tensor, "B C"]
) -> dict[str, tuple[Increment, dict[str, float]]]:
    """Starts by name, each with the weights of the tasks in it."""
    knowledge, rank = model.knowledge, model.config.increments.rank
    if knowledge.retriever is None:
        return {}
    retrieved = knowledge.retriever(queries)
    shares = torch.zeros(len(knowledge.records))
    shares.scatter_add_(0, retrieved.owners[retrieved.candidates].flatten(), retrieved.posterior.flatten())
    shares /= shares.sum()
    order = sorted(range(len(shares)), key=lambda i: (-float(shares[i]), i))[:MAX_SOURCES]
    whole = {}
    for number in order:
        record = knowledge.records[number]
        parts = [model.store.increment(record, i) for i in range(record.num_increments)]
        whole[record.name] = _reachable(concatenate(parts, [1 / len(parts)] * len(parts)), model.targets)
    found = {name: (lower_rank(part, rank), {name: 1.0}) for name, part in whole.items()}
    # The retrieved mixture, and the tasks in equal parts, for shares are often close to one task's alone.
    mixtures = {"mixture": [float(shares[i]) for i in order], "mean": [1.0] * len(order)}
    for name, given in mixtures.items() if len(order) > 1 else ():
        weights = [weight / sum(given) for weight in given]
        mixed = concatenate(list(whole.values()), weights)
        found[f"({name})"] = (lower_rank(mixed, rank), dict(zip(whole, weights, strict=True)))
    return found


def _reachable(increment: Increment, targets: Sequence[str]) -> Increment:
    """An increment without layers that new ones do not change, as an imported one may have."""
    pairs = {name: pair for name, pair in increment.pairs.items() if name in set(targets)}
    return Increment(pairs, increment.rank, increment.alpha)


@torch.no_grad()
def features(
    model: ScalableLM, rows: Sequence[TrainingRow], increment: Increment | None, batch_size: int = 32
) -> Float[Tensor, "B C"]:
    """What a head would read of some rows, with one increment bound or none; (B, C) float32 on the CPU."""
    backbone, found = model.backbone, [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].row.prompt))
    try:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            if increment is not None:
                column = torch.zeros(len(chosen), 1)
                backbone.reparameterizer.bind(Mixture([increment], column.long(), column + 1))
            pooled = backbone.pooled(backbone.batch([rows[i].row for i in chosen])).cpu()
            for i, feature in zip(chosen, pooled, strict=True):
                found[i] = feature
    finally:
        backbone.reparameterizer.release()
    return torch.stack(found)


def probe_errors(features: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Squared error of each row's one-hot label under a ridge regression fitted without that row.

    With K the Gram matrix of the features, scaled to a mean diagonal of 1 and raised by 1 for an intercept,
    and M = (K + λ I)⁻¹, the residual of row i when left out is (M Y)_i / M_ii (Allen 1974). λ is the one of
    ``PENALTIES`` with the smallest mean error.

    Args:
        features: (B, C).
        labels: (B,) int64, 0..Y-1.

    Returns:
        (B,) float64.
    """
    x = features.double()
    x = x - x.mean(0)
    x = x / x.square().sum(1).mean().clamp_min(1e-30).sqrt()
    gram, eye = x @ x.T + 1, torch.eye(len(x), dtype=torch.float64)
    wanted = torch.nn.functional.one_hot(labels).double()
    found: list[Tensor] = []
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(gram + penalty * eye)
        found.append((inverse @ wanted / inverse.diagonal()[:, None]).square().sum(1))
    return min(found, key=lambda errors: float(errors.mean()))
