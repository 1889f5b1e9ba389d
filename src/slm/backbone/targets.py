"""Which linear layers of a backbone are re-parameterized: found by structure, not by a list of names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slm.errors import BackboneError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of transformer blocks: the longest list of modules of one class, with its name.

    Raises:
        BackboneError: the model has no such list.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    stacks = [
        (name, stack) for name, stack in stacks if any(isinstance(m, nn.Linear) for m in stack.modules())
    ]
    if not stacks:
        raise BackboneError(
            f"{type(model).__name__} has no stack of blocks with linear layers: slm cannot re-parameterize it"
        )
    return max(stacks, key=lambda item: len(item[1]))


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer that may be re-parameterized.

    Attributes:
        name: path inside the backbone.
        block: number of its block, from 0.
        is_attention_output: whether it is the last linear layer of its block's attention.
    """

    name: str
    block: int
    is_attention_output: bool


def find_linear(model: nn.Module) -> list[LinearLayer]:
    """Every linear layer of every block, in forward order."""
    stack_name, stack = find_blocks(model)
    layers: list[LinearLayer] = []
    for number, block in enumerate(stack):
        paths = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        outputs = [path for path in paths if "att" in path.split(".")[0]][-1:]
        layers += [LinearLayer(f"{stack_name}.{number}.{path}", number, path in outputs) for path in paths]
    return layers


def choose_targets(layers: Sequence[LinearLayer], which: str, first_block: int) -> list[str]:
    """Names of the layers that get increments.

    Args:
        layers: what the backbone has.
        which: ``all-linear`` or ``attention-output``.
        first_block: blocks before this one stay frozen; they are where the query is read.

    Raises:
        BackboneError: nothing is left to re-parameterize.
    """
    names = [
        layer.name
        for layer in layers
        if layer.block >= first_block and (which == "all-linear" or layer.is_attention_output)
    ]
    if not names:
        raise BackboneError(
            f"the backbone has no {which} layers from block {first_block} on: choose other targets or read "
            "the query from lower layers"
        )
    return names
