"""A plane through the space of DTKR's points: its axes, the keys' regions in it, and how far they reach.

Both forms of DTKR decide by the nearest key among points (N, J) (:class:`slm.retrieval.scoring.Scorer`).
What is drawn is an orthogonal projection of those very points, so distances on paper are never longer than
the real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.retrieval.cosine import CosineScorer
from slm.retrieval.index import all_distances, nearest
from slm.retrieval.scoring import GaussianScorer, Scorer

Place = tuple[float, float]
Polygon = tuple[Place, ...]

_SAME = 1e-6
"""Distance between points below which keys do not differ in a direction."""
_SHARPNESS = 160.0
"""How much closer than the median pair of keys a pair must be to count: see :func:`_tell_apart`."""
_NUM_PAIRED = 200
"""Keys whose pairs choose the axes; of more, evenly many of all."""
_FAR = 50.0
"""How far regions go on beyond the keys, in widths of their outline."""
_FAR_OUT = 1e6
"""Where bands end that have no end."""
_NUM_CORNERS = 72
"""Corners of an outline."""


@dataclass(frozen=True, slots=True)
class Plane:
    """At most two directions of the space in which queries and keys lie.

    Attributes:
        origin: (J,) float64, the mean of the keys.
        axes: (J, A) float64, orthonormal, A of 0 to 2; no more than the keys differ in.
        num_directions: in how many directions the keys differ.
        drawn_share: Σ |projected|² / Σ |whole|² over the differences between keys of different tasks, or of
            all keys of one task; 1 where the keys do not differ.
    """

    origin: Float[Tensor, " J"]
    axes: Float[Tensor, "J A"]
    num_directions: int
    drawn_share: float

    def places(self, points: Float[Tensor, "B J"]) -> Float[Tensor, "B A"]:
        """Where points are drawn, (B, A) float64."""
        return (points - self.origin) @ self.axes


def choose_plane(keys: Float[Tensor, "N J"], owners: Int[Tensor, " N"]) -> Plane:
    """The plane in which keys of different tasks are best told apart, from the keys alone.

    Where the keys differ in two directions or fewer, nothing is lost. Otherwise the axes V minimise

        log Σ exp(−|Vᵀ (k_i − k_j)|² / c)    over pairs of keys of different tasks,

    with c the median |k_i − k_j|² over 160. In the gaussian form, where rows scatter around their key with
    unit covariance, exp(−d²/8) bounds how often two keys are confused (Bhattacharyya), so near pairs count
    and pairs already far apart do not, which the axes of largest variance would serve first.

    Args:
        keys: (N, J) float64, key points, N ≥ 1.
        owners: (N,) int64, the task of each key.
    """
    origin = keys.mean(0)
    _, lengths, directions = torch.linalg.svd(keys - origin, full_matrices=False)
    basis = directions[lengths > _SAME].T
    inside = (keys - origin) @ basis
    differences = _differences(inside, owners)
    inner = torch.eye(basis.shape[1], dtype=keys.dtype)[:, :2]
    if basis.shape[1] > 2:
        inner = _upright(_tell_apart(differences), inside)
    axes = basis @ inner
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True)) if len(axes.T) else axes[:1]
    whole = float((differences**2).sum())
    drawn = float(((differences @ inner) ** 2).sum())
    return Plane(origin, axes * largest.sign(), basis.shape[1], drawn / whole if whole else 1.0)


def _differences(keys: Tensor, owners: Tensor) -> Tensor:
    """Differences of keys of different tasks, or of all keys where they are of one task, (P, J) float64."""
    step = math.ceil(len(keys) / _NUM_PAIRED)
    keys, owners = keys[::step], owners[::step]
    first, second = torch.triu_indices(len(keys), len(keys), 1).unbind(0)
    is_other = owners[first] != owners[second]
    if is_other.any():
        first, second = first[is_other], second[is_other]
    return keys[first] - keys[second]


def _tell_apart(differences: Tensor) -> Tensor:
    """Orthonormal (J, 2) that minimises the overlap of :func:`choose_plane`, the best of several starts.

    A start is two of the first three directions of the pairs' spread, pairs weighed by a power of 1/d²: the
    more alike keys are, the more they count.
    """
    squared = (differences**2).sum(1)
    scale = max(float(squared.median()) / _SHARPNESS, _SAME**2)
    found = []
    for power in (0, 1, 2):
        weights = squared.clamp_min(scale) ** -power
        spread = (differences * weights[:, None]).T @ differences
        directions = torch.linalg.eigh(spread).eigenvectors.flip(1)
        found += [
            _descend(differences, directions[:, pair].contiguous(), scale)
            for pair in ([0, 1], [0, 2], [1, 2])
        ]
    return min(found, key=lambda item: item[0])[1]


def _descend(differences: Tensor, start: Tensor, scale: float) -> tuple[float, Tensor]:
    """The overlap of the axes that are found from a start, and the axes."""
    axes = start.clone().requires_grad_()

    def overlap() -> Tensor:
        drawn = differences @ torch.linalg.qr(axes)[0]
        return torch.logsumexp(-(drawn**2).sum(1) / scale, 0)

    def step() -> Tensor:
        axes.grad = None
        loss = overlap()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        torch.optim.LBFGS([axes], max_iter=50, line_search_fn="strong_wolfe").step(step)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        reached = float(overlap())
    if not math.isfinite(reached):
        axes, reached = start, math.inf
    return reached, torch.linalg.qr(axes.detach())[0]


def _upright(axes: Tensor, keys: Tensor) -> Tensor:
    """The same plane, turned so that the keys spread most along its first axis."""
    turn: Tensor = torch.linalg.svd(keys @ axes, full_matrices=False)[2].T
    return axes @ turn


def nearest_keys(places: Float[Tensor, "B A"], keys: Float[Tensor, "N A"]) -> Int[Tensor, " B"]:
    """The key nearest on paper, (B,) int64; of equally near ones the one of smaller number."""
    return nearest(all_distances(places, keys), 1)[1][:, 0]


def regions(
    keys: Float[Tensor, "N 2"], owners: Int[Tensor, " N"]
) -> tuple[dict[int, list[Polygon]], list[Polygon]]:
    """Where each task has the nearest key on paper.

    Args:
        keys: (N, 2) float64, places.
        owners: (N,) int64, the task of each key.

    Returns:
        Task -> the cells of its keys; and the lines between cells of different tasks.
    """
    from scipy.spatial import Voronoi

    points, first = np.unique(keys.numpy(), axis=0, return_index=True)
    middle, width = points.mean(0), float(np.ptp(points, axis=0).max()) or 1.0
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    fence = 2 * _FAR * np.stack([np.cos(turns), np.sin(turns)], 1)  # closes the outer cells
    diagram = Voronoi(np.concatenate([(points - middle) / width, fence]))
    found: dict[int, list[Polygon]] = {}
    for number, cell in zip(first.tolist(), diagram.point_region[: len(points)], strict=True):
        corners = diagram.regions[cell]
        if corners and -1 not in corners:
            outline = diagram.vertices[corners] * width + middle
            found.setdefault(int(owners[number]), []).append(tuple(map(tuple, outline.tolist())))
    own = owners[first].tolist()
    borders = [
        tuple(map(tuple, (diagram.vertices[ends] * width + middle).tolist()))
        for (one, other), ends in zip(diagram.ridge_points, diagram.ridge_vertices, strict=True)
        if max(one, other) < len(own) and own[one] != own[other] and -1 not in ends
    ]
    return found, borders


def bands(
    keys: Float[Tensor, " N"], owners: Int[Tensor, " N"], top: float
) -> tuple[dict[int, list[Polygon]], list[Polygon]]:
    """:func:`regions` of keys on one line, as bands up to a height.

    Args:
        keys: (N,) float64, places on the line.
        owners: (N,) int64, the task of each key.
        top: where the bands end; infinite where they do not.
    """
    line, first = np.unique(keys.numpy(), return_index=True)
    far = _FAR_OUT * (float(np.ptp(line)) or 1.0)
    middles: list[float] = ((line[1:] + line[:-1]) / 2).tolist()
    ends = [float(line[0]) - far, *middles, float(line[-1]) + far]
    low, high = -_FAR_OUT, min(top, _FAR_OUT)
    found: dict[int, list[Polygon]] = {}
    for number, (left, right) in zip(first.tolist(), pairwise(ends), strict=True):
        box = ((left, low), (right, low), (right, high), (left, high))
        found.setdefault(int(owners[number]), []).append(box)
    own = owners[first].tolist()
    borders: list[Polygon] = [
        ((x, low), (x, high)) for x, (one, other) in zip(middles, pairwise(own), strict=True) if one != other
    ]
    return found, borders


def reaches(scorer: Scorer, plane: Plane) -> list[tuple[int, Polygon]]:
    """Task and outline for each key outside which a query is farther than the key's threshold.

    The queries that a key does not refuse fill an ellipsoid Σ_j a_j (y_j − c_j)² ≤ R around it; the outline
    is its shadow on the plane. With relative distances r = |y − k|² − Σ_j shares_j y_j² it has
    a = 1 − shares, c = k / a, R = h + Σ_j k_j² shares_j / a_j; with 1 − similarity it is a ball of
    R = 2 G h around the key.

    Args:
        scorer: of the store.
        plane: two axes.
    """
    keys, limits = scorer.keys, scorer.thresholds(torch.arange(len(scorer.keys)))
    if scorer.penalties is not None:  # a prior is in distance and threshold alike, and cancels
        keys, limits = keys[:, :-1], limits - scorer.penalties
    shares = torch.zeros(keys.shape[1], dtype=keys.dtype)
    sizes = limits
    if isinstance(scorer, GaussianScorer):
        shares = scorer.space.shares
    elif isinstance(scorer, CosineScorer):
        sizes = 2 * (keys**2).sum(1) * limits  # |k|² = G
    a = 1 - shares
    sizes = sizes + (keys**2 * shares / a).sum(1)
    axes = plane.axes[: len(a)]
    root = torch.linalg.cholesky(axes.T @ (axes / a[:, None]))
    centres = torch.nn.functional.pad(
        keys / a, (0, len(plane.axes) - len(a))
    )  # queries are zero in a prior's
    turns = torch.linspace(0, 2 * math.pi, _NUM_CORNERS, dtype=keys.dtype)
    circle = torch.stack([turns.cos(), turns.sin()], 1) @ root.T
    found = []
    for task, centre, size in zip(scorer.tasks.tolist(), plane.places(centres), sizes.tolist(), strict=True):
        if 0 < size < math.inf:
            found.append((task, tuple(map(tuple, (centre + math.sqrt(size) * circle).tolist()))))
    return found
