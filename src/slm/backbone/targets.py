"""Which linear layers of a backbone are re-parameterized: found by structure, not by a list of names."""

from __future__ import annotations

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


def find_targets(model: nn.Module, which: str, first_block: int = 0) -> list[str]:
    """Names of the layers that get increments, in forward order.

    Args:
        model: the backbone, before any layer is wrapped.
        which: ``all-linear`` or ``attention-output`` (the last linear layer of each attention).
        first_block: blocks before this one stay frozen; they are where the query is read.

    Raises:
        BackboneError: nothing is left to re-parameterize.
    """
    name, stack = find_blocks(model)
    targets: list[str] = []
    for index, block in enumerate(stack):
        if index < first_block:
            continue
        linear = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        if which == "attention-output":
            linear = [path for path in linear if "att" in path.split(".")[0]][-1:]
        targets += [f"{name}.{index}.{path}" for path in linear]
    if not targets:
        raise BackboneError(
            f"{type(model).__name__} has no {which} layers from block {first_block} on (of {len(stack)}): "
            "choose other targets or read the query from lower layers"
        )
    return targets
