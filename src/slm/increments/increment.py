"""Increment: one low-rank change of a frozen backbone's linear layers (JARe, method section 3)."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Increment:
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
            if not (torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
                raise IncrementError(f"increment holds NaN or infinity at {name}: it cannot be used")
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))

    @property
    def scale(self) -> float:
        """The factor s = alpha / rank of method section 3."""
        return self.alpha / self.rank

    @property
    def size_bytes(self) -> int:
        """Bytes held by the tensors of all pairs."""
        return sum(t.numel() * t.element_size() for p in self.pairs.values() for t in (p.A, p.B))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Increment:
        """The same increment on another device or in another dtype."""
        pairs = {n: LowRankPair(p.A.to(device, dtype), p.B.to(device, dtype)) for n, p in self.pairs.items()}
        return Increment(pairs, self.rank, self.alpha)
