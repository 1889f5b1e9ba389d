"""Compiles a net as one graph and runs it frozen and bent by several mixtures of one shape, time and again.

A program of its own, because the shape checks of the test suite cannot be compiled. Prints how often it was
compiled: once frozen and once bent.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from slm.backbone import bindings
from slm.backbone.reparameterize import Mixture, Reparameterizer
from slm.increments.increment import Increment, LowRankPair

SIZES = {"0": (6, 8), "2": (8, 4)}


def increment(seed: int) -> Increment:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LowRankPair(torch.randn(2, num_in, generator=draw), torch.randn(num_out, 2, generator=draw))
        for name, (num_in, num_out) in SIZES.items()
    }
    return Increment(pairs, 2, 4.0)


@torch.no_grad()
def count(num_tokens: int) -> int:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)
    bound = Reparameterizer(net, list(SIZES))
    frames = CompileCounter()
    compiled = torch.compile(net, backend=frames, fullgraph=True)
    x = torch.randn(3, num_tokens, 6)
    for seed in (0, 10, 20):
        slots = torch.tensor([[0, 1], [2, 3], [1, 2]]).roll(seed, 0)
        mixture = Mixture([increment(seed + i) for i in range(4)], slots, torch.rand(3, 2))
        bound.bind(mixture)
        torch.testing.assert_close(compiled(x), net(x))
        bound.release()
        torch.testing.assert_close(compiled(x), net(x))
    return frames.frame_count


if __name__ == "__main__":
    for bindings.STACKED_EXCESS in (0, 2):
        for num_tokens in (1, 5):
            sys.stdout.write(f"{count(num_tokens)}\n")
