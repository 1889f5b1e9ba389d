"""Forward transfer: starting a new task from the increments and heads of earlier ones (method section 4).

The task's own queries retrieve among the stored tasks. Every candidate start, an earlier task's increment or
a mixture of them at the same rank, is judged by a probe: a ridge regression of the labels on the features the
backbone gives when bent by it, with the leave-one-out error of the task's own rows in closed form. The probe
may lean on the directions that the earlier heads read, whatever their labels were called. A start is taken
only where it beats the frozen backbone's own probe beyond chance (one-sided 5% of the paired difference) and
by a twentieth; otherwise the task is learned alone, to the bit. Only increments, heads and keys of earlier
tasks are used, and none of their files is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from slm.backbone.reparameterize import LearningBinding, Mixture
from slm.fitting import check_start
from slm.increments.increment import Increment, concatenate, lower_rank
from slm.learning.learnable import Learnable
from slm.learning.trainer import TrainingRow
from slm.model import ScalableLM
from slm.tasks.sampling import rank as rank_by_seed

MAX_SOURCES = 4
"""Earlier tasks that are tried, the most retrieved first: what this costs does not grow with the store."""

MAX_PROBE_ROWS = 512
"""Rows of the task that judge a start."""

NUM_ERRORS = 1.64
"""By how many standard errors a start must beat learning alone: one-sided 5%."""

MIN_GAIN = 0.05
"""By what share a start must lower the probe's error: smaller gains did not outlast fine-tuning."""

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""λ of the probe; the best one is taken for each start."""

LEANINGS = (0.0, 0.3, 1.0, 3.0, 10.0)
"""γ of the probe, how much it leans on the directions of earlier heads; the best one is taken."""

SHARPNESSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""What multiplies the probe's scores to make logits of them; the best left-out cross-entropy decides."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A ridge regression of one-hot labels, judged row by row with that row left out.

    Attributes:
        errors: (B,) float64, squared error of each row when it is left out.
        weight: (Y, C) float64, with ``bias`` (Y,) a head whose logits are the sharpened scores.
        bias: (Y,) float64.
    """

    errors: Float[Tensor, " B"]
    weight: Float[Tensor, "Y C"]
    bias: Float[Tensor, " Y"]


@dataclass(frozen=True, slots=True)
class Start:
    """What a task begins from.

    Attributes:
        increment: of at most the rank that is learned; None begins alone.
        probe: its head; None begins alone.
        sources: weight of each earlier task in it, by name; empty where the task begins alone.
        errors: mean left-out error of the probe by start, ``none`` among them.
    """

    increment: Increment | None
    probe: Probe | None
    sources: Mapping[str, float]
    errors: Mapping[str, float]

    def as_metadata(self) -> dict[str, Any]:
        """What the task's record says of it."""
        return {"started_from": dict(self.sources), "start_errors": dict(self.errors)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A start that may be taken.

    Attributes:
        increment: what bends the backbone.
        heads: (Z, C) directions that the heads of its tasks read.
        sources: weight of each earlier task in it, by name.
    """

    increment: Increment
    heads: Float[Tensor, "Z C"]
    sources: Mapping[str, float]


def choose_start(
    model: ScalableLM, queries: Float[Tensor, "B C"], rows: Sequence[TrainingRow], num_labels: int
) -> Start:
    """Pick what a task starts from, by its own rows alone.

    Args:
        model: gives the backbone and the earlier tasks.
        queries: (B, C) of the rows.
        rows: the task's training rows, without those kept for validation.
        num_labels: Y of the task.

    Raises:
        ConfigError: the backbone is no encoder.
    """
    check_start(model.backbone)
    chosen = sorted(range(len(rows)), key=lambda i: rank_by_seed(0, repr(rows[i].row.prompt)))
    probed = [rows[i] for i in chosen[:MAX_PROBE_ROWS]]
    labels = functional.one_hot(torch.tensor([item.label for item in probed]), num_labels).double()
    alone = fit_probe(features(model, probed, None), labels).errors
    best, most = Start(None, None, {}, {}), MIN_GAIN * float(alone.mean())
    means = {"none": float(alone.mean())}
    for name, candidate in _candidates(model, queries).items():
        found = features(model, probed, candidate.increment)
        # Without the heads' directions the comparison is steadier, with them it may gain more.
        for suffix, heads in (("", None), (" and heads", candidate.heads)):
            probe = fit_probe(found, labels, heads)
            gain = float((alone - probe.errors).mean())
            means[name + suffix] = float(probe.errors.mean())
            if gain > most and is_certain(alone - probe.errors):
                best, most = Start(candidate.increment, probe, candidate.sources, {}), gain
    return replace(best, errors=means)


def is_certain(gains: Float[Tensor, " B"]) -> bool:
    """Whether paired gains are above zero on average by ``NUM_ERRORS`` standard errors of that average."""
    return len(gains) > 1 and bool(gains.mean() > NUM_ERRORS * gains.std() / len(gains) ** 0.5)


def begin_from(learnable: Learnable, start: Increment, head: Probe) -> None:
    """Set new increments and the new head to those of a start; ranks it leaves free stay as drawn.

    From then on the head learns no faster than the increments: it is fitted already, and the rate of a head
    that starts from zero would rewrite it within a few steps.
    """
    num = learnable.num_increments
    for name, binding in zip(learnable.names, learnable.bindings, strict=True):
        pair = start.pairs.get(name)
        if pair is None:
            continue
        assert isinstance(binding, LearningBinding)
        down, up = binding.A.detach(), binding.B.detach()
        down.view(num, -1, down.shape[1])[:, : start.rank] = pair.A.to(down.device)
        raised = (pair.B.float() * (start.scale / binding.scale)).to(up.device)
        up.view(up.shape[0], num, -1)[:, :, : start.rank] = raised[:, None]
    assert learnable.head is not None
    learnable.head.weight.detach().copy_(head.weight)
    learnable.head.bias.detach().copy_(head.bias)
    learnable.is_head_fitted = True


def _candidates(model: ScalableLM, queries: Float[Tensor, "B C"]) -> dict[str, Candidate]:
    """Starts by name: the most retrieved tasks, what was retrieved, and all of them in equal parts."""
    knowledge, rank = model.knowledge, model.config.increments.rank
    if knowledge.retriever is None:
        return {}
    retrieved = knowledge.retriever(queries)
    shares = torch.zeros(len(knowledge.records))
    shares.scatter_add_(0, retrieved.owners[retrieved.candidates].flatten(), retrieved.posterior.flatten())
    order = sorted(range(len(shares)), key=lambda i: (-float(shares[i]), i))[:MAX_SOURCES]
    whole, heads = {}, {}
    for number in order:
        record = knowledge.records[number]
        parts = [model.store.increment(record, i) for i in range(record.num_increments)]
        whole[record.name] = _reachable(concatenate(parts, [1 / len(parts)] * len(parts)), model.targets)
        head = model.store.head(record)
        heads[record.name] = torch.empty(0, model.backbone.num_channels) if head is None else head["weight"]
    found = {
        name: Candidate(lower_rank(part, rank), heads[name], {name: 1.0}) for name, part in whole.items()
    }
    # What is retrieved is often close to one task's alone, so equal parts are tried as well.
    mixtures = {"(mixture)": [float(shares[i]) for i in order], "(mean)": [1.0] * len(order)}
    for name, given in mixtures.items() if len(order) > 1 else ():
        weights = [weight / sum(given) for weight in given]
        mixed = lower_rank(concatenate(list(whole.values()), weights), rank)
        found[name] = Candidate(
            mixed, torch.cat(list(heads.values())), dict(zip(whole, weights, strict=True))
        )
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


def fit_probe(
    features: Float[Tensor, "B C"], labels: Float[Tensor, "B Y"], heads: Float[Tensor, "Z C"] | None = None
) -> Probe:
    """Ridge regression of one-hot labels whose penalties are chosen by the error of left-out rows.

    With x the features and z = x Hᵀ what earlier heads H read of them, both centred and scaled to a mean
    square length of 1, K = x xᵀ + γ z zᵀ + 1 (the last for an intercept) and M = (K + λ I)⁻¹, the residual of
    row i when it is left out is (M Y)_i / M_ii (Allen 1974). The head is the same regression, written on x.

    Args:
        features: (B, C).
        labels: (B, Y) float64, one-hot.
        heads: (Z, C); None leans on nothing.
    """
    x = features.double()
    middle = x.mean(0)
    maps = [torch.eye(x.shape[1], dtype=torch.float64)] + ([] if heads is None else [heads.double()])
    # Each map brings its part of the features to a mean square length of 1.
    maps = [m / ((x - middle) @ m.T).square().sum(1).mean().clamp_min(1e-30).sqrt() for m in maps]
    parts = [(x - middle) @ m.T for m in maps]
    eye = torch.eye(len(x), dtype=torch.float64)
    found: list[tuple[float, float, Tensor, Tensor]] = []
    for leaning in LEANINGS if heads is not None else (0.0,):
        gram = parts[0] @ parts[0].T + (leaning * parts[1] @ parts[1].T if leaning else 0) + 1
        for penalty in PENALTIES:
            inverse = torch.linalg.inv(gram + penalty * eye)
            duals = inverse @ labels
            residuals = duals / inverse.diagonal()[:, None]
            found.append((float(residuals.square().sum(1).mean()), leaning, duals, residuals))
    _, leaning, duals, residuals = min(found, key=lambda item: item[0])
    weight = duals.T @ parts[0] @ maps[0]
    if leaning:
        weight = weight + leaning * duals.T @ parts[1] @ maps[1]
    wanted, scores = labels.argmax(1), labels - residuals
    sharpness = min(SHARPNESSES, key=lambda s: float(functional.cross_entropy(s * scores, wanted)))
    bias = duals.sum(0) - weight @ middle
    return Probe(residuals.square().sum(1), sharpness * weight, sharpness * bias)
