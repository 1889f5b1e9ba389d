"""Text that belongs to no task, and where it lies: what a task is told from first (method section 2d)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor

from slm.retrieval.keys import pack


@dataclass(frozen=True, slots=True)
class Background:
    """What DTKR remembers of texts of all kinds.

    Attributes:
        mean: (C,) float64, their mean query.
        scatter: (C·(C+1)/2,) float32, upper triangle of their scatter around it, row by row.
        num_texts: how many they are.
    """

    mean: Float[Tensor, " C"]
    scatter: Float[Tensor, " P"]
    num_texts: int


def background_texts() -> tuple[str, ...]:
    """The texts of all kinds, always the same ones.

    Questions, reports, reviews, letters, code, tables, fragments, in many languages and lengths, written for
    this package.
    """
    lines = files("slm.retrieval").joinpath("background.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def learn_background(queries: Float[Tensor, "B C"]) -> Background:
    """The background of texts from their queries, (B, C)."""
    x = queries.to(torch.float64)
    centred = x - x.mean(0)
    return Background(x.mean(0), pack(centred.T @ centred).to(torch.float32), len(x))
