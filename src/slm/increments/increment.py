"""Increment: one low-rank change of a frozen backbone's linear layers (JARe, method section 3)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from slm.errors import IncrementError


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """The pair (A, B) of one linear layer: ΔW = s · B A, with s kept by the increment.

    Attributes:
        A: (R, I), maps the layer's input down to the rank.
        B: (O, R), maps the rank up to the layer's output; zero at birth.
    """

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise IncrementError(
                f"a low-rank pair needs A (R, I) and B (O, R), got {tuple(self.A.shape)} "
                f"and {tuple(self.B.shape)}: the file does not hold one increment"
            )

    @property
    def rank(self) -> int:
        """R, the rank of the pair."""
        return self.A.shape[0]


class _Referable:
    """So that what keeps a copy of an increment can tell whether it is still this very one."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True)
class Increment(_Referable):
    """Low-rank pairs by module name, and the scale s = alpha / rank they share.

    Attributes:
        pairs: module name inside the backbone -> its pair, in a stable order.
        rank: R, the same for every pair.
        alpha: numerator of the scale, as in PEFT's ``lora_alpha``.
    """

    pairs: Mapping[str, LowRankPair]
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise IncrementError(f"rank must be at least 1, got {self.rank}: use a positive rank")
        for name, pair in self.pairs.items():
            if pair.rank != self.rank:
                raise IncrementError(
                    f"increment of rank {self.rank} holds a pair of rank {pair.rank} at {name}: "
                    "every pair of one increment has the same rank"
                )
        self._refuse_infinite()
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))

    def _refuse_infinite(self) -> None:
        if not self.pairs:
            return
        # One answer for all pairs: on a GPU every question waits for the device.
        found = [torch.isfinite(t).all() for pair in self.pairs.values() for t in (pair.A, pair.B)]
        are_finite = torch.stack(found).view(-1, 2).all(1)
        if not bool(are_finite.all()):
            name = list(self.pairs)[are_finite.tolist().index(False)]
            raise IncrementError(f"increment holds NaN or infinity at {name}: it cannot be used")

    @property
    def scale(self) -> float:
        """The factor s = alpha / rank of method section 3."""
        return self.alpha / self.rank

    @property
    def size_bytes(self) -> int:
        """Bytes held by the tensors of all pairs."""
        return sum(t.numel() * t.element_size() for p in self.pairs.values() for t in (p.A, p.B))

    def in_float16(self) -> Increment:
        """The same with every value rounded to float16; as it is where one is too large for that.

        Reading the pairs is what mixed rows cost, and at 11 bits what rounding changes is far below what one
        more step of learning would.
        """
        limit = torch.finfo(torch.float16).max
        if any(float(t.abs().max()) > limit for p in self.pairs.values() for t in (p.A, p.B)):
            return self
        return Increment(
            {n: LowRankPair(p.A.half(), p.B.half()) for n, p in self.pairs.items()}, self.rank, self.alpha
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Increment:
        """The same increment on another device or in another dtype."""
        pairs = {n: LowRankPair(p.A.to(device, dtype), p.B.to(device, dtype)) for n, p in self.pairs.items()}
        if dtype is not None:  # a narrower one may overflow
            return Increment(pairs, self.rank, self.alpha)
        moved = copy.copy(self)  # moving changes no value: nothing to check, no waiting for the device
        object.__setattr__(moved, "pairs", MappingProxyType(pairs))
        return moved


def unify(pairs: Mapping[str, LowRankPair], scales: Mapping[str, float]) -> Increment:
    """One increment out of pairs with ranks and scales of their own: each layer keeps its s · B A.

    Smaller ranks are filled up with zeros, which change nothing; a scale that is not the most common one
    is folded into its B, rounded once to float32.

    Args:
        pairs: layer name -> pair, at least one.
        scales: layer name -> the factor s of its pair.
    """
    rank = max(pair.rank for pair in pairs.values())
    scale = Counter(s for s in scales.values() if s != 0).most_common(1)
    common = scale[0][0] if scale else 1.0
    unified = {name: _scaled(pair, scales[name] / common, rank) for name, pair in pairs.items()}
    return Increment(unified, rank, common * rank)


def concatenate(increments: Sequence[Increment], weights: Sequence[float]) -> Increment:
    """The fixed mixture Σ_k w_k · s_k · B_k A_k as one increment of rank Σ_k R_k (method section 3).

    The pairs of a layer are stacked along the rank and w_k · s_k is folded into B_k, in float32, so the
    scale of the result is 1. A single increment of weight 1 is returned as it is.

    Args:
        increments: K increments, of any ranks and layers.
        weights: K weights.
    """
    if len(increments) == 1 and weights[0] == 1:
        return increments[0]
    names = sorted({name for increment in increments for name in increment.pairs})
    rank = sum(increment.rank for increment in increments)
    pairs = {}
    for name in names:
        some = next(increment.pairs[name] for increment in increments if name in increment.pairs)
        downs, ups = [], []
        for increment, weight in zip(increments, weights, strict=True):
            nothing = LowRankPair(
                some.A.new_zeros(increment.rank, some.A.shape[1]),
                some.B.new_zeros(some.B.shape[0], increment.rank),
            )
            pair = _scaled(increment.pairs.get(name, nothing), weight * increment.scale, increment.rank)
            downs.append(pair.A.float())
            ups.append(pair.B.float())
        pairs[name] = LowRankPair(torch.cat(downs), torch.cat(ups, dim=1))
    return Increment(pairs, rank, float(rank))


def lower_rank(increment: Increment, rank: int) -> Increment:
    """The increment of at most this rank nearest to one in every layer, by singular values; scale 1.

    The (O, I) matrix is never formed: with B = Q_b R_b and Aᵀ = Q_a R_a, only s · R_b R_aᵀ is decomposed.
    Both halves get the square roots of the singular values. What has no higher rank is returned as it is.

    Args:
        increment: of rank R.
        rank: the largest rank wanted.
    """
    if increment.rank <= rank:
        return increment
    pairs = {}
    for name, pair in increment.pairs.items():
        left, up = torch.linalg.qr(pair.B.double())
        right, down = torch.linalg.qr(pair.A.double().T)
        u, values, v = torch.linalg.svd(up @ down.T * increment.scale)
        kept = min(rank, len(values))
        roots = values[:kept].sqrt()
        A, B = (roots[:, None] * v[:kept]) @ right.T, left @ (u[:, :kept] * roots)
        pairs[name] = _scaled(LowRankPair(A.float().contiguous(), B.float().contiguous()), 1.0, rank)
    return Increment(pairs, rank, float(rank))


def _scaled(pair: LowRankPair, factor: float, rank: int) -> LowRankPair:
    """The pair with ``factor`` folded into B and filled up with zeros to ``rank``."""
    B = pair.B if factor == 1 else (pair.B.double() * factor).float()
    missing = rank - pair.rank
    if not missing:
        return LowRankPair(pair.A, B)
    A = torch.cat([pair.A, pair.A.new_zeros(missing, pair.A.shape[1])])
    return LowRankPair(A, torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1))
