"""Frozen feature extraction: which layers give the query, and the sentence encoder that may replace them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slm.config import RetrievalConfig
from slm.errors import BackboneError, ConfigError

DEEP = 16
"""From this many layers on the query is read inside the one forward pass."""


def settle_reading(config: RetrievalConfig, num_layers: int) -> RetrievalConfig:
    """The same settings with pooling and layers decided, so that a store says what its queries are.

    Raises:
        ConfigError: a configured layer does not exist.
    """
    pooling = config.pooling or ("ends" if num_layers >= DEEP else "split-ends")
    config = replace(config, pooling=pooling)
    return replace(config, layers=query_layers(config, num_layers))


def query_layers(config: RetrievalConfig, num_layers: int) -> tuple[int, ...]:
    """Layers whose hidden states make the query, lowest first (method section 2c).

    The defaults were measured (``docs/results/retrieval.md``): a shallow backbone spends a frozen pass and
    reads a half and five sixths of its depth, and a sixth too where means are all it reads; a deep one reads
    a fifteenth and a fifth, so that the rest can bend.

    Raises:
        ConfigError: a configured layer does not exist.
    """
    if config.layers is not None:
        if max(config.layers) > num_layers:
            raise ConfigError(
                f"layers has {max(config.layers)}, the backbone has {num_layers} layers: lower it"
            )
        return tuple(sorted(set(config.layers)))
    if num_layers >= DEEP:
        if config.pooling in ("ends", None):
            return (max(1, round(num_layers / 15)), round(num_layers / 5))
        last = max(2, round(num_layers / 7.5))
        return (last // 2, last)
    parts = (1, 3, 5) if config.pooling == "mean" else (3, 5)
    return tuple(sorted({max(1, round(num_layers * part / 6)) for part in parts}))


def query_parts(config: RetrievalConfig, num_layers: int) -> tuple[tuple[int, str], ...]:
    """What is read and how it is pooled: (layer, pooling) of every part of the query, in order.

    ``pooling: mean`` concatenates the mean of the words after each layer. ``pooling: ends`` adds the last
    word and the first ones after the last layer, everything as signed square roots of unit norm: where a
    text begins and ends tells tasks apart that share their vocabulary. ``pooling: split-ends`` reads the
    first words after the first layer.

    Raises:
        ConfigError: a configured layer does not exist.
    """
    config = settle_reading(config, num_layers)
    layers = config.layers or ()
    if config.pooling == "mean":
        return tuple((layer, "mean") for layer in layers)
    means = tuple((layer, "even-mean") for layer in layers)
    first = layers[0] if config.pooling == "split-ends" else layers[-1]
    return (*means, (layers[-1], "last"), (first, "first"))


def num_passes(config: RetrievalConfig, num_layers: int) -> int:
    """1 when the query is read inside the forward pass, 2 when a frozen pass precedes it."""
    if config.num_passes is not None:
        return config.num_passes
    return 1 if num_layers >= DEEP else 2


def first_bent_block(config: RetrievalConfig, num_layers: int) -> int:
    """The first block that may carry increments: those that make the query stay frozen in a single pass.

    Raises:
        ConfigError: nothing would be left to bend.
    """
    if config.extractor == "sentence" or num_passes(config, num_layers) == 2:
        return 0
    first = max(query_layers(config, num_layers))
    if first >= num_layers:
        raise ConfigError(
            f"the query is read after layer {first} of {num_layers} in one pass, which leaves nothing to "
            "bend: lower layers or set num_passes to 2"
        )
    return first


class SentenceExtractor:
    """A frozen sentence-transformers encoder as extractor.

    Args:
        path: folder or hub id of the encoder.
        device: where it runs.

    Raises:
        BackboneError: the package or the model is missing.
    """

    def __init__(self, path: str, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise BackboneError(
                "the sentence extractor needs sentence-transformers: pip install 'scalable-lm[sentence]'"
            ) from error
        try:
            self._model: Any = SentenceTransformer(path, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            raise BackboneError(
                f"sentence model {path!r} cannot be loaded ({' '.join(str(error).split())[:160]}): "
                "give a folder or hub id of a sentence-transformers model"
            ) from error

    @property
    def num_channels(self) -> int:
        """C, of a query."""
        return int(self([""]).shape[1])

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "B C"]:
        """Queries (B, C) float32 of some texts."""
        queries = self._model.encode(
            list(texts), convert_to_tensor=True, show_progress_bar=False, batch_size=max(1, len(texts))
        )
        return torch.as_tensor(queries, dtype=torch.float32).cpu().clone()
