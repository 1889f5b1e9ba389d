"""Reading answers from a causal backbone: scoring label texts, and free generation.

Both start from one prefill; its key-value cache and the bound mixture are kept, so a row is decided
once and its knowledge stays the same while it is answered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slm.backbone.backbone import Backbone
from slm.backbone.prompts import Batch


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one pass over the prompts leaves behind.

    Attributes:
        batch: the prompts, left-padded, (B, T).
        logits: (B, V) logits of the first answer token.
        cache: the key-value cache of the prompts.
    """

    batch: Batch
    logits: Float[Tensor, "B V"]
    cache: Any


@torch.no_grad()
def prefill(backbone: Backbone, batch: Batch) -> Prefill:
    """Run the prompts once, with whatever is (or gets) bound; logits only of the last position."""
    output = backbone.model(**backbone.inputs(batch), use_cache=True, logits_to_keep=1)
    return Prefill(batch, output.logits[:, -1], output.past_key_values)


@torch.no_grad()
def score_labels(
    backbone: Backbone, start: Prefill, rows: Sequence[int], labels: Sequence[Sequence[str]]
) -> list[Float[Tensor, " Y"]]:
    """Log-probability of each candidate label text, end token included, for some rows of a prefill.

    All candidates of a row are scored in one short pass: their tokens are laid side by side behind
    the cached prompt, and a mask lets each see the prompt and its own beginning only.

    Args:
        backbone: the causal backbone, with the mixture of the whole prefill bound.
        start: the prefill.
        rows: which rows of the prefill to score.
        labels: candidate texts per row.

    Returns:
        Per row, (Y,) float32 log-probabilities, one per candidate.
    """
    encode = backbone.renderer.tokenizer
    eos = int(encode.eos_token_id)
    tokens = [[[*encode(y, add_special_tokens=False)["input_ids"], eos] for y in texts] for texts in labels]
    first = start.logits[list(rows)].float().log_softmax(-1)
    width = max(sum(len(t) - 1 for t in row) for row in tokens)
    later = _later_log_probs(backbone, start, rows, tokens, width) if width else None
    scores = []
    for i, row in enumerate(tokens):
        at, row_scores = 0, []
        for ids in row:
            score = first[i, ids[0]]
            if later is not None:
                for offset, token in enumerate(ids[1:]):
                    score = score + later[i, at + offset, token]
            at += len(ids) - 1
            row_scores.append(score)
        scores.append(torch.stack(row_scores))
    return scores


def _later_log_probs(
    backbone: Backbone,
    start: Prefill,
    rows: Sequence[int],
    tokens: Sequence[Sequence[Sequence[int]]],
    width: int,
) -> Float[Tensor, "B W V"]:
    """Log-probabilities after every label token but the last, (B', W, V)."""
    index = torch.tensor(rows, device=backbone.device)
    past = start.batch.mask[index]
    num_rows, num_past = past.shape
    ids = torch.full((num_rows, width), backbone.renderer.pad_id, device=backbone.device)
    positions = torch.zeros_like(ids)
    sees = torch.zeros(num_rows, width, num_past + width, dtype=torch.bool, device=backbone.device)
    sees[:, :, :num_past] = past[:, None]
    sees[:, range(width), range(num_past, num_past + width)] = True
    for i, row in enumerate(tokens):
        at, length = 0, int(past[i].sum())
        for label in row:
            n = len(label) - 1
            ids[i, at : at + n] = torch.tensor(label[:-1])
            positions[i, at : at + n] = length + torch.arange(n)
            corner = slice(num_past + at, num_past + at + n)
            sees[i, at : at + n, corner] = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
            at += n
    mask = torch.zeros(sees.shape, dtype=backbone.dtype, device=ids.device)
    mask = mask.masked_fill(~sees, torch.finfo(backbone.dtype).min)[:, None]
    with backbone.reparameterizer.selected(index):
        output = backbone.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=_cache_of(start, rows, crop=0),
            use_cache=True,
        )
    log_probs: Tensor = output.logits.float().log_softmax(-1)
    return log_probs


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated answer.

    Attributes:
        text: the answer without special tokens.
        confidence: geometric mean of the probabilities of its tokens, in 0..1.
    """

    text: str
    confidence: float


class _Confidence:
    """A logits processor that changes nothing and remembers how sure each greedy choice was."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log_probs.append(scores.float().log_softmax(-1).amax(-1))
        return scores


@torch.no_grad()
def generate(backbone: Backbone, start: Prefill, rows: Sequence[int], max_new_tokens: int) -> list[Generated]:
    """Greedy answers for some rows of a prefill, through the model's own ``generate``.

    The cached prompt is handed on (all but its last token, which ``generate`` runs again), and the
    rows keep the mixture that was bound for them at prefill.
    """
    index = torch.tensor(rows, device=backbone.device)
    prompt, mask = start.batch.ids[index], start.batch.mask[index].long()
    confidence = _Confidence()
    with backbone.reparameterizer.selected(index):
        output = backbone.model.generate(
            input_ids=prompt,
            attention_mask=mask,
            past_key_values=_cache_of(start, rows, crop=1),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=backbone.renderer.pad_id,
            logits_processor=[confidence],
        )
    new = output[:, prompt.shape[1] :]
    tokenizer = backbone.renderer.tokenizer
    eos = int(tokenizer.eos_token_id)
    log_probs = torch.stack(confidence.log_probs, dim=1)
    answers = []
    for ids, row in zip(new.tolist(), log_probs, strict=True):
        used = ids.index(eos) + 1 if eos in ids else len(ids)
        text = tokenizer.decode(ids[:used], skip_special_tokens=True).strip()
        answers.append(Generated(text, float(row[:used].mean().exp())))
    return answers


def _cache_of(start: Prefill, rows: Sequence[int], crop: int) -> Any:
    """A copy of the prefill's cache for some rows, without its last ``crop`` tokens."""
    cache = copy.deepcopy(start.cache)
    cache.batch_select_indices(torch.tensor(rows, device=start.logits.device))
    if crop:
        cache.crop(-crop)
    return cache
