"""JARe: frozen linear layers that each row bends with its own knowledge (method section 3).

For row b with kept increments k = 1..K and weights w, a re-parameterized layer computes

    y_b = W x_b + bias + Σ_k w_bk · s_k · B_k (A_k x_b)

No row has an (O, I) matrix of its own. The pairs in use lie stacked in a bank (:mod:`slm.backbone.bank`); how
the sum is computed depends on sizes (:mod:`slm.backbone.bindings`). A mixture is bound once per request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slm.backbone.bank import Bank, LowRank
from slm.backbone.bindings import Binding, RowBinding, Rows
from slm.backbone.targets import LINEAR, num_features
from slm.errors import BackboneError, IncrementError


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
        return nn.functional.linear(self._half(x), self.B.to(x.dtype)) * self.scale

    def bend(self, layer: nn.Module, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The layer's output for the input x, changed."""
        return self.add(layer(x), x)

    def add(self, y: Float[Tensor, "... O"], x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The output y plus the change for the input x."""
        half = self._half(x).flatten(0, -2)
        bent = torch.addmm(y.flatten(0, -2), half, self.B.to(x.dtype).T, alpha=self.scale)
        return bent.view(y.shape)

    def _half(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... UR"]:
        half = nn.functional.linear(self.dropout(x), self.A.to(x.dtype))
        if self._weights is None:
            return half
        if x.ndim != 3 or len(x) != len(self._weights):
            raise BackboneError(
                f"a layer got input of shape {tuple(x.shape)}, {len(self._weights)} rows are weighed: "
                "several increments are learned from whole batches of rows"
            )
        return half * self._weights.to(x.dtype)

    def pairs(self) -> list[tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]]:
        """(A, B) of each increment, detached, in float32 on the CPU."""
        A, B = self.A.detach().float().cpu(), self.B.detach().float().cpu()
        starts = range(0, len(A), self.rank)
        return [(A[i : i + self.rank].clone(), B[:, i : i + self.rank].clone()) for i in starts]


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
        binding = self._bound[0]
        y: Tensor = self.base(x) if binding is None else binding.bend(self.base, x)
        return y


class Reparameterizer:
    """Wraps the target layers of one backbone and binds mixtures to them.

    Args:
        model: the frozen model.
        targets: names of linear layers.
        dtype: of the activations; each weight's own where it is not given.

    Raises:
        BackboneError: a target is no linear layer.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], dtype: torch.dtype | None = None) -> None:
        self.layers = {name: _wrap(model, name, dtype) for name in targets}
        self.bank = Bank({name: layer.base for name, layer in self.layers.items()}, dtype)
        self._rows: Rows | None = None

    def bind(self, mixture: Mixture | None) -> None:
        """Bind a mixture to every layer; None or an empty one restores the frozen backbone exactly.

        Raises:
            IncrementError: an increment names a layer that is no target, or does not fit it.
            CrowdedError: the increments differ too much to be used in one batch.
        """
        self.release()
        if mixture is None or mixture.is_empty:
            return
        names = {name for increment in mixture.increments for name in increment.pairs}
        if unknown := sorted(names - set(self.layers)):
            raise IncrementError(
                f"an increment changes {unknown[0]}, which is not re-parameterized in this backbone: "
                "it was learned with other targets or another model"
            )
        slots = mixture.slots.masked_fill(mixture.weights == 0, 0)
        places = torch.tensor(self.bank.load(mixture.increments), device=mixture.slots.device)
        rank = max(increment.rank for increment in mixture.increments)
        scales = torch.tensor([increment.scale for increment in mixture.increments])
        weights = mixture.weights.float() * scales.to(mixture.weights.device)[slots]
        device = next(iter(self.layers.values())).weight.device
        self._rows = Rows(slots, weights, places, rank).to(device)
        for name in names:
            self.layers[name].bind(RowBinding(self.bank.shelves[name], self._rows))

    def bind_each(self, bindings: Mapping[str, Binding]) -> None:
        """Bind one given binding per layer name, as learning does."""
        self.release()
        for name, binding in bindings.items():
            self.layers[name].bind(binding)

    def release(self) -> None:
        """Unbind everything: the backbone is the frozen one again."""
        for layer in self.layers.values():
            layer.bind(None)
        self._rows = None

    def rest(self) -> None:
        """Unbind everything, and let a large bank go: nothing is asked for a while."""
        self.release()
        self.bank.trim()

    @contextlib.contextmanager
    def selected(self, rows: Int[Tensor, " b"]) -> Iterator[None]:
        """Within the block only these rows of the bound batch are bound, in this order."""
        whole, kept = self._rows, {name: layer.binding for name, layer in self.layers.items()}
        try:
            if whole is not None:
                self._rows = whole.select(rows)
                for name, layer in self.layers.items():
                    if isinstance(binding := kept[name], RowBinding):
                        layer.bind(binding.select(self._rows))
            yield
        finally:
            self._rows = whole
            for name, layer in self.layers.items():
                layer.bind(kept[name])


def _wrap(model: nn.Module, name: str, dtype: torch.dtype | None) -> ReparameterizedLinear:
    """The wrapped layer of a name, wrapped now unless it is already."""
    parent = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    base = getattr(parent, leaf)
    if isinstance(base, ReparameterizedLinear):
        return base
    if not isinstance(base, LINEAR):
        raise BackboneError(
            f"module {name} is a {type(base).__name__}, not a linear layer: it cannot be re-parameterized"
        )
    wrapped = ReparameterizedLinear(base, dtype)
    setattr(parent, leaf, wrapped)
    return wrapped
