"""What is bound to a layer: its changed output, computed in one of five ways.

All give the same sums; which one is taken depends on sizes and the device (``docs/method.md`` section 3).

    folded    the weight with the change in it, formed for the call: many tokens whose rows are alike
    kernel    each row's pairs read where they lie in the bank, one call a layer: few tokens on a CPU
    stacked   the increments in use in one stack for all rows, each row's weights as a mask in between
    gathered  each row's own pairs gathered from the bank, then two batched products
    bags      as the kernel, by embedding bags: one token a row on a CPU without a compiler
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from slm.backbone.bank import Shelf
from slm.backbone.kernel import MAX_RANK, kernel_call, row_kernel
from slm.backbone.quantization import is_quantised
from slm.backbone.targets import LINEAR
from slm.errors import BackboneError

MAX_KERNEL_TOKENS = 32
"""Tokens a row up to which the kernel is the cheapest way where rows differ."""

MAX_KERNEL_ALIKE = 512
"""Tokens of all rows together up to which it is where rows are alike."""

STACKED_EXCESS = 2
"""How many times K·R the rank U·R of the stack may be to be cheaper than gathering."""

FOLDED_EXCESS = 4
"""How often the stacked way must move as many numbers as the weight has, for folding to be cheaper."""

_is_tracing = torch._C._is_tracing  # ``torch.jit.is_tracing`` costs twice as much

_bags_up = torch.ops.aten._embedding_bag_forward_only
# The gradient of embedding bags by their weights is a product with rows chosen by index: A x without a copy.
_bags_down = torch.ops.aten._embedding_bag_per_sample_weights_backward


@runtime_checkable
class Binding(Protocol):
    """The change of one layer's output for the batch at hand."""

    def bend(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output (B, T, O) of a frozen layer for the input x (B, T, I), changed."""
        ...


@final
class Rows:
    """Which increments the rows of a batch use, how much of each, and where they lie in the bank.

    Nothing here depends on what the bank holds besides, nor on which slots were free: the same mixture gives
    the same bits whatever was asked before.

    Args:
        index: (B, K) int64, numbers of the mixture's increments.
        weights: (B, K) float32, the share of each times its increment's scale: w · s.
        places: (U) int64, the slot of each increment.
        rank: R, the largest of the increments'; the bank's may be larger.
    """

    def __init__(
        self,
        index: Int[Tensor, "B K"],
        weights: Float[Tensor, "B K"],
        places: Int[Tensor, " U"],
        rank: int,
    ) -> None:
        self.rank, self.num_rows = rank, len(index)
        self.row_rank = index.shape[1] * rank  # K·R
        self.is_shared = bool((index == index[:1]).all() and (weights == weights[:1]).all())
        if self.is_shared:
            index, weights = index[:1], weights[:1]
        self._index, self._places = index, places
        self.slots, self.weights = places[index].contiguous(), weights.contiguous()
        used = index[0] if self.is_shared else index[weights != 0].unique()  # type: ignore[no-untyped-call]
        self.used: Int[Tensor, " U"] = places[used]
        self.is_stackable = self.is_shared or len(self.used) * rank <= STACKED_EXCESS * self.row_rank
        # What layers have in common is computed once.
        self._spread: dict[torch.dtype, Tensor] = {}
        self._mask: dict[torch.dtype, Tensor] = {}
        self._bags: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def order(self) -> Int[Tensor, " B"]:
        """(B) int64, the rows, those with the same slots one after the other: the kernel reads these once."""
        return torch.tensor(sorted(range(len(self.slots)), key=self.slots.tolist().__getitem__))

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        for name in ("_index", "_places", "slots", "weights", "used"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def select(self, rows: Int[Tensor, " b"]) -> Rows:
        """Some of the rows, in this order."""
        if self.is_shared:
            rows = torch.zeros_like(rows)
        return Rows(self._index[rows], self.weights[rows], self._places, self.rank)

    def spread(self, dtype: torch.dtype) -> Float[Tensor, "B KR"]:
        """Each slot's weight, once for each of its ranks."""
        if dtype not in self._spread:
            self._spread[dtype] = self.weights.repeat_interleave(self.rank, 1).to(dtype)
        return self._spread[dtype]

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "B UR"]:
        """The weights of all slots in use, zero where a row does not use one."""
        if dtype not in self._mask:
            share = (self.slots[:, :, None] == self.used).to(self.weights.dtype) * self.weights[:, :, None]
            self._mask[dtype] = share.sum(1).repeat_interleave(self.rank, 1).to(dtype)
        return self._mask[dtype]

    def bags(self, stride: int) -> tuple[Int[Tensor, " BKR"], Int[Tensor, " B"], Int[Tensor, " BKR"]]:
        """For bags of a shelf's (S·stride, F), int32: what is read, where each bag begins, whose it is."""
        if stride not in self._bags:
            ranks = torch.arange(self.rank, device=self.slots.device)
            index = (self.slots[:, :, None] * stride + ranks).flatten().int()
            owners = torch.arange(len(self.slots), device=index.device, dtype=torch.int32)
            begins = owners * self.row_rank
            self._bags[stride] = index, begins, owners.repeat_interleave(self.row_rank)
        return self._bags[stride]


class _Way(NamedTuple):
    """What was chosen for inputs of some shape.

    Attributes:
        shape: of the input.
        is_folded: whether the changed weight is formed.
        dtype: of the input and the output that the kernel reads and writes.
        call: what the kernel is given beside them; None where it is not taken.
    """

    shape: torch.Size
    is_folded: bool
    dtype: torch.dtype
    call: Any


@final
class RowBinding:
    """The change of one layer, each row with its own mixture.

    Args:
        shelf: the layer's pairs.
        rows: the batch.
    """

    __slots__ = ("_gathered", "_kernel", "_rows", "_shelf", "_stacked", "_way")

    def __init__(self, shelf: Shelf, rows: Rows) -> None:
        self._shelf, self._rows = shelf, rows
        is_small = shelf.device.type == "cpu" and rows.row_rank <= MAX_RANK
        self._kernel: Any = row_kernel(shelf.dtype, shelf.down.dtype) if is_small else None
        self._way: _Way | None = None
        self._stacked: tuple[Tensor, Tensor] | None = None
        self._gathered: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Rows) -> RowBinding:
        """The same layer for other rows."""
        return RowBinding(self._shelf, rows)

    def bend(self, layer: nn.Module, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """W x + bias + Σ_k w_bk s_k B_k A_k x_b for row b.

        Raises:
            BackboneError: rows differ, and x is not one input a row.
        """
        is_plain = (
            torch.compiler.is_compiling()
            or _is_tracing()
            or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and x.requires_grad)
        )
        if is_plain:  # only the ways that can be compiled, traced and differentiated will do
            self._check_rows(x)
            return self._add(layer(x), x, is_plain)
        way = self._way
        if way is None or way.shape != x.shape:
            way = self._way = self._choose(layer, x)
        if way.is_folded:
            return self._fold(layer, x)
        y: Tensor = layer(x)
        is_flat = x.is_contiguous() and y.is_contiguous()
        if way.call is None or not is_flat or not x.dtype == y.dtype == way.dtype:
            return self._add(y, x, is_plain)
        self._kernel(x.data_ptr(), y.data_ptr(), way.call)
        return y

    def _check_rows(self, x: Tensor) -> None:
        rows = self._rows
        if not rows.is_shared and (x.ndim != 3 or x.shape[0] != rows.num_rows):
            raise BackboneError(
                f"a layer got input of shape {tuple(x.shape)} while {rows.num_rows} rows are bound: "
                "give one input per row, and select a row as often as it has beams or samples"
            )

    def _choose(self, layer: nn.Module, x: Tensor) -> _Way:
        """What is cheapest for inputs of this shape; layers get the same shape step after step."""
        self._check_rows(x)
        is_folded = self._rows.is_shared and self._is_fold_cheap(layer, x)
        return _Way(x.shape, is_folded, self._shelf.dtype, None if is_folded else self._kernel_call(x))

    def _kernel_call(self, x: Tensor) -> Any:
        """What the kernel is given beside x and y; None where it is not the cheapest way."""
        rows, down, up = self._rows, self._shelf.down, self._shelf.up
        num_rows, num_slots = rows.slots.shape
        num_tokens = x.numel() // (num_rows * x.shape[-1])
        if self._kernel is None or num_tokens > (MAX_KERNEL_ALIKE if rows.is_shared else MAX_KERNEL_TOKENS):
            return None
        sizes = num_rows, num_tokens, num_slots, rows.rank, down.shape[1], down.shape[2], up.shape[2]
        return kernel_call((down, up, rows.slots, rows.weights, rows.order), sizes)

    def _add(self, y: Tensor, x: Tensor, is_plain: bool) -> Tensor:
        """The output y, which may be written to, plus the change, by products of torch's own."""
        if self._rows.is_stackable:
            return self._add_stacked(y, x)
        is_small = not is_plain and x.shape[1] == 1 and x.device.type == "cpu"
        if is_small and self._shelf.down.dtype == x.dtype:
            return self._add_bags(y, x)
        return self._add_gathered(y, x)

    def _is_fold_cheap(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether forming the changed weight is the cheapest way, and loses nothing.

        In a weight of 8 or 11 bits a change below half a bit vanishes, so only float32 ones are folded into.
        """
        num_in, num_out = self._shelf.num_in, self._shelf.num_out
        num_moved = x.numel() // num_in * (num_in + 2 * num_out)  # x is read, y is read and written
        if num_moved < FOLDED_EXCESS * num_in * num_out or type(layer) not in LINEAR:
            return False
        weight: Tensor = layer.weight  # type: ignore[assignment]
        is_wide = weight.dtype == x.dtype == self._shelf.dtype == torch.float32
        return is_wide and not is_quantised(weight)

    def _fold(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One product with W + Σ_k w_k s_k B_k A_k."""
        if torch.is_autocast_enabled(x.device.type):  # the sum would be rounded to few bits
            return self._add(layer(x), x, False)
        down, up = self._stack()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if isinstance(layer, Conv1D):
            changed = torch.addmm(weight, down.T, up)
            return torch.addmm(layer.bias, x.flatten(0, -2), changed).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, torch.addmm(weight, up.T, down), layer.bias)  # type: ignore[arg-type]

    def _stack(self) -> tuple[Tensor, Tensor]:
        """(U·R, I) and (U·R, O) of the increments in use; weighed where rows are alike."""
        rows = self._rows
        if self._stacked is None:
            down, up = (half.flatten(0, 1) for half in self._pick(rows.used))
            if rows.is_shared:
                up = (up * rows.spread(torch.float32)[0, :, None]).to(up.dtype)
            self._stacked = down, up
        return self._stacked

    def _add_stacked(self, y: Tensor, x: Tensor) -> Tensor:
        """Two plain products with all increments in use."""
        rows = self._rows
        down, up = self._stack()
        half = nn.functional.linear(x, down)
        if not rows.is_shared:
            half = half * rows.mask(half.dtype)[:, None]
        half, up = half.to(y.dtype), up.to(y.dtype)  # autocast gives products another dtype than x has
        return y.flatten(0, -2).addmm_(half.flatten(0, -2), up).view(y.shape)

    def _add_gathered(self, y: Tensor, x: Tensor) -> Tensor:
        """Two batched products with each row's own pairs."""
        rows = self._rows
        down, up = self._gathered or (
            half.view(rows.num_rows, rows.row_rank, -1) for half in self._pick(rows.slots.flatten())
        )
        if x.device.type != "cpu":
            self._gathered = down, up  # decoding steps come this way too
        half = torch.bmm(x, down.transpose(1, 2))
        half = half * rows.spread(half.dtype)[:, None]
        return y.baddbmm_(half.to(y.dtype), up.to(y.dtype))

    def _add_bags(self, y: Tensor, x: Tensor) -> Tensor:
        """Embedding bags over the bank."""
        down, up = (half.flatten(0, 1) for half in (self._shelf.down, self._shelf.up))
        index, begins, owners = self._rows.bags(self._shelf.down.shape[1])
        half = _bags_down(x[:, 0], down, index, begins, owners, 0, -1)
        half = half.to(x.dtype) * self._rows.spread(x.dtype).flatten()
        change = _bags_up(up, index, begins, False, 0, False, half, False, -1)[0]
        return y.add_(change[:, None])

    def _pick(self, slots: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """(n, R, I) and (n, R, O) of some slots in the dtype of the activations, without room beyond R."""
        halves = (half[:, : self._rows.rank] for half in (self._shelf.down, self._shelf.up))
        down, up = (half.index_select(0, slots).to(self._shelf.dtype) for half in halves)
        return down, up
