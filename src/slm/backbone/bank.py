"""The bank: the low-rank pairs in use, stacked layer by layer in the layout they are read in.

Every increment in use has one slot, the same in all layers. A batch says which slots its rows use; nothing
is copied per row. Pairs are kept in the dtype of the activations; beside float32 ones, float16 pairs stay
float16 where the row kernel can read them: the same values, half the memory to pass through. What a request
leaves behind stays for the next one: asking the same tasks again binds without copying, and the tensors keep
their addresses and shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor, nn

from slm.backbone.kernel import row_kernel
from slm.backbone.targets import num_features
from slm.errors import CrowdedError, IncrementError

_T = TypeVar("_T")

KEPT_BYTES = 512 << 20
"""A bank larger than this is let go while nothing is asked."""

SPARE_ROOM = 2
"""How many times what the largest request needed may be held, so that requests can take turns in it."""

MAX_FILLED_BYTES = 2 << 30
"""Zeros that may fill up what increments of one request do not have, ranks and layers, in bytes."""


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


@final
class Shelf:
    """One layer's pairs, slot by slot.

    Attributes:
        down: (S, R, I), A of each slot; empty until an increment in use changes the layer.
        up: (S, R, O), B of each slot, transposed.

    Args:
        name: of the layer.
        layer: the frozen layer.
        dtype: of the activations, where the weight's own says nothing of them (it is quantised).
    """

    def __init__(self, name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.num_in, self.num_out = num_features(layer)
        self._weight: Tensor = layer.weight  # type: ignore[assignment]
        self._dtype = dtype
        self.down, self.up = self._zeros(0, 0, self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._dtype or self._weight.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(half.numel() * half.element_size() for half in (self.down, self.up))

    def reserve(self, num_slots: int, rank: int, is_float16: bool) -> None:
        """Make room, all zero, unless it is there; in float16 if so wanted and the row kernel reads it."""
        if not len(self.down):
            has_kernel = self.device.type == "cpu" and row_kernel(self.dtype, torch.float16) is not None
            dtype = torch.float16 if is_float16 and has_kernel else self.dtype
            self.down, self.up = self._zeros(num_slots, rank, dtype)

    def write(self, slots: Sequence[int], increments: Sequence[LowRank]) -> None:
        """Put the pairs of n increments into n slots; one without a pair for this layer becomes zero.

        Raises:
            IncrementError: a pair does not fit the layer.
        """
        pairs = [increment.pairs.get(self.name) for increment in increments]
        for pair in pairs:
            if pair is not None and (pair.A.shape[1], pair.B.shape[0]) != (self.num_in, self.num_out):
                raise IncrementError(
                    f"increment at {self.name} maps {pair.A.shape[1]} to {pair.B.shape[0]} features, the "
                    f"layer {self.num_in} to {self.num_out}: it belongs to another backbone"
                )
        rank = self.down.shape[1]
        nothing = torch.zeros(rank, max(self.num_in, self.num_out), dtype=self.down.dtype)
        downs = [nothing[:, : self.num_in] if pair is None else pair.A for pair in pairs]
        ups = [nothing[:, : self.num_out].T if pair is None else pair.B for pair in pairs]
        down = torch.stack([_fill(half, (0, 0, 0, rank - len(half))).to(self.down) for half in downs])
        up = torch.stack([_fill(half, (0, rank - half.shape[1])).to(self.up) for half in ups])
        _put(self.down, slots, down)
        _put(self.up, slots, up.transpose(1, 2))

    def _zeros(self, num_slots: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(S, R, I) and (S, R, O)."""
        options: dict[str, Any] = {"device": self.device, "dtype": dtype}
        sizes = (self.num_in, self.num_out)
        down, up = (torch.zeros(num_slots, rank, size, **options) for size in sizes)
        return down, up


def _fill(half: Tensor, missing: tuple[int, ...]) -> Tensor:
    """Zeros for ranks that an increment does not have."""
    return nn.functional.pad(half, missing) if any(missing) else half


def _put(target: Tensor, slots: Sequence[int], values: Tensor) -> None:
    """Write (n, ...) into n slots."""
    first, last = slots[0], slots[-1]
    if list(slots) == list(range(first, last + 1)):  # one pass instead of two
        target[first : last + 1].copy_(values)
    else:
        target.index_copy_(0, torch.tensor(slots, device=target.device), values)


@final
class Bank:
    """Slots for the increments in use, in every layer.

    Args:
        layers: frozen linear layers by name.
        dtype: of the activations; each weight's own where it is not given.
    """

    def __init__(self, layers: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> None:
        self._layers, self._dtype = layers, dtype
        self.clear()

    def clear(self) -> None:
        """Let everything go."""
        self.shelves = {name: Shelf(name, layer, self._dtype) for name, layer in self._layers.items()}
        self._kept: list[weakref.ref[LowRank] | None] = []
        self.rank = self._most_ranks = 0  # S·R of the largest request
        self._is_float16 = True

    @property
    def num_slots(self) -> int:
        """S, the slots there are."""
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(shelf.size_bytes for shelf in self.shelves.values())

    def trim(self) -> None:
        """Let everything go when it is large."""
        if self.size_bytes > KEPT_BYTES:
            self.clear()

    @torch.inference_mode(False)  # what is kept must serve learning and other requests too
    @torch.no_grad()
    def load(self, increments: Sequence[LowRank]) -> list[int]:
        """The slot of each of some increments; those that have none are written.

        Raises:
            IncrementError: an increment does not fit a layer; the bank is empty then.
            CrowdedError: they differ so much in rank or layers that they would be filled up with more than
                :data:`MAX_FILLED_BYTES` of zeros.
        """
        wanted = {id(increment): increment for increment in increments}
        rank = max(increment.rank for increment in increments)
        alive = self._alive()
        # Those that are there were looked at when they came.
        new = [increment for key, increment in wanted.items() if key not in alive]
        is_widened = self._is_float16 and not all(map(_is_float16, new))
        is_small = len(wanted) > self.num_slots or rank > self.rank
        if is_small or is_widened or self._has_wasteful_layers(new):
            self._make_room(list(wanted.values()), rank)
            alive = {}
        slots = {key: alive[key] for key in wanted if key in alive}
        free = self._free(set(slots.values()))
        added = {key: next(free) for key in wanted if key not in slots}
        if added:
            self._write([wanted[key] for key in added], list(added.values()))
        slots |= added
        return [slots[id(increment)] for increment in increments]

    def fits(self, increments: Sequence[LowRank]) -> bool:
        """Whether one batch can use all of these distinct increments."""
        sorts = {(increment.rank, frozenset(increment.pairs)) for increment in increments}
        if len(sorts) < 2:
            return True
        rank = max(increment.rank for increment in increments)
        return self._filled_bytes(increments, len(increments), rank) <= MAX_FILLED_BYTES

    def _make_room(self, increments: Sequence[LowRank], rank: int) -> None:
        """Empty slots for what one request wants, or for what is there as well where that is little more.

        Raises:
            CrowdedError: there would be too many zeros.
        """
        self._check_filled(increments, rank)
        # Powers of two, so that few shapes are ever seen.
        num_slots = 1 << (len(increments) - 1).bit_length()
        if self._filled_bytes(increments, num_slots, rank) > MAX_FILLED_BYTES:
            num_slots = len(increments)
        most_ranks = max(self._most_ranks, num_slots * rank)
        joint = max(num_slots, self.num_slots), max(rank, self.rank)
        is_little_more = joint[0] * joint[1] <= SPARE_ROOM * most_ranks
        if is_little_more and self._filled_bytes(increments, *joint) <= MAX_FILLED_BYTES:
            num_slots, rank = joint
        self.clear()
        self._kept, self.rank, self._most_ranks = [None] * num_slots, rank, most_ranks
        self._is_float16 = all(map(_is_float16, increments))

    def _check_filled(self, increments: Sequence[LowRank], rank: int) -> None:
        """Refuse more zeros than are allowed, before room is made for them."""
        size = self._filled_bytes(increments, len(increments), rank)
        if size > MAX_FILLED_BYTES:
            ranks = min(increment.rank for increment in increments)
            layers = min(len(increment.pairs) for increment in increments)
            raise CrowdedError(
                f"an increment of rank {rank} in one batch with {len(increments) - 1} others, of ranks from "
                f"{ranks} and layers from {layers} on, would take {size / 2**30:.1f} GiB of zeros, "
                f"{MAX_FILLED_BYTES / 2**30:.1f} are allowed: ask its task by itself, or learn or import it "
                "with a rank and layers like theirs"
            )

    def _filled_bytes(
        self, increments: Sequence[LowRank], num_slots: int, rank: int, names: Collection[str] | None = None
    ) -> int:
        """Bytes of zeros in so much room for increments, in all layers that they change or in these."""
        num_ranks: dict[str, int] = {}
        for increment in increments:
            for name in self.shelves.keys() & increment.pairs.keys() if names is None else names:
                held = increment.rank if name in increment.pairs else 0
                num_ranks[name] = num_ranks.get(name, 0) + held
        return sum(
            (num_slots * rank - held) * (shelf.num_in + shelf.num_out) * shelf.dtype.itemsize
            for shelf, held in ((self.shelves[name], held) for name, held in num_ranks.items())
        )

    def _has_wasteful_layers(self, new: Sequence[LowRank]) -> bool:
        """Whether layers that only new increments change would hold too many zeros in the room there is."""
        names = {name for increment in new for name in self.shelves.keys() & increment.pairs.keys()}
        names = {name for name in names if not len(self.shelves[name].down)}
        return self._filled_bytes(new, self.num_slots, self.rank, names) > MAX_FILLED_BYTES

    def _alive(self) -> dict[int, int]:
        """The slot of each increment that is there, by its id."""
        return {id(found): slot for slot, kept in enumerate(self._kept) if kept and (found := kept())}

    def _free(self, used: set[int]) -> Iterator[int]:
        """Slots that may be written, those whose increment is gone first."""

        def is_alive(slot: int) -> bool:
            kept = self._kept[slot]
            return kept is not None and kept() is not None

        return iter(sorted((slot for slot in range(self.num_slots) if slot not in used), key=is_alive))

    def _write(self, increments: Sequence[LowRank], slots: Sequence[int]) -> None:
        changed = {name for increment in increments for name in increment.pairs}
        try:
            for name, shelf in self.shelves.items():
                if name in changed:
                    shelf.reserve(self.num_slots, self.rank, self._is_float16)
                if len(shelf.down):
                    shelf.write(slots, increments)
        except BaseException:
            self.clear()
            raise
        for slot, increment in zip(slots, increments, strict=True):
            self._kept[slot] = _reference(increment)


def in_parts(rows: Sequence[int], act: Callable[[Sequence[int]], Sequence[_T]]) -> list[_T]:
    """What ``act`` gives for some rows, in their order; asked in halves where they crowd the bank.

    Raises:
        CrowdedError: a row by itself does.
    """
    try:
        return list(act(rows))
    except CrowdedError:
        if len(rows) == 1:
            raise
    half = len(rows) // 2
    return [*in_parts(rows[:half], act), *in_parts(rows[half:], act)]


def _is_float16(increment: LowRank) -> bool:
    """Whether all of its pairs are float16."""
    return all(half.dtype == torch.float16 for pair in increment.pairs.values() for half in (pair.A, pair.B))


def _reference(increment: LowRank) -> weakref.ref[LowRank] | None:
    """A way to see later that it is this very increment; None where its class has none."""
    try:
        return weakref.ref(increment)
    except TypeError:
        return None
