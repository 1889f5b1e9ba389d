"""Free text from a prefill, through the model's own ``generate``: greedy, beam search or samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from slm.backbone.backbone import Backbone
from slm.backbone.decode import Prefill, cache_of, encoder_output
from slm.config import DecodingConfig


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated answer.

    Attributes:
        text: the answer without special tokens.
        confidence: geometric mean of the probabilities of its tokens, in 0..1.
    """

    text: str
    confidence: float


class _ChosenLogProbs:
    """A logits processor that changes nothing and remembers how likely each chosen token was."""

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids[:, -1])
        self._last = scores.float().log_softmax(-1)
        return scores

    def _note(self, tokens: Tensor) -> None:
        if self._last is not None:
            self._chosen.append(self._last.gather(1, tokens[:, None])[:, 0])

    def finish(self, sequences: Tensor) -> Tensor:
        """(S, number of steps) log-probabilities of what was chosen."""
        self._note(sequences[:, -1])
        return torch.stack(self._chosen, dim=1)


@torch.no_grad()
def generate(
    backbone: Backbone,
    start: Prefill,
    rows: Sequence[int],
    max_new_tokens: int,
    decoding: DecodingConfig | None = None,
) -> list[list[Generated]]:
    """Written answers for some rows of a prefill.

    What the prefill computed is handed on: the cached prompt (all but its last token, which ``generate``
    runs again), or the encoder's states. Beams and samples of a row keep the mixture bound for it.

    Args:
        backbone: causal or sequence-to-sequence, with the mixture of the whole prefill bound.
        start: the prefill.
        rows: which rows of the prefill to answer.
        max_new_tokens: longest answer.
        decoding: beams or samples; greedy by default.

    Returns:
        Per row, ``num_sequences`` answers, best first for beams.
    """
    decoding = decoding or DecodingConfig()
    settings = _settings(backbone, max_new_tokens, decoding)
    # Samples of a row are rows of their own from here on; beams are multiplied by transformers.
    copies = 1 if decoding.is_beam_search else decoding.num_sequences
    index = torch.tensor(rows, device=backbone.device).repeat_interleave(copies)
    bound = index.repeat_interleave(decoding.num_beams)
    chosen = None if decoding.is_beam_search else _ChosenLogProbs()
    with (
        backbone.reparameterizer.selected(bound),
        _only_tokens(backbone.model),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(decoding.seed)
        output = backbone.model.generate(
            **_given(start, index, bound),
            attention_mask=start.batch.mask[index].long(),
            generation_config=settings,
            logits_processor=[chosen] if chosen else None,
        )
    num_given = start.batch.ids.shape[1] if start.memory is None else 1
    new = output.sequences[:, num_given:]
    if chosen is not None:
        log_probs = chosen.finish(output.sequences)
    else:
        log_probs = output.sequences_scores[:, None].expand(new.shape)
    answers = _read(backbone, settings, new, log_probs)
    n = decoding.num_sequences
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def _given(start: Prefill, index: Tensor, bound: Tensor) -> dict[str, Any]:
    """What ``generate`` starts from: the cached prompts, or the encoder's states."""
    if start.memory is not None:
        # Of no given length: transformers would count the encoder's layers where the decoder has more.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return {"encoder_outputs": encoder_output(start, index), "past_key_values": cache}
    return {"input_ids": start.batch.ids[index], "past_key_values": cache_of(start, bound, crop=1)}


def _settings(backbone: Backbone, max_new_tokens: int, decoding: DecodingConfig) -> GenerationConfig:
    """What ``generate`` is asked for, with every token that ends an answer."""
    own = backbone.model.generation_config.eos_token_id
    ends = {backbone.renderer.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    is_sampling = decoding.temperature is not None
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=is_sampling,
        num_beams=decoding.num_beams,
        num_return_sequences=decoding.num_sequences if decoding.is_beam_search else 1,
        pad_token_id=backbone.renderer.pad_id,
        eos_token_id=sorted(ends),
        return_dict_in_generate=True,
        output_scores=decoding.is_beam_search,
        **(sampling if is_sampling else {}),
    )


@contextlib.contextmanager
def _only_tokens(model: Any) -> Iterator[None]:
    """Within the block the model's own generation defaults are its special tokens alone.

    Its lengths, penalties and beams were chosen for what it could do before; they would bend answers.
    """
    own = model.generation_config
    names = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def _read(backbone: Backbone, settings: GenerationConfig, new: Tensor, log_probs: Tensor) -> list[Generated]:
    """Text and confidence of each sequence, up to its first end token."""
    ends = set(settings.eos_token_id)
    answers = []
    for ids, row in zip(new.tolist(), log_probs, strict=True):
        used = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        text = backbone.renderer.tokenizer.decode(ids[:used], skip_special_tokens=True).strip()
        answers.append(Generated(text, float(row[:used].mean().exp())))
    return answers
