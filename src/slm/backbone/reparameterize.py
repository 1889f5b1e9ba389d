"""JARe: frozen linear layers that each row bends with its own knowledge (method section 3).

For row b with kept increments k = 1..K and weights w, a re-parameterized layer computes

    y_b = W x_b + bias + Σ_k w_bk · s_k · B_k (A_k x_b)

The sum over k is one product: the K pairs are stacked along the rank, and s_k · w_bk is folded into B.
The (O, I) matrix is never formed. What is gathered is gathered once per request, when the mixture is
bound; decoding steps then reuse it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slm.backbone.targets import LINEAR, num_features
from slm.errors import BackboneError, IncrementError


@runtime_checkable
class Pair(Protocol):
    """What a low-rank pair looks like from here: A (R, I) and B (O, R)."""

    @property
    def A(self) -> Tensor: ...  # noqa: N802, D102
    @property
    def B(self) -> Tensor: ...  # noqa: N802, D102


@runtime_checkable
class LowRank(Protocol):
    """What an increment looks like from here."""

    @property
    def pairs(self) -> Mapping[str, Pair]: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def scale(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which increments each row of a batch uses, and how much of each.

    Attributes:
        increments: the U distinct increments in use.
        slots: (B, K) int64, index into ``increments``; any value where the weight is zero.
        weights: (B, K) float32, w ≥ 0; rows sum to 1, or to 0 when the row abstains.
    """

    increments: Sequence[LowRank]
    slots: Int[Tensor, "B K"]
    weights: Float[Tensor, "B K"]

    @property
    def is_empty(self) -> bool:
        """Whether no row uses any increment."""
        return not self.increments or not bool((self.weights > 0).any())

    @property
    def is_shared(self) -> bool:
        """Whether all rows use the same increments in the same proportion."""
        return bool((self.slots == self.slots[:1]).all() and (self.weights == self.weights[:1]).all())


@runtime_checkable
class Binding(Protocol):
    """The change a layer adds to its output for the batch at hand."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O), in the dtype of ``x``."""
        ...

    def select(self, rows: Tensor) -> Binding:
        """The same for a subset of rows, (B',) int64."""
        ...


@dataclass(frozen=True, slots=True)
class SharedBinding:
    """All rows bend the layer alike: two plain matrix products.

    Attributes:
        down: (I, K·R), the stacked A transposed.
        up: (K·R, O), the stacked s · w · B transposed.
    """

    down: Float[Tensor, "I KR"]
    up: Float[Tensor, "KR O"]

    def __call__(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Σ_k w_k s_k B_k A_k x for every row."""
        return (x @ self.down) @ self.up

    def select(self, rows: Int[Tensor, " b"]) -> SharedBinding:
        """Itself: every row is alike."""
        return self


@dataclass(frozen=True, slots=True)
class RowBinding:
    """Each row bends the layer its own way: two batched matrix products.

    Attributes:
        down: (B, I, K·R).
        up: (B, K·R, O).
    """

    down: Float[Tensor, "B I KR"]
    up: Float[Tensor, "B KR O"]

    def __call__(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """Σ_k w_bk s_k B_k A_k x_b for row b."""
        if x.ndim != 3 or x.shape[0] != self.down.shape[0]:
            raise BackboneError(
                f"a layer got input of shape {tuple(x.shape)} while {self.down.shape[0]} rows are bound: "
                "give one input per row, and select a row as often as it has beams or samples"
            )
        return torch.bmm(torch.bmm(x, self.down), self.up)

    def select(self, rows: Int[Tensor, " b"]) -> RowBinding:
        """The binding of a subset of rows."""
        return RowBinding(self.down[rows], self.up[rows])


class LearningBinding(nn.Module):
    """The increments being learned, U of one task: float32 parameters, computed in the dtype of the input.

    A starts uniform (Kaiming), B at zero, so new increments change nothing (method section 3). The U pairs
    are stacked along the rank: every row's mixture is two plain products with its weights in between.

    Args:
        layer: the frozen layer they change.
        rank: R of each increment.
        scale: s = alpha / rank.
        dropout: on the input of A.
        seed: draws A.
        num_increments: U.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        scale: float,
        dropout: float,
        seed: torch.Generator,
        num_increments: int = 1,
    ) -> None:
        super().__init__()
        num_in, num_out = num_features(layer)
        A = (torch.rand(num_increments * rank, num_in, generator=seed) * 2 - 1) * num_in**-0.5
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(num_out, num_increments * rank))
        self.rank = rank
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self._weights: Tensor | None = None

    def weigh(self, weights: Float[Tensor, "B U"] | None) -> None:
        """Set the mixture of the rows to come; None is weight 1 on every increment, as with a single one."""
        self._weights = None if weights is None else weights.repeat_interleave(self.rank, 1)[:, None]

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The change Σ_u w_bu s · B_u A_u x_b of row b."""
        down = self.dropout(x) @ self.A.to(x.dtype).T
        if self._weights is not None:
            if x.ndim != 3 or len(x) != len(self._weights):
                raise BackboneError(
                    f"a layer got input of shape {tuple(x.shape)}, {len(self._weights)} rows are weighed: "
                    "several increments are learned from whole batches of rows"
                )
            down = down * self._weights.to(x.dtype)
        change: Tensor = down @ (self.B * self.scale).to(x.dtype).T
        return change

    def pairs(self) -> list[tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]]:
        """(A, B) of each increment, detached, in float32 on the CPU."""
        A, B = self.A.detach().float().cpu(), self.B.detach().float().cpu()
        starts = range(0, len(A), self.rank)
        return [(A[i : i + self.rank].clone(), B[:, i : i + self.rank].clone()) for i in starts]

    def select(self, rows: Int[Tensor, " b"]) -> LearningBinding:
        """Itself: every row of a learning batch is of one task."""
        return self


class ReparameterizedLinear(nn.Module):
    """A frozen linear layer plus whatever is bound to it; with nothing bound it is the layer itself.

    Args:
        base: torch's linear layer, weight (O, I), or transformers' Conv1D, weight (I, O), quantised or not.
        dtype: of what goes in and comes out; the weight's where it is not given.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base = base
        self.dtype = dtype or self.weight.dtype
        # In a tuple, so that torch does not take what is bound for a part of the backbone.
        self._bound: tuple[Binding | None] = (None,)

    @property
    def binding(self) -> Binding | None:
        """What is bound at present."""
        return self._bound[0]

    def bind(self, binding: Binding | None) -> None:
        """Bind a change, or None to be the frozen layer again."""
        self._bound = (binding,)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as the layer keeps it, (O, I) or Conv1D's (I, O); some models look at it."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(O,), the frozen bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), whatever the layout of the weight."""
        num_in, num_out = num_features(self.base)
        return num_out, num_in

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """W x + bias, plus the bound change."""
        y: Tensor = self.base(x)
        binding = self._bound[0]
        return y if binding is None else y + binding(x)


class Reparameterizer:
    """Wraps the target layers of one backbone and binds mixtures to them.

    Args:
        model: the backbone.
        targets: names of its layers.
        dtype: of the activations; each weight's own where it is not given.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], dtype: torch.dtype | None = None) -> None:
        self.layers: dict[str, ReparameterizedLinear] = {}
        for name in targets:
            parent = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            base = getattr(parent, leaf)
            if isinstance(base, ReparameterizedLinear):
                wrapped = base
            elif isinstance(base, LINEAR):
                wrapped = ReparameterizedLinear(base, dtype)
                setattr(parent, leaf, wrapped)
            else:
                raise BackboneError(
                    f"module {name} is a {type(base).__name__}, not a linear layer: "
                    "it cannot be re-parameterized"
                )
            self.layers[name] = wrapped

    def bind(self, mixture: Mixture | None) -> None:
        """Bind a mixture to every layer; None or an empty one restores the frozen backbone exactly.

        Raises:
            IncrementError: an increment names a layer that is no target, or does not fit it.
        """
        self.release()
        if mixture is None or mixture.is_empty:
            return
        for increment in mixture.increments:
            unknown = sorted(set(increment.pairs) - set(self.layers))
            if unknown:
                raise IncrementError(
                    f"an increment changes {unknown[0]}, which is not re-parameterized in this backbone: "
                    "it was learned with other targets or another model"
                )
        for name, layer in self.layers.items():
            layer.bind(_gather(name, layer, mixture))

    def bind_each(self, bindings: Mapping[str, Binding]) -> None:
        """Bind one given binding per layer name, as learning does."""
        self.release()
        for name, binding in bindings.items():
            self.layers[name].bind(binding)

    def release(self) -> None:
        """Unbind everything: the backbone is the frozen one again."""
        for layer in self.layers.values():
            layer.bind(None)

    @contextlib.contextmanager
    def selected(self, rows: Int[Tensor, " b"]) -> Iterator[None]:
        """Within the block only these rows of the bound batch are bound, in this order."""
        kept = {name: layer.binding for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.bind(None if layer.binding is None else layer.binding.select(rows))
            yield
        finally:
            for name, layer in self.layers.items():
                layer.bind(kept[name])


def _gather(name: str, layer: ReparameterizedLinear, mixture: Mixture) -> Binding | None:
    """Stack the pairs a layer needs along the rank, with s · w folded into B."""
    if all(name not in increment.pairs for increment in mixture.increments):
        return None
    device, dtype = layer.weight.device, layer.dtype
    num_in, num_out = num_features(layer.base)
    rank = max(increment.rank for increment in mixture.increments)
    downs, ups = [], []
    for increment in mixture.increments:
        pair = increment.pairs.get(name)
        down = torch.zeros(num_in, rank, device=device, dtype=dtype)
        up = torch.zeros(rank, num_out, device=device)
        if pair is not None:
            if pair.A.shape[1] != num_in or pair.B.shape[0] != num_out:
                raise IncrementError(
                    f"increment at {name} maps {pair.A.shape[1]} to {pair.B.shape[0]} features, the layer "
                    f"{num_in} to {num_out}: it belongs to another backbone"
                )
            down[:, : increment.rank] = pair.A.T.to(device, dtype)
            up[: increment.rank] = pair.B.T.to(device, torch.float32) * increment.scale
        downs.append(down)
        ups.append(up)
    slots, weights = mixture.slots.to(device), mixture.weights.to(device, torch.float32)
    if mixture.is_shared:
        slots, weights = slots[:1], weights[:1]
    num_rows = slots.shape[0]
    down = torch.stack(downs)[slots].permute(0, 2, 1, 3).reshape(num_rows, num_in, -1)
    up = (torch.stack(ups)[slots] * weights[:, :, None, None]).reshape(num_rows, -1, num_out).to(dtype)
    return SharedBinding(down[0], up[0]) if mixture.is_shared else RowBinding(down, up)
