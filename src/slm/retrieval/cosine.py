"""The cosine form of DTKR: learned keys, compared group by group (method section 2a, the paper's form).

A query q and a key k are cut into G slices of H = C/G channels, and

    similarity(q, k) = (1/G) Σ_g cos(q_g, k_g)

which is one inner product of vectors whose slices have unit norm, divided by G. Keys are learned from the
task's own queries before any increment is, and then frozen for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from slm.config import CosineConfig
from slm.errors import ConfigError
from slm.retrieval.keys import NUM_SCALES, TaskKeys, check_finite
from slm.retrieval.runoff import Runoff

_MOST_REFUSED, _LEAST_REFUSED = 0.5, 1e-4
"""Refusal rates between which a task remembers how far its own rows are: those the settings allow."""

_NUM_POINTS = 200
"""Most points of a loss history that are kept."""


@dataclass(frozen=True, slots=True)
class KeyHistory:
    """How the loss fell while the keys of one task were learned.

    Attributes:
        losses: mean of −similarity over the kept keys, each over ``steps_per_loss`` steps.
        steps_per_loss: optimizer steps behind one entry of ``losses``; the last may stand for fewer.
    """

    losses: tuple[float, ...]
    steps_per_loss: int


def check_groups(num_channels: int, num_groups: int) -> None:
    """Refuse a number of groups that does not divide the channels.

    Raises:
        ConfigError: ``num_groups`` is no divisor of ``num_channels``.
    """
    if num_channels % num_groups:
        allowed = [n for n in range(1, num_channels + 1) if num_channels % n == 0]
        near = sorted(allowed, key=lambda n: (abs(n - num_groups), n))[:3]
        raise ConfigError(
            f"num_groups must divide the {num_channels} channels of a query, got {num_groups}: "
            f"choose {' or '.join(map(str, sorted(near)))}"
        )


def unit_groups(vectors: Float[Tensor, "N C"], num_groups: int) -> Float[Tensor, "N C"]:
    """Each of the G slices of each vector scaled to unit norm, in float64; a slice of zeros stays zero.

    Raises:
        ConfigError: ``num_groups`` does not divide C.
    """
    check_groups(vectors.shape[1], num_groups)
    slices = vectors.to(torch.float64).reshape(len(vectors), num_groups, -1)
    return functional.normalize(slices, dim=2).flatten(1)


def similarities(
    queries: Float[Tensor, "B C"], keys: Float[Tensor, "N C"], num_groups: int
) -> Float[Tensor, "B N"]:
    """Mean over the groups of the cosine between query and key, float64 in −1..1.

    Raises:
        ConfigError: ``num_groups`` does not divide C.
    """
    return unit_groups(queries, num_groups) @ unit_groups(keys, num_groups).T / num_groups


def start_keys(
    num_keys: int, num_channels: int, num_groups: int, generator: torch.Generator
) -> Float[Tensor, "N C"]:
    """Random keys (N, C) float64 that are orthonormal within each group.

    A group of H channels has room for H orthogonal keys; beyond that every H keys are so among themselves.
    """
    check_groups(num_channels, num_groups)
    width = num_channels // num_groups
    blocks = [
        torch.cat(
            [
                torch.nn.init.orthogonal_(
                    torch.empty(min(width, num_keys - first), width, dtype=torch.float64), generator=generator
                )
                for first in range(0, num_keys, width)
            ]
        )
        for _ in range(num_groups)
    ]
    return torch.cat(blocks, dim=1)


def learn_cosine_keys(
    queries: Float[Tensor, "B C"], config: CosineConfig, top_k: int, seed: int
) -> tuple[TaskKeys, KeyHistory]:
    """Keys of one task, each owning an increment of its own, and how their loss fell.

    Args:
        queries: (B, C), one per training row.
        config: groups, number of keys, mask and optimizer.
        top_k: K, keys each row attracts.
        seed: start, order and masks; the same seed gives the same keys.

    Raises:
        ConfigError: the groups do not divide the channels.
        DataError: a query is not finite.
    """
    check_finite(queries)
    generator = torch.Generator().manual_seed(seed)
    keys, losses = attract_keys(queries, config, top_k, generator)
    keys = unit_groups(keys, config.num_groups)
    nearest = similarities(queries, keys, config.num_groups).max(1)
    task = TaskKeys(
        means=keys,
        counts=torch.bincount(nearest.indices, minlength=len(keys)),
        scatter=torch.zeros(0, dtype=torch.float32),
        increments=torch.arange(len(keys)),
        scales=_tail(1 - nearest.values),
    )
    return task, _history(losses)


def attract_keys(
    queries: Float[Tensor, "B C"], config: CosineConfig, top_k: int, generator: torch.Generator
) -> tuple[Float[Tensor, "N C"], list[float]]:
    """Learned keys (N, C) float64 and the loss of every step (method section 2a).

    In every batch each row draws the K most similar of the keys that were not masked for it towards itself:
    the loss is the mean of −similarity over the pairs kept. A row keeps at least one key.
    """
    start = start_keys(config.keys_per_task, queries.shape[1], config.num_groups, generator)
    keys = torch.nn.Parameter(start)
    optimizer = torch.optim.AdamW([keys], lr=config.learning_rate, weight_decay=config.weight_decay)
    losses: list[float] = []
    steps_per_epoch = math.ceil(len(queries) / config.batch_size)
    for _ in range(max(config.num_epochs, math.ceil(config.min_steps / steps_per_epoch))):
        order = torch.randperm(len(queries), generator=generator)
        for rows in torch.split(order, config.batch_size):
            similarity = similarities(queries[rows], keys, config.num_groups)
            is_masked = draw_mask(len(rows), len(keys), config.key_mask, generator)
            kept = similarity.masked_fill(is_masked, -math.inf).topk(min(top_k, len(keys)), dim=1).values
            loss = -kept[kept.isfinite()].mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([keys], config.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
    return keys.detach(), losses


def draw_mask(num_rows: int, num_keys: int, share: float, generator: torch.Generator) -> Tensor:
    """(B, N) bool, true with probability ``share``, but never for all keys of a row (*random keys mask*)."""
    draws = torch.rand(num_rows, num_keys, generator=generator, dtype=torch.float64)
    return (draws < share).scatter_(1, draws.argmax(1, keepdim=True), False)


def _tail(distances: Float[Tensor, " B"]) -> Float[Tensor, " S"]:
    """The distances that a share of 1/2 to 1/10,000 of the rows exceeds, evenly in the share's logarithm."""
    exponents = torch.linspace(math.log(_MOST_REFUSED), math.log(_LEAST_REFUSED), NUM_SCALES)
    return torch.quantile(distances, 1 - exponents.double().exp())


def tail_threshold(scales: Sequence[float] | Tensor, false_refusal_rate: float) -> float:
    """The distance that the stated share of a task's own rows exceeds, from the ``scales`` of its keys."""
    span = math.log(_LEAST_REFUSED / _MOST_REFUSED)
    place = math.log(false_refusal_rate / _MOST_REFUSED) / span * (len(scales) - 1)
    low = min(max(math.floor(place), 0), len(scales) - 2)
    return float(scales[low] + (scales[low + 1] - scales[low]) * (place - low))


def _history(losses: list[float]) -> KeyHistory:
    width = max(1, math.ceil(len(losses) / _NUM_POINTS))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return KeyHistory(tuple(sum(part) / len(part) for part in parts), width)


@final
class CosineScorer:
    """The cosine form as a :class:`slm.retrieval.scoring.Scorer`.

    Points are the queries with every slice at unit norm, so |p − k|² = |p|² + G − 2G · similarity, and the
    most similar key is the nearest one.

    Args:
        tasks: keys of each task, as :func:`learn_cosine_keys` gives them.
        num_groups: G.
        false_refusal_rate: share of a task's own rows that may be refused.

    Attributes:
        rounding: above the largest seen (``docs/results/retrieval.md``).
    """

    rounding = 0.15
    penalties: Float[Tensor, " N"] | None = None
    runoff: Runoff | None = None

    def __init__(self, tasks: Sequence[TaskKeys], num_groups: int, false_refusal_rate: float) -> None:
        counts = torch.tensor([task.num_keys for task in tasks])
        limits = [tail_threshold(task.scales, false_refusal_rate) for task in tasks]
        self.tasks = torch.arange(len(tasks)).repeat_interleave(counts)
        self.increments = torch.cat([task.increments for task in tasks])
        self.keys = unit_groups(torch.cat([task.means for task in tasks]), num_groups)
        self.originals = torch.arange(len(self.keys))
        self._num_groups = num_groups
        self._limits = torch.tensor(limits, dtype=torch.float64).repeat_interleave(counts)

    def points(self, queries: Float[Tensor, "B C"]) -> Float[Tensor, "B J"]:
        """Each query with its slices at unit norm, (B, J) float64 with J = C."""
        return unit_groups(queries, self._num_groups)

    def relative_distances(
        self, points: Float[Tensor, "B J"], squared: Float[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        """1 − similarity, float64 in 0..2; it is relative to nothing, the paper's form knows no whole."""
        lengths = (points * points).sum(1, keepdim=True)
        return (squared - lengths + self._num_groups) / (2 * self._num_groups)

    def thresholds(self, keys: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The distance that the stated share of the task's own rows exceeded when it was learned, float64."""
        return self._limits[keys]

    def weigh(self, distances: Float[Tensor, "B M"], temperature: float) -> Float[Tensor, "B M"]:
        """w_n = similarity_n / Σ similarity, the paper's weights, at temperature 1; rows sum to 1.

        The paper leaves open what a negative similarity weighs: here nothing, and where none is positive the
        nearest key has all. Similarities are raised to 1/temperature, so that a smaller one sharpens.
        """
        likeness = (1 - distances).clamp_min(0.0)
        powers = (likeness / likeness.amax(1, keepdim=True).clamp_min(1e-300)) ** (1 / temperature)
        nearest = functional.one_hot(distances.argmin(1), distances.shape[1]).to(powers.dtype)
        powers = torch.where((likeness > 0).any(1, keepdim=True), powers, nearest)
        return powers / powers.sum(1, keepdim=True)

    def share_margins(
        self, distances: Float[Tensor, "B K"], share: float, temperature: float
    ) -> Float[Tensor, "B K"]:
        """|s_n − (share / (1 − share) · Σ_others s^(1/T))^T| of similarities s, those below 0 being 0."""
        likeness = (1 - distances).clamp_min(0.0)
        powers = likeness ** (1 / temperature)
        others = powers.sum(1, keepdim=True) - powers
        return (likeness - (share / (1 - share) * others) ** temperature).abs()
