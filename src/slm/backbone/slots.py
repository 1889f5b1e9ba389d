"""Writing many rows at once, each at its own place: rows come and go between two steps.

A row of a causal backbone that was prefilled gets a slot of a key-value cache; the rows in use are always the
first slots, so a step reads a plain slice. Admitting a row copies that row alone; a row that leaves is
replaced by the last. A decoder that counts positions by itself cannot have rows at different places in one
pass (:mod:`slm.backbone.trial`): there every row keeps a cache of its own, and a step is one pass a row.
"""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from slm.backbone.backbone import Backbone
from slm.backbone.decode import Prefill, _masks, cache_of, encoder_output

_FEWEST_SLOTS, _FEWEST_TOKENS = 8, 64


class Writing(Protocol):
    """The rows that are being written by one backbone; hold its lock during every call."""

    def __len__(self) -> int: ...

    def admit(self, start: Prefill, row: int) -> None:
        """Take over a row of a prefill behind the rows there are."""
        ...

    def remove(self, slot: int) -> None:
        """Let a row go; the last one takes its slot."""
        ...

    def clear(self) -> None:
        """Let everything go."""
        ...

    def step(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        """Logits of each row's next token after it was given one; bind the rows' mixtures before.

        Args:
            tokens: (n,) one for each row in use, in the order of the slots.
        """
        ...


def slots_of(backbone: Backbone) -> Writing:
    """No rows yet, of a backbone that writes."""
    return ApartSlots(backbone) if backbone.is_reading_apart else Slots(backbone)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, (S, heads, length, channels); a step writes one token a row."""

    is_sliding = False

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Make room, keeping what is there."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(num_slots, old.shape[1], num_tokens, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, at, width = self._places.rows, self._places.at, self._places.width
        self.keys[rows, :, at] = key_states[:, :, 0]
        self.values[rows, :, at] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._places.width, 0

    def get_seq_length(self) -> int:
        return self._places.width - 1

    def get_max_length(self) -> int:
        return -1


@final
class _Places:
    """Where the step at hand writes: slots, columns, and how many columns are in use after it."""

    rows: Tensor
    at: Tensor
    width = 1


@final
class Slots:
    """The rows that are being written by one causal backbone.

    Args:
        backbone: causal; hold its lock during every call.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._places = _Places()
        self._layers: list[_Layer] = []
        self._lengths: list[int] = []
        self._num_slots = self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        halves = [half for layer in self._layers for half in (layer.keys, layer.values)]
        return sum(half.numel() * half.element_size() for half in halves)

    def admit(self, start: Prefill, row: int) -> None:
        """Copy a row of a prefill behind the rows there are."""
        layers = start.cache.layers
        if not self._layers:
            self._layers = [_Layer(self._places) for _ in layers]
            for own, layer in zip(self._layers, layers, strict=True):
                own.lazy_initialization(layer.keys, layer.values)
        length, slot = int(start.batch.mask[row].sum()), len(self._lengths)
        self._reserve(slot + 1, length + 1)
        for own, layer in zip(self._layers, layers, strict=True):
            # Prompts are padded on the left.
            own.keys[slot, :, :length] = layer.keys[row, :, -length:]
            own.values[slot, :, :length] = layer.values[row, :, -length:]
        self._lengths.append(length)

    def remove(self, slot: int) -> None:
        """Let a row go; the last one takes its slot."""
        last = len(self._lengths) - 1
        if slot != last:
            length = self._lengths[last]
            for layer in self._layers:
                layer.keys[slot, :, :length] = layer.keys[last, :, :length]
                layer.values[slot, :, :length] = layer.values[last, :, :length]
            self._lengths[slot] = length
        self._lengths.pop()
        if not self._lengths:
            self._trim()

    def clear(self) -> None:
        """Let everything go."""
        self._layers, self._lengths, self._num_slots, self._num_tokens = [], [], 0, 0

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        """Logits of each row's next token after it was given one; bind the rows' mixtures before.

        Args:
            tokens: (n,) one for each row in use, in the order of the slots.
        """
        backbone, places = self._backbone, self._places
        device = backbone.device
        self._reserve(len(self), max(self._lengths) + 1)
        at = torch.tensor(self._lengths, device=device)
        places.rows, places.at, places.width = (
            torch.arange(len(at), device=device),
            at,
            max(self._lengths) + 1,
        )
        columns = torch.arange(places.width, device=device)
        sees = (columns <= at[:, None])[:, None]
        output = backbone.model(
            input_ids=tokens.to(device)[:, None],
            attention_mask=_masks(backbone, sees, at[:, None], columns.expand(len(at), -1)),
            position_ids=at[:, None],
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
        )
        self._lengths = [length + 1 for length in self._lengths]
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _reserve(self, num_slots: int, num_tokens: int) -> None:
        if num_slots <= self._num_slots and num_tokens <= self._num_tokens:
            return
        if num_slots > self._num_slots:
            self._num_slots = max(_FEWEST_SLOTS, num_slots, 2 * self._num_slots)
        if num_tokens > self._num_tokens:
            wanted = max(_FEWEST_TOKENS, num_tokens, self._num_tokens * 3 // 2)
            self._num_tokens = min(wanted, max(self._backbone.window, num_tokens))
        for layer in self._layers:
            layer.reserve(self._num_slots, self._num_tokens)

    def _trim(self) -> None:
        """Nobody writes: give back what a burst took."""
        if self.size_bytes > 1 << 28:
            self.clear()


@final
class ApartSlots:
    """The rows that are being written by one backbone, each with a cache of its own.

    Args:
        backbone: hold its lock during every call.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._rows: list[tuple[dict[str, Any], Any]] = []  # what the encoder made of the prompt, and cache

    def __len__(self) -> int:
        return len(self._rows)

    def admit(self, start: Prefill, row: int) -> None:
        """Copy a row of a prefill behind the rows there are."""
        own = torch.tensor([row], device=self._backbone.device)
        cache, mask = cache_of(start, own), start.batch.mask[own].long()
        if start.memory is not None:
            given = {"encoder_outputs": encoder_output(start, own), "attention_mask": mask}
        else:
            given = {}
            for layer in cache.layers:  # prompts are padded on the left
                layer.keys, layer.values = (x[:, :, -int(mask.sum()) :] for x in (layer.keys, layer.values))
        self._rows.append((given, cache))

    def remove(self, slot: int) -> None:
        """Let a row go; the last one takes its slot."""
        last = self._rows.pop()
        if slot < len(self._rows):
            self._rows[slot] = last

    def clear(self) -> None:
        """Let everything go."""
        self._rows = []

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        """Logits of each row's next token after it was given one; bind the rows' mixtures before.

        Args:
            tokens: (n,) one for each row in use, in the order of the slots.
        """
        found, tokens = [], tokens.to(self._backbone.device)
        for slot, (given, cache) in enumerate(self._rows):
            token = tokens[slot : slot + 1, None]
            if given:
                further = {"decoder_input_ids": token}
            else:
                further = {"input_ids": token, "position_ids": torch.full_like(token, cache.get_seq_length())}
            with self._backbone.reparameterizer.selected(torch.tensor([slot])):
                output = self._backbone.model(**given, **further, past_key_values=cache, use_cache=True)
            found.append(output.logits[:, -1])
        return torch.cat(found)
