"""The extractor of a store: prompts in, queries out, from frozen weights alone (method section 2c)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from slm.backbone.backbone import Backbone
from slm.backbone.load import locate
from slm.backbone.prompts import Batch, Prompt, Row
from slm.backbone.reparameterize import Mixture
from slm.config import RetrievalConfig
from slm.errors import BackboneError
from slm.retrieval.background import Background, background_texts, learn_background
from slm.retrieval.features import SentenceExtractor, num_passes, query_parts
from slm.retrieval.retriever import Reread


@final
class Extractor:
    """Reads queries as one store does. Whoever calls it holds the backbone's lock.

    Args:
        backbone: frozen, with nothing merged into it.
        config: DTKR's settings.

    Attributes:
        parts: (layer, pooling) of every part of the query, in order.
        sentence: the sentence encoder, where it is the extractor.
        is_two_pass: whether a frozen pass precedes the one that answers.

    Raises:
        BackboneError: the sentence encoder is missing.
    """

    def __init__(self, backbone: Backbone, config: RetrievalConfig) -> None:
        self.backbone = backbone
        self.parts = query_parts(config, backbone.num_layers)
        self.is_two_pass = num_passes(config, backbone.num_layers) == 2
        self.sentence = (
            SentenceExtractor(locate(config.sentence_model), str(backbone.device))
            if config.extractor == "sentence"
            else None
        )
        self._sentence_model = config.sentence_model if self.sentence is not None else None

    @property
    def num_channels(self) -> int:
        """C, of a query."""
        if self.sentence is not None:
            return self.sentence.num_channels
        return len(self.parts) * self.backbone.num_channels

    def __call__(
        self, prompts: Sequence[Prompt], rows: Sequence[Row], batch_size: int = 32
    ) -> Float[Tensor, "B C"]:
        """Queries of some prompts, (B, C) float32 on the CPU.

        Args:
            prompts: what was asked.
            rows: the same, tokenized.
            batch_size: rows computed together.
        """
        if not rows:
            return torch.empty(0, self.num_channels)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        starts = range(0, len(order), batch_size)
        with torch.no_grad():
            for start in tqdm(starts, "reading texts", leave=False, delay=2, disable=None):
                chosen = order[start : start + batch_size]
                if self.sentence is not None:
                    queries = self.sentence([words_of(prompts[i]) for i in chosen])
                else:
                    batch = self.backbone.batch([rows[i] for i in chosen])
                    queries = self.backbone.queries(batch, self.parts).cpu()
                for i, query in zip(chosen, queries, strict=True):
                    found[i] = query
        return torch.stack(found)

    @contextlib.contextmanager
    def bending(
        self,
        batch: Batch,
        texts: Sequence[str],
        decide: Callable[[Float[Tensor, "B C"], Reread], Mixture],
        *,
        is_two_pass: bool = False,
    ) -> Iterator[None]:
        """Within the block the backbone reads this batch's queries, asks for their mixture and bends to it.

        At once, or, where the query is read inside the forward pass, in the next one.

        Args:
            batch: B rows.
            texts: their words, for a sentence encoder.
            decide: gives the rows' mixture from their queries, (B, C), and a way to read one by itself.
            is_two_pass: the mixture may bend the very layers that make the query.
        """
        backbone, sentence = self.backbone, self.sentence
        bound = backbone.reparameterizer

        def reread(row: int) -> Tensor:
            if sentence is not None:
                return sentence([texts[row]])[0]
            return backbone.queries(batch.alone(row), self.parts)[0]

        def bend(queries: Tensor) -> None:
            bound.bind(decide(queries, reread))

        bound.release()
        try:
            if sentence is not None:
                bend(sentence(texts))
                yield
            elif self.is_two_pass or is_two_pass:
                bend(backbone.queries(batch, self.parts))
                yield
            else:
                with backbone.reading_query(batch, self.parts, bend):
                    yield
        finally:
            bound.release()

    def background(self) -> Background:
        """What DTKR remembers of texts of all kinds (method section 2d).

        Read once for all stores of one backbone that read alike.

        Raises:
            BackboneError: a query is not finite.
        """
        own, reading = _BACKGROUNDS.setdefault(self.backbone, {}), (self.parts, self._sentence_model)
        if reading not in own:
            texts = background_texts()
            row = partial(self.backbone.row, is_truncating=True, where="a text of the background")
            queries = self(texts, [row(text) for text in texts])
            if not queries.isfinite().all():
                raise BackboneError(
                    f"backbone {self.backbone.source!r} overflows in {self.backbone.dtype}: "
                    "set backbone.dtype to float32"
                )
            own[reading] = learn_background(queries)
        return own[reading]


def words_of(prompt: Prompt) -> str:
    """The words of a prompt as one text, for a sentence encoder or a report."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


_BACKGROUNDS: WeakKeyDictionary[Backbone, dict[Hashable, Background]] = WeakKeyDictionary()
