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


NUM_FIRST = 4
"""How many of a row's first words the pooling ``first`` averages."""


def pool_words(
    hidden: Float[Tensor, "B T C"], mask: Bool[Tensor, "B T"], pooling: str
) -> Float[Tensor, "B C"]:
    """One part of a query: the marked tokens of each row pooled in float32 (method section 2c).

    Args:
        hidden: (B, T, C) hidden states after one layer.
        mask: (B, T) bool, the row's own words.
        pooling: ``mean`` of them all; ``last`` of them or ``first`` (the mean of the first four), each as
            signed square roots of unit norm, because single tokens are spiky where a mean is not;
            ``even-mean``, the mean treated the same way.
    """
    if pooling in ("first", "last"):
        num, places = NUM_FIRST, mask.cumsum(1)
        if pooling == "last":
            num, places = 1, places[:, -1:] - places + 1  # counted from the end
        wanted = mask & (places <= num)
        tokens = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :num]  # the few come first
        mask = wanted.gather(1, tokens)
        hidden = hidden.gather(1, tokens[:, :, None].expand(-1, -1, hidden.shape[2]))
    pooled = pool_mean(hidden, mask)
    if pooling == "mean":
        return pooled
    return nn.functional.normalize(pooled.sign() * pooled.abs().sqrt(), dim=1)


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
