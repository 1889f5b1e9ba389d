"""Reading answers from a backbone that writes: one prefill, and scoring label texts from it.

The prefill's cache and the bound mixture are kept, so a row is decided once and its knowledge stays the
same while it is answered.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from slm.backbone.backbone import Backbone
from slm.backbone.prompts import Batch
from slm.errors import DataError

MAX_SEQUENCES = 64
"""Label texts that are scored at once where each has a row of its own."""

MAX_LOGITS = 1 << 26
"""Logits that are computed at once where they share a row, at least one row's."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one pass over the prompts leaves behind.

    Attributes:
        batch: the prompts, (B, T), padded on the backbone's side.
        logits: (B, V) logits of the first answer token.
        cache: the key-value cache of the prompts, or of the decoder's start token.
        memory: (B, T, C) what the encoder of a sequence-to-sequence backbone made of the prompts.
    """

    batch: Batch
    logits: Float[Tensor, "B V"]
    cache: Any
    memory: Float[Tensor, "B T C"] | None = None


@torch.no_grad()
def prefill(backbone: Backbone, batch: Batch) -> Prefill:
    """Run the prompts once, with whatever is (or gets) bound; logits only of the last position."""
    if backbone.start_id is not None:
        output = backbone.model(**backbone.inputs(batch), use_cache=True)
        memory = output.encoder_last_hidden_state
        return Prefill(batch, output.logits[:, -1], output.past_key_values, memory)
    # A plain cache keeps every key, also of layers with a sliding window: the mask leaves out the far
    # ones, and the cache can be cut and laid out anew.
    # The last position by index: by number it would stay a view, for which torch on a CPU copies the head's
    # weights once per row.
    last = torch.tensor([-1], device=backbone.device)
    output = backbone.model(
        **backbone.inputs(batch), use_cache=True, past_key_values=DynamicCache(), logits_to_keep=last
    )
    return Prefill(batch, output.logits[:, -1], output.past_key_values)


@torch.no_grad()
def score_labels(
    backbone: Backbone, start: Prefill, rows: Sequence[int], labels: Sequence[Sequence[str]]
) -> list[Float[Tensor, " Y"]]:
    """Log-probability of each candidate label text, end token included, for some rows of a prefill.

    Args:
        backbone: causal or sequence-to-sequence, with the mixture of the whole prefill bound.
        start: the prefill.
        rows: which rows of the prefill to score.
        labels: candidate texts per row.

    Returns:
        Per row, (Y,) float32 log-probabilities, one per candidate.

    Raises:
        DataError: a candidate does not fit into the window behind its prompt.
    """
    tokens = [[backbone.renderer.answer_ids(text) for text in texts] for texts in labels]
    for row, texts, own in zip(rows, labels, tokens, strict=True):
        _check_window(backbone, int(start.batch.mask[row].sum()), texts, own)
    first = start.logits[list(rows)].float().log_softmax(-1)
    read = read_apart if backbone.is_reading_apart else read_side_by_side
    later = read(backbone, start, rows, tokens)
    return [
        torch.stack([first[i, ids[0]] + score for ids, score in zip(row, scores, strict=True)])
        for i, (row, scores) in enumerate(zip(tokens, later, strict=True))
    ]


def _check_window(
    backbone: Backbone, num_past: int, labels: Sequence[str], tokens: Sequence[Sequence[int]]
) -> None:
    """Expect every label to end within the window; its last token is predicted and never read."""
    room = backbone.window - (0 if backbone.renderer.is_apart else num_past)
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) - 1 > room:
        raise DataError(
            f"a question of {num_past} tokens leaves {room} of the window's {backbone.window} to its labels, "
            f"{labels[longest]!r} takes {len(tokens[longest]) - 1}: shorten the question"
        )


Tokens = Sequence[Sequence[Sequence[int]]]
"""Token ids of each candidate of each row."""


def read_apart(
    backbone: Backbone, start: Prefill, rows: Sequence[int], tokens: Tokens
) -> list[list[Float[Tensor, ""]]]:
    """Log-probability of each candidate's later tokens, every candidate in a row of its own.

    A decoder may count positions itself (T5 does, and whatever has ALiBi), so candidates cannot share a row.
    """
    found: list[list[Tensor]] = [[] for _ in rows]
    flat = [(i, ids) for i, row in enumerate(tokens) for ids in row]
    for begin in range(0, len(flat), MAX_SEQUENCES):
        chosen = flat[begin : begin + MAX_SEQUENCES]
        width = max(len(ids) for _, ids in chosen) - 1
        if not width:
            for i, _ in chosen:
                found[i].append(start.logits.new_zeros((), dtype=torch.float32))
            continue
        given = torch.full((len(chosen), width), backbone.renderer.pad_id)
        for line, (_, ids) in enumerate(chosen):
            given[line, : len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.long)
        which = torch.tensor([rows[i] for i, _ in chosen], device=backbone.device)
        with backbone.reparameterizer.selected(which):
            output = backbone.model(
                **_continued(start, which, given.to(backbone.device)),
                past_key_values=cache_of(start, which),
                use_cache=True,
            )
        log_probs = output.logits.float().log_softmax(-1)
        for line, (i, ids) in enumerate(chosen):
            found[i].append(log_probs[line, range(len(ids) - 1), ids[1:]].sum())
    return found


def _continued(start: Prefill, rows: Tensor, tokens: Tensor) -> dict[str, Any]:
    """What a pass over further tokens (b, W) of some rows is given beside their cache."""
    mask = start.batch.mask[rows].long()
    if start.memory is not None:
        return {
            "encoder_outputs": encoder_output(start, rows),
            "attention_mask": mask,
            "decoder_input_ids": tokens,
        }
    return {
        "input_ids": tokens,
        "attention_mask": torch.cat([mask, torch.ones_like(tokens)], dim=1),
        "position_ids": mask.sum(1, keepdim=True) + torch.arange(tokens.shape[1], device=tokens.device),
    }


def read_side_by_side(
    backbone: Backbone, start: Prefill, rows: Sequence[int], tokens: Tokens
) -> list[list[Float[Tensor, ""]]]:
    """Log-probability of each candidate's later tokens, all candidates of a row in one short pass.

    Their tokens are laid side by side behind the cached prompt, and a mask lets each see the prompt and
    its own beginning only.
    """
    width = max(sum(len(ids) - 1 for ids in row) for row in tokens)
    most = max(1, MAX_LOGITS // max(1, width * start.logits.shape[1]))
    if len(rows) > most:
        parts = (slice(at, at + most) for at in range(0, len(rows), most))
        return [
            found for part in parts for found in read_side_by_side(backbone, start, rows[part], tokens[part])
        ]
    if not width:
        zero = start.logits.new_zeros((), dtype=torch.float32)
        return [[zero for _ in row] for row in tokens]
    index = torch.tensor(rows, device=backbone.device)
    past = start.batch.mask[index]
    num_past = past.shape[1]
    ids = torch.full((len(rows), width), backbone.renderer.pad_id, device=backbone.device)
    positions = torch.zeros_like(ids)
    sees = torch.zeros(*ids.shape, num_past + width, dtype=torch.bool, device=backbone.device)
    sees[:, :, :num_past] = past[:, None]
    sees[:, range(width), range(num_past, num_past + width)] = True
    for i, row in enumerate(tokens):
        at, length = 0, int(past[i].sum())
        for label in row:
            n = len(label) - 1
            ids[i, at : at + n] = torch.tensor(label[:-1], dtype=torch.long)
            positions[i, at : at + n] = length + torch.arange(n)
            corner = slice(num_past + at, num_past + at + n)
            sees[i, at : at + n, corner] = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
            at += n
    key_positions = torch.cat([start.batch.positions[index], positions], dim=1)
    with backbone.reparameterizer.selected(index):
        output = backbone.model(
            input_ids=ids,
            attention_mask=_masks(backbone, sees, positions, key_positions),
            position_ids=positions,
            past_key_values=cache_of(start, index),
            use_cache=True,
        )
    log_probs = output.logits.float().log_softmax(-1)
    found = []
    for i, row in enumerate(tokens):
        ends = torch.tensor([0, *(len(label) - 1 for label in row)]).cumsum(0).tolist()
        spans = [range(a, b) for a, b in itertools.pairwise(ends)]
        found.append([log_probs[i, span, y[1:]].sum() for span, y in zip(spans, row, strict=True)])
    return found


def _masks(backbone: Backbone, sees: Tensor, positions: Tensor, key_positions: Tensor) -> Any:
    """What attention adds to its scores, (B, 1, W, S), one per sort of layer where the backbone has several.

    Args:
        backbone: gives dtype and sliding window.
        sees: (B, W, S) which keys each token may see, windows aside.
        positions: (B, W) of the tokens.
        key_positions: (B, S) of the keys.
    """
    config = backbone.model.config.get_text_config()

    def mask(visible: Tensor) -> Tensor:
        zero = torch.zeros(visible.shape, dtype=backbone.dtype, device=visible.device)
        return zero.masked_fill(~visible, torch.finfo(backbone.dtype).min)[:, None]

    window = getattr(config, "sliding_window", None)
    if window is None:
        return mask(sees)
    near = mask(sees & (positions[:, :, None] - key_positions[:, None, :] < window))
    sorts = getattr(config, "layer_types", None)
    return {"full_attention": mask(sees), "sliding_attention": near} if sorts else near


def encoder_output(start: Prefill, rows: Tensor) -> Any:
    """What the encoder made of some rows, as transformers hands it on."""
    assert start.memory is not None
    return BaseModelOutput(last_hidden_state=start.memory[rows])


def cache_of(start: Prefill, rows: Tensor, crop: int = 0) -> Any:
    """A copy of the prefill's cache for some rows, without its last ``crop`` tokens."""
    cache = copy.deepcopy(start.cache)
    cache.batch_select_indices(rows)
    if crop:
        cache.crop(-crop)
    return cache
