"""Keys of one task: what DTKR remembers of it, and their closed form (method section 2b).

The gaussian form keeps counts, means and one scatter: sums over the task's queries, from which no example
can be read back. They are rounded once, when the task is learned, and from then on every sum over tasks
starts from these same stored numbers, so the result cannot depend on the order of arrival and what
``forget`` takes away is exactly what ``learn`` added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.errors import DataError

LoadScatter = Callable[[int], Tensor]
"""Gives the packed scatter, (P,) float32, of a task by its number."""

NUM_SCALES = 33
"""How many quantiles of τ a task keeps."""

MIN_ROWS = 8
"""Fewest rows of a key that a distance to it is learned from, and on average of keys found by k-means."""

NUM_PARTS = 3
"""Into how many parts a task's rows are split to see how far rows unlike the learned ones lie."""


@dataclass(frozen=True, slots=True)
class TaskKeys:
    """Keys and statistics of one task.

    Attributes:
        means: (N_t, C) float64, mean query μ_n of each of the task's keys; in the cosine form the learned
            keys, every group of channels at unit norm.
        counts: (N_t,) int64, training rows behind each key, or nearest to it in the cosine form.
        scatter: (C·(C+1)/2,) float32, upper triangle of the within-key scatter
            Σ_n Σ_{q of key n} (q − μ_n)(q − μ_n)ᵀ, row by row; (0,) in the cosine form, which needs none.
        increments: (N_t,) int64, which of the task's increments each key owns.
        scales: (33,) float64, quantiles 0, 1/32, ..., 1 of τ, the squared distance of the task's own rows
            to a key learned from rows unlike them, divided by ``radius``: how much longer or shorter than
            typical its queries scatter. Abstention draws its tails from it (method section 2d). In the cosine
            form the distances to the nearest own key that a share of 1/2 to 1/10,000 of the task's own rows
            exceeds.
        radius: mean squared leave-one-out Mahalanobis distance of the task's rows to their key, under
            the task's own covariance; decides while the store holds one task only. Infinite in the cosine
            form.
    """

    means: Float[Tensor, "N C"]
    counts: Int[Tensor, " N"]
    scatter: Float[Tensor, " P"]
    increments: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    scales: Float[Tensor, " S"] = field(default_factory=lambda: torch.ones(NUM_SCALES, dtype=torch.float64))
    radius: float = float("inf")

    @property
    def num_keys(self) -> int:
        """N_t, the number of keys."""
        return self.means.shape[0]

    @property
    def num_channels(self) -> int:
        """C, the channels of a key."""
        return self.means.shape[1]


def learn_keys(queries: Float[Tensor, "B C"], assignments: Int[Tensor, " B"]) -> TaskKeys:
    """Keys and statistics of one task from its queries, in closed form (method section 2b).

    Args:
        queries: (B, C), one per training row.
        assignments: (B,) int64, the key of each row, 0..N_t-1, every key with at least one row.

    Raises:
        DataError: a query is not finite.
    """
    check_finite(queries)
    x = queries.to(torch.float64)
    counts = torch.bincount(assignments)
    means = torch.zeros(len(counts), x.shape[1], dtype=torch.float64).index_add_(0, assignments, x)
    means /= counts[:, None]
    centred = x - means[assignments]
    scatter = centred.T @ centred
    distances = leave_one_out_distances(centred, scatter, counts[assignments])
    radius = float(distances.mean())
    tau = left_part_out_distances(x, assignments, distances) / max(radius, 1e-300)
    return TaskKeys(
        means=means,
        counts=counts,
        scatter=pack(scatter).to(torch.float32),
        increments=torch.zeros(len(counts), dtype=torch.long),
        scales=torch.quantile(tau, torch.linspace(0, 1, NUM_SCALES, dtype=torch.float64)),
        radius=radius,
    )


def check_finite(queries: Float[Tensor, "B C"]) -> None:
    """Refuse queries that hold NaN or infinity.

    Raises:
        DataError: names the first such row.
    """
    is_finite = torch.isfinite(queries).all(1)
    if not is_finite.all():
        row = int((~is_finite).nonzero()[0])
        raise DataError(
            f"the query of training row {row + 1} is not finite: the backbone overflows on this text"
        )


def leave_one_out_distances(
    centred: Float[Tensor, "B C"], scatter: Float[Tensor, "C C"], counts: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Squared Mahalanobis distance of each row to its key, as if the row had not been seen.

    With u = q − μ of a key of n rows and g = uᵀ Σ⁻¹ u, taking the row out scales u by a = n/(n−1) and
    takes a·(1−ρ)/N · u uᵀ out of Σ, so by Sherman-Morrison the distance is a² g / (1 − a (1−ρ) g / N).

    Args:
        centred: (B, C) float64, rows minus their key.
        scatter: (C, C) float64, within-key scatter of these rows.
        counts: (B,) int64, rows of each row's key.
    """
    num_rows = centred.shape[0]
    covariance, rho = shrink(scatter / num_rows, float(num_rows))
    g = (centred * torch.linalg.solve(covariance, centred.T).T).sum(1)
    n = counts.to(torch.float64).clamp_min(2.0)
    a = n / (n - 1)
    distances: Tensor = a * a * g / (1 - a * (1 - rho) * g / num_rows).clamp_min(1e-2)
    return distances


def left_part_out_distances(
    queries: Float[Tensor, "B C"], assignments: Int[Tensor, " B"], fallback: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Squared distance of each row to its key, both learned from the other parts of the task alone.

    A task's later requests are not a random draw from the rows it was taught: they come from other
    documents, other days. Rows are therefore split into parts that resemble themselves (k-means), and each
    part is measured against keys and a covariance of the others.

    Args:
        queries: (B, C) float64.
        assignments: (B,) int64, the key of each row.
        fallback: (B,) float64, leave-one-out distances, for rows whose others are too few to learn from.
    """
    parts, distances = cluster(queries, NUM_PARTS, seed=0), fallback.clone()
    for part in range(int(parts.max()) + 1):
        is_out = parts == part
        rest, rest_keys = queries[~is_out], assignments[~is_out]
        counts = torch.bincount(rest_keys, minlength=int(assignments.max()) + 1)
        is_out &= counts[assignments] >= MIN_ROWS
        if not is_out.any():
            continue
        means = torch.zeros(len(counts), queries.shape[1], dtype=queries.dtype)
        means = means.index_add_(0, rest_keys, rest) / counts.clamp_min(1)[:, None]
        centred = rest - means[rest_keys]
        covariance, _ = shrink(centred.T @ centred / len(rest), float(len(rest)))
        out = queries[is_out] - means[assignments[is_out]]
        distances[is_out] = (out * torch.linalg.solve(covariance, out.T).T).sum(1)
    return distances


def shrink(covariance: Float[Tensor, "C C"], num_rows: float) -> tuple[Float[Tensor, "C C"], float]:
    """Shrink a covariance towards its mean diagonal with the oracle-approximating weight (OAS).

    Chen, Wiesel, Eldar and Hero (2010), "Shrinkage algorithms for MMSE covariance estimation", eq. 23.

    Args:
        covariance: (C, C) float64.
        num_rows: rows it was estimated from.

    Returns:
        (1 − ρ) Σ + ρ tr(Σ)/C · I, and ρ. A covariance of zero (identical rows) becomes a tiny multiple
        of I, so it can always be inverted.
    """
    num_channels = covariance.shape[0]
    trace = covariance.trace()
    square = (covariance * covariance).sum()
    numerator = (1 - 2 / num_channels) * square + trace**2
    denominator = (num_rows + 1 - 2 / num_channels) * (square - trace**2 / num_channels)
    rho = 1.0 if denominator <= 0 else min(1.0, max(float(numerator / denominator), 1e-6))
    target = (trace / num_channels).clamp_min(1e-12)
    eye = torch.eye(num_channels, dtype=covariance.dtype)
    return (1 - rho) * covariance + rho * target * eye, rho


def pack(matrix: Float[Tensor, "C C"]) -> Float[Tensor, " P"]:
    """Upper triangle of a symmetric matrix, row by row, P = C·(C+1)/2."""
    rows, columns = torch.triu_indices(*matrix.shape).unbind(0)
    return matrix[rows, columns]


def unpack(packed: Float[Tensor, " P"], num_channels: int) -> Float[Tensor, "C C"]:
    """Inverse of :func:`pack`, in float64."""
    matrix = torch.zeros(num_channels, num_channels, dtype=torch.float64)
    rows = torch.split(packed.to(torch.float64), list(range(num_channels, 0, -1)))
    for row, values in enumerate(rows):
        matrix[row, row:] = values
        matrix[row + 1 :, row] = values[1:]
    return matrix


def cluster(queries: Float[Tensor, "B C"], num_keys: int, seed: int) -> Int[Tensor, " B"]:
    """Assign rows to ``num_keys`` clusters by k-means, (B,) int64; deterministic for a seed."""
    from sklearn.cluster import KMeans

    num_keys = min(num_keys, len(torch.unique(queries, dim=0)))
    if num_keys == 1:
        return torch.zeros(len(queries), dtype=torch.long)
    labels = KMeans(num_keys, n_init=4, random_state=seed).fit_predict(queries.to(torch.float64).numpy())
    dense: Tensor = torch.unique(torch.from_numpy(labels).long(), return_inverse=True)[1]
    return dense


def join_single(assignments: Int[Tensor, " B"], rows: Sequence[int]) -> Int[Tensor, " B"]:
    """The key of each row, (B,) int64, where keys of a single row have become one, the last.

    Such a key has no scatter, and nothing else would tell how far its requests lie.

    Args:
        assignments: (B,) int64, the key of each row before, 0..N_t-1.
        rows: those that count.
    """
    counts = torch.bincount(assignments[list(rows)], minlength=int(assignments.max()) + 1)
    joined = torch.where(counts > 1, torch.arange(len(counts)), len(counts))
    dense: Tensor = torch.unique(joined[assignments], return_inverse=True)[1]
    return dense


def most_keys(num_keys: int, num_rows: int) -> int:
    """N_t ≤ ``num_keys``, so that keys have :data:`MIN_ROWS` rows on average; a single key may have fewer."""
    return max(1, min(num_keys, num_rows // MIN_ROWS))
