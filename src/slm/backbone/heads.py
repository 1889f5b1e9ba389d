"""Classification heads: the part of a task's knowledge an encoder needs to name a label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slm.errors import IncrementError


def pool_mean(hidden: Float[Tensor, "B T C"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
    """Mean over the marked tokens of each row, in float32."""
    marked = mask.unsqueeze(-1).to(torch.float32)
    return (hidden.to(torch.float32) * marked).sum(1) / marked.sum(1).clamp_min(1.0)


class Head(nn.Module):
    """Linear map from the pooled hidden state (B, C) to label logits (B, Y), in float32, zero at birth."""

    def __init__(self, num_channels: int, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_labels, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def forward(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B Y"]:
        """Logits of the task's labels."""
        return apply_head({"weight": self.weight, "bias": self.bias}, pooled)


def apply_head(head: Mapping[str, Tensor], pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B Y"]:
    """Logits W h + b of a stored head.

    Raises:
        IncrementError: the head is not made for this number of channels.
    """
    if head["weight"].shape[1] != pooled.shape[1]:
        raise IncrementError(
            f"a head expects {head['weight'].shape[1]} channels, the backbone gives {pooled.shape[1]}: "
            "it was learned with another backbone"
        )
    weight, bias = head["weight"].to(pooled.device), head["bias"].to(pooled.device)
    return pooled @ weight.T + bias
