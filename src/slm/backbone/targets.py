"""Which linear layers of a backbone are re-parameterized: found by running it, not by a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slm.errors import BackboneError

LINEAR = (nn.Linear, Conv1D)
"""What can be re-parameterized: torch's layer, weight (O, I), and GPT-2's, weight (I, O)."""


def num_features(layer: nn.Module) -> tuple[int, int]:
    """I and O of a linear layer, whichever way round it keeps its weight."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of transformer blocks: the longest outermost list of modules of one class, with its name.

    Raises:
        BackboneError: the model has no such list.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = [
        (name, stack)
        for name, stack in lists.items()
        if not any(name.startswith(f"{outer}.") for outer in lists)
        and len({type(block) for block in stack}) == 1
        and any(isinstance(module, LINEAR) for module in stack.modules())
    ]
    if not stacks:
        raise BackboneError(
            f"{type(model).__name__} has no stack of equal blocks with linear layers: slm cannot "
            "re-parameterize it, use a transformer"
        )
    return max(stacks, key=lambda item: len(item[1]))


def find_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The stacks of blocks in forward order: one, or a sequence-to-sequence model's encoder and decoder.

    Raises:
        BackboneError: a part of the model has no stack.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return [find_blocks(model)]
    names = {id(module): name for name, module in model.named_modules()}
    stacks = []
    for part in (model.get_encoder(), model.get_decoder()):  # type: ignore[operator]
        name, stack = find_blocks(part)
        stacks.append((f"{names[id(part)]}.{name}", stack))
    return stacks


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A layer of a block that holds a weight matrix.

    Attributes:
        name: path inside the backbone.
        block: number of its block from 0, counted through encoder and decoder.
        is_attention_output: whether it is the last linear layer that runs in an attention of its block.
        is_shared: whether it also reads something that all rows share, as DeBERTa's query and key layers
            read relative positions: rows cannot bend it apart, so it stays frozen.
        obstacle: why it cannot be re-parameterized; empty where it can.
    """

    name: str
    block: int
    is_attention_output: bool = False
    is_shared: bool = False
    obstacle: str = ""

    @property
    def is_bendable(self) -> bool:
        """Whether it can be re-parameterized row by row."""
        return not self.is_shared and not self.obstacle


def find_linear(model: nn.Module, probe: Mapping[str, Tensor]) -> list[LinearLayer]:
    """Every layer of every block that holds a weight matrix, block by block.

    One forward pass shows which layers run, in which order, and whether each is given one input per row.

    Args:
        model: the frozen model.
        probe: keyword arguments of a forward pass over at least two rows.

    Raises:
        BackboneError: the model has no blocks, or cannot be run on token ids.
    """
    stacks = find_stacks(model)
    calls = _watch(model, stacks, probe)
    num_rows = len(probe["input_ids"])
    blocks = [(f"{name}.{i}", block) for name, stack in stacks for i, block in enumerate(stack)]
    layers: list[LinearLayer] = []
    for number, (prefix, block) in enumerate(blocks):
        holders = dict(_matrix_holders(prefix, block))
        outputs = _attention_outputs(prefix, [name for name in calls if name in holders])
        for name, module in holders.items():
            shapes = calls.get(name, [])
            is_shared = any(shape[0] == 1 and len(shape) == 3 for shape in shapes)
            obstacle = "" if is_shared else _obstacle(module, shapes, num_rows)
            layers.append(LinearLayer(name, number, name in outputs, is_shared, obstacle))
    return layers


def _matrix_holders(prefix: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a block with a weight of two axes or more; embeddings are tables, not maps."""
    for path, module in block.named_modules(prefix=prefix):
        weights = module.parameters(recurse=False)
        if isinstance(module, LINEAR) or (
            not isinstance(module, nn.Embedding) and any(weight.ndim > 1 for weight in weights)
        ):
            yield path, module


def _watch(
    model: nn.Module, stacks: Sequence[tuple[str, nn.ModuleList]], probe: Mapping[str, Tensor]
) -> dict[str, list[torch.Size]]:
    """Input shapes of every linear layer that runs in one pass, by name, in the order of first calls."""
    calls: dict[str, list[torch.Size]] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.setdefault(name, []).append(inputs[0].shape)

    hooks = [
        module.register_forward_pre_hook(partial(note, path))
        for name, stack in stacks
        for path, module in stack.named_modules(prefix=name)
        if isinstance(module, LINEAR)
    ]
    try:
        with torch.no_grad():
            model(**probe)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"{type(model).__name__} cannot be run on token ids alone ({reason}): use a text model"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _attention_outputs(prefix: str, called: Sequence[str]) -> set[str]:
    """Of each attention of a block, the linear layer that runs last."""
    last: dict[str, str] = {}
    for name in called:
        parts = name.removeprefix(f"{prefix}.").split(".")
        depth = next((i for i, part in enumerate(parts[:-1]) if "att" in part.lower()), None)
        if depth is not None:
            last[".".join(parts[: depth + 1])] = name
    return set(last.values())


def _obstacle(module: nn.Module, shapes: Sequence[torch.Size], num_rows: int) -> str:
    """Why a module cannot be re-parameterized, or nothing."""
    if not isinstance(module, LINEAR):
        return f"is a {type(module).__name__}, not a linear layer"
    if not shapes:
        return "is never called in a forward pass"
    odd = next((shape for shape in shapes if len(shape) != 3 or shape[0] != num_rows), None)
    return f"is given input of shape {tuple(odd)} for {num_rows} rows, not one input per row" if odd else ""


def choose_targets(layers: Sequence[LinearLayer], which: str, first_block: int) -> list[str]:
    """Names of the layers that get increments; those that rows share stay frozen.

    Args:
        layers: what the backbone has.
        which: ``all-linear`` or ``attention-output``.
        first_block: blocks before this one stay frozen; they are where the query is read.

    Raises:
        BackboneError: a wanted layer cannot be re-parameterized, or none is left.
    """
    wanted = [
        layer
        for layer in layers
        if layer.block >= first_block and (which == "all-linear" or layer.is_attention_output)
    ]
    for layer in wanted:
        if layer.obstacle:
            raise BackboneError(
                f"module {layer.name} {layer.obstacle}: it cannot be re-parameterized, set targets to "
                "'attention-output' or use another backbone"
            )
    names = [layer.name for layer in wanted if not layer.is_shared]
    if not names:
        raise BackboneError(
            f"the backbone has no {which} layers from block {first_block} on: choose other targets or read "
            "the query from lower layers"
        )
    return names
