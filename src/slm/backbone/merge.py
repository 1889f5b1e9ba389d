"""Merging: one increment baked into the weights, W + s · B A, and taken out again to the bit.

A merged backbone computes at the speed of the frozen one and knows nothing else. Adding and subtracting
would not give the frozen weights back, so they are kept; merging takes their memory a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from slm.backbone.bank import LowRank, Pair
from slm.backbone.quantization import is_quantised
from slm.backbone.reparameterize import ReparameterizedLinear
from slm.errors import BackboneError, IncrementError

if TYPE_CHECKING:
    from slm.backbone.backbone import Backbone


@final
class Merge:
    """Weights with one increment baked in. The frozen weights are kept aside, untouched.

    Args:
        layers: the re-parameterized layers by name.
        increment: what is baked in.

    Raises:
        IncrementError: the increment names another layer, or does not fit one.
        BackboneError: a layer's weights cannot be merged into (they are quantised, or shared).
    """

    def __init__(self, layers: Mapping[str, ReparameterizedLinear], increment: LowRank) -> None:
        self._layers = layers
        self._frozen: dict[str, Tensor] = {}
        _check(layers, increment)
        try:
            for name, pair in increment.pairs.items():
                weight = layers[name].weight
                frozen = weight.data
                weight.data = _merged(layers[name].base, pair, increment.scale)
                self._frozen[name] = frozen
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the frozen weights back: the very tensors that were there before."""
        while self._frozen:
            name, frozen = self._frozen.popitem()
            self._layers[name].weight.data = frozen


def merge(backbone: Backbone, increment: LowRank) -> Merge:
    """Bake an increment into a backbone; hold its lock.

    Raises:
        BackboneError: something is merged already, or a layer cannot be merged into.
        IncrementError: the increment does not fit.
    """
    if backbone.merged is not None:
        raise BackboneError(
            f"backbone {backbone.source!r} has knowledge merged into its weights already: unmerge it first"
        )
    backbone.reparameterizer.release()
    backbone.merged = Merge(backbone.reparameterizer.layers, increment)
    return backbone.merged


def unmerge(backbone: Backbone) -> None:
    """Make a backbone the frozen one again, to the bit; nothing happens when it is that."""
    if backbone.merged is not None:
        backbone.merged.undo()
        backbone.merged = None


def save_merged(backbone: Backbone, increment: LowRank, folder: Path) -> None:
    """Write a backbone with an increment baked in as an ordinary transformers folder, tokenizer included.

    Args:
        backbone: frozen, and again so afterwards; hold its lock.
        increment: what is baked in.
        folder: an empty folder.

    Raises:
        BackboneError: a layer cannot be merged into, or no weights were written.
    """
    merge(backbone, increment)
    try:
        with _unwrapped(backbone.model, backbone.reparameterizer.layers), _without_bar():
            backbone.model.save_pretrained(folder)
        if not any(folder.glob("model*.safetensors")):
            raise BackboneError(
                f"transformers wrote no weights of backbone {backbone.source!r} into {folder}: load the "
                "backbone from a folder of plain weights and export again"
            )
        backbone.renderer.tokenizer.save_pretrained(folder)
    finally:
        unmerge(backbone)


@contextlib.contextmanager
def _unwrapped(model: nn.Module, layers: Mapping[str, ReparameterizedLinear]) -> Iterator[None]:
    """Within the block the model is made of its own layers again, under their own names."""
    try:
        for name, layer in layers.items():
            _put(model, name, layer.base)
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer)


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Within the block transformers shows no bar of its own."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _check(layers: Mapping[str, ReparameterizedLinear], increment: LowRank) -> None:
    weights = {name: layer.weight for name, layer in layers.items()}
    names_of: dict[int, list[str]] = {}
    for name, weight in weights.items():
        names_of.setdefault(id(weight), []).append(name)
    for name, pair in increment.pairs.items():
        if name not in layers:
            raise IncrementError(
                f"an increment changes {name}, which is not re-parameterized in this backbone: "
                "it was learned with other targets or another model"
            )
        weight = weights[name]
        if is_quantised(weight):
            raise BackboneError(
                f"{name} holds quantised weights, into which nothing can be merged exactly: "
                "set backbone.quantization to 'none'"
            )
        others = [other for other in names_of[id(weight)] if other != name]
        if others:
            raise BackboneError(
                f"{name} shares its weights with {others[0]}, so merging would change both: "
                "ask without merging"
            )
        fitting = layers[name].shape
        if fitting != (pair.B.shape[0], pair.A.shape[1]):
            raise IncrementError(
                f"increment at {name} maps {pair.A.shape[1]} to {pair.B.shape[0]} features, the layer "
                f"{fitting[1]} to {fitting[0]}: it belongs to another backbone"
            )


@torch.no_grad()
def _merged(layer: nn.Module, pair: Pair, scale: float) -> Tensor:
    """W + s · B A in the weight's own layout and dtype; rounded once from float32."""
    weight: Tensor = layer.weight.data  # type: ignore[assignment]
    wide = torch.promote_types(weight.dtype, torch.float32)
    up, down = (half.to(weight.device, wide) for half in (pair.B, pair.A))
    return (weight.to(wide) + _oriented(layer, up @ down * scale)).to(weight.dtype).contiguous()


def _oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """(O, I) from a layer's own layout and back: GPT-2's Conv1D keeps (I, O), everybody else (O, I)."""
    return matrix.T if type(layer).__name__ == "Conv1D" else matrix
