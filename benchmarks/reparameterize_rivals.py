"""The other ways to bend a model that ``benchmarks/reparameterize.py`` measures against, on the same layers.

PEFT's mixed batch, X-LoRA and Arrow through PEFT's public interface, each on its own copy of the model, and
full weight changes, row by row, in the way of the paper's release.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slm.increments.increment import Increment


def lora_of(names: Sequence[str], rank: int, alpha: float) -> Any:
    """PEFT's settings of a LoRA adapter on some layers."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0, bias="none")


def _fill(model: Any, adapter: str, increment: Increment) -> None:
    for name, pair in increment.pairs.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A[adapter].weight.data.copy_(pair.A)
        layer.lora_B[adapter].weight.data.copy_(pair.B)


def with_adapters(model: nn.Module, increments: Sequence[Increment], dtype: torch.dtype) -> Any:
    """A PEFT model with one adapter per increment, named 0, 1, ..., in the dtype of the model."""
    from peft import get_peft_model

    bent: Any = None
    for number, increment in enumerate(increments):
        config = lora_of(list(increment.pairs), increment.rank, increment.alpha)
        if bent is None:
            bent = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            bent.add_adapter(str(number), config, autocast_adapter_dtype=False)
        _fill(bent, str(number), increment)
    return bent.to(dtype).eval().requires_grad_(False)


def save_adapters(model: nn.Module, increments: Sequence[Increment], folder: Path) -> list[str]:
    """Adapter folders for the rivals that load theirs from disk."""
    bent = with_adapters(copy.deepcopy(model), increments, torch.float32)
    bent.save_pretrained(folder)
    names = [str(number) for number in range(len(increments))]
    return [str(folder / name) for name in names]


def x_lora(model: nn.Module, folders: Sequence[str]) -> Any:
    """X-LoRA: a classifier weighs all adapters per token, after a pass without them; it allows no cache."""
    from peft import XLoraConfig, get_peft_model

    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(number): folder for number, folder in enumerate(folders)},
        top_k_lora=2,
        layerwise_scalings=False,
    )
    bent = get_peft_model(model, config, autocast_adapter_dtype=False)
    return bent.to(next(model.parameters()).dtype).eval()


def arrow(model: nn.Module, folders: Sequence[str]) -> Any:
    """Arrow: every token chooses its two adapters in every layer."""
    from peft import ArrowConfig, create_arrow_model

    bent = create_arrow_model(
        base_model=model,
        task_specific_adapter_paths=list(folders),
        arrow_config=ArrowConfig(top_k=2, rng_seed=0),
        autocast_adapter_dtype=False,
    )
    return bent.to(next(model.parameters()).dtype).eval()


class _FullChange(nn.Module):
    """A linear layer with one (O, I) weight change per row, formed anew in every forward pass."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: Tensor) -> Tensor:
        change = torch.bmm(self.up, self.down)  # (B, O, I)
        return self.base(x) + torch.bmm(x, change.transpose(1, 2))


def with_full_changes(
    model: nn.Module, increments: Sequence[Increment], slots: Tensor, weights: Tensor
) -> nn.Module:
    """The model with full weight changes, per row and layer."""
    for name in increments[0].pairs:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        rows = [[increments[slot] for slot in row] for row in slots.tolist()]
        down = torch.stack([torch.cat([x.pairs[name].A for x in row]) for row in rows])
        up = torch.stack(
            [
                torch.cat(
                    [x.pairs[name].B.float() * x.scale * w for x, w in zip(row, own, strict=True)], dim=1
                )
                for row, own in zip(rows, weights.tolist(), strict=True)
            ]
        )
        layer = _FullChange(base, down.to(**like), up.to(**like))
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def quietly() -> None:
    """PEFT warns about what is meant here: several adapters, no task type."""
    warnings.filterwarnings("ignore", module="peft")


def plain_copy(backbone: Any) -> nn.Module:
    """A copy of a backbone's model made of its own layers, as transformers loaded it."""
    model = copy.deepcopy(backbone.model)
    for name in backbone.reparameterizer.layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(name).base)
    return model
