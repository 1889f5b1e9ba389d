"""The routed model under lm-evaluation-harness: ``python -m slm.bench.harness run --model slm ...``.

Every request of the harness finds its own knowledge, as a question of ``slm ask`` does: its context (the
whole text for perplexities) is the question, the mixture retrieved for it bends the backbone, and the rest
is scored or written under that mixture. Rows that abstain are the frozen backbone's. Tokens are those of
the harness's own ``hf`` model, so on an empty store the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from slm.backbone.backbone import BackboneKind
from slm.backbone.decode import prefill
from slm.backbone.generate import generate
from slm.backbone.prompts import IGNORED, Prompt, Row
from slm.backbone.reparameterize import Mixture
from slm.config import DecodingConfig
from slm.errors import BackboneError, ConfigError
from slm.model import ScalableLM

MAX_NEW_TOKENS = 256
"""Longest generation where the harness's task does not say, as in its ``hf`` model."""

Pair = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as texts, then as token ids."""


@register_model("slm")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A store as a model of the harness.

    Args:
        store: the store's folder.
        backbone: another copy of the backbone it was made with; None loads the one it names.
        batch_size: requests computed together.
        max_length: longest row in tokens, longer ones lose their beginning; None is the backbone's window.
        max_batch_size: given by the harness, not used.
        device: given by the harness; a store decides itself (``backbone.device``).

    Raises:
        StoreError: there is no such store.
        BackboneError: the backbone is no causal model.
        ConfigError: a number cannot be used.
    """

    def __init__(
        self,
        store: str,
        backbone: Any = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.model = ScalableLM.open(store, backbone)
        kind = self.model.backbone.kind
        if kind is not BackboneKind.CAUSAL:
            raise BackboneError(
                f"the harness scores continuations, store {store!r} has the {kind.value} backbone "
                f"{self.model.backbone.source!r}: measure it with slm evaluate"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size must be a whole number above 0, got {batch_size!r}: give one")
        self.batch_size = int(batch_size)
        window = self.model.backbone.window
        self.max_length = window if max_length is None else int(max_length)
        if not 2 <= self.max_length <= window:
            raise ConfigError(
                f"max_length must be in 2..{window} (the backbone's window), got {max_length}: correct it"
            )
        self.tokenizer = self.model.backbone.renderer.tokenizer
        self._conversations: dict[str, list[dict[str, str]]] = {}

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: the begin token, or the end token where there is none."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return self.model.backbone.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a begin token that the text brings itself is not doubled."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begin = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and begin and string.startswith(begin):
            options = {"add_special_tokens": False}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the backbone reads it; its messages are kept, for they are what is routed."""
        text = str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
        self._conversations[text] = [dict(message) for message in chat_history]
        return text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window; the text itself is the question."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [((text, ""), *make_disjoint_window(window)) for window in windows]
            pairs += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for number, (score, _) in zip(owners, scores, strict=True):
            totals[number] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding writes it."""
        rows = [self._scored_row(context, continuation) for _, context, continuation in requests]
        questions = [self._question(texts[0]) for texts, _, _ in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for chosen in self._batches([row.prompt + row.target for row in rows], disable_tqdm):
            with self._routed([questions[i] for i in chosen]):
                outcomes = self._score([rows[i] for i in chosen])
            for i, outcome in zip(chosen, outcomes, strict=True):
                found[i] = outcome
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write until a stop text, the end token or the limit; greedy unless the task samples.

        Raises:
            ConfigError: the limit leaves no room for a context.
        """
        written = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        for own in dict.fromkeys(settings):
            numbers = [i for i, given in enumerate(settings) if given == own]
            options = dict(requests[numbers[0]].args[1])
            num_new, stops, decoding = self._generation(options)
            kept = [contexts[i][-(self.max_length - num_new) :] for i in numbers]
            for chosen in self._batches([tuple(ids) for ids in kept], disable_tqdm):
                batch = self.model.backbone.batch([_row(kept[i]) for i in chosen])
                with self._routed([self._question(requests[numbers[i]].args[0]) for i in chosen]):
                    start = prefill(self.model.backbone, batch)
                    texts = generate(self.model.backbone, start, range(len(chosen)), num_new, decoding)
                for i, answers in zip(chosen, texts, strict=True):
                    written[numbers[i]] = _until(answers[0].text, stops)
        return written

    def _generation(self, options: dict[str, Any]) -> tuple[int, list[str], DecodingConfig]:
        """Longest answer, stop texts and decoding of a request's ``gen_kwargs``."""
        stops = options.get("until") or []
        num_new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
        if not 1 <= num_new < self.max_length:
            raise ConfigError(
                f"max_gen_toks is {num_new}, rows of {self.max_length} tokens hold a context too: lower it"
            )
        temperature = float(options.get("temperature") or 0.0)
        is_sampling = options.get("do_sample", temperature > 0) and temperature > 0
        decoding = DecodingConfig(
            num_beams=int(options.get("num_beams") or 1),
            temperature=temperature if is_sampling else None,
            top_p=float(options.get("top_p") or 1.0) if is_sampling else 1.0,
        )
        return num_new, [stops] if isinstance(stops, str) else list(stops), decoding

    def _scored_row(self, context: list[int], continuation: list[int]) -> Row:
        """Both parts as one row; what is too long loses its beginning, as in the harness's ``hf`` model."""
        surplus = max(0, len(context) + len(continuation) - self.max_length - 1)
        return _row((context + continuation)[surplus : -len(continuation)], continuation)

    def _question(self, context: str) -> Prompt | None:
        """What is routed: a conversation as its messages, a text as it is, nothing where there is none."""
        return self._conversations.get(context, context) if context.strip() else None

    def _batches(self, sequences: Sequence[Sequence[int]], is_silent: bool) -> Iterator[list[int]]:
        """Numbers of rows of about the same length, longest first."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, "routed requests", disable=is_silent):
            yield order[start : start + self.batch_size]

    @contextmanager
    def _routed(self, questions: Sequence[Prompt | None]) -> Iterator[None]:
        """Within the block the backbone is bent for these rows; without a question a row stays frozen."""
        bound = self.model.backbone.reparameterizer
        asked = [i for i, question in enumerate(questions) if question is not None]
        with self.model.backbone.lock, torch.inference_mode():
            texts = [question for question in questions if question is not None]
            found = self.model.retrieve(texts, is_truncating=True) if texts else None
            if found is not None:
                bound.bind(_spread(self.model.mixture(found), asked, len(questions)))
            try:
                yield
            finally:
                bound.release()

    def _score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Log-probabilities of the targets of some rows, with whatever is bound."""
        backbone = self.model.backbone
        batch = backbone.batch(rows)
        first = int((batch.targets != IGNORED).any(0).nonzero()[0])
        columns = torch.arange(first, batch.targets.shape[1], device=backbone.device)
        logits = backbone.model(**backbone.inputs(batch), logits_to_keep=columns, use_cache=False).logits
        targets = batch.targets[:, first:]
        is_counted = targets != IGNORED
        chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        scores = (chosen * is_counted).sum(1)
        is_greedy = ((logits.argmax(-1) == targets) | ~is_counted).all(1)
        return list(zip(scores.tolist(), is_greedy.tolist(), strict=True))


def _row(context: Sequence[int], continuation: Sequence[int] = ()) -> Row:
    return Row(tuple(context), (0, len(context)), tuple(continuation))


def _spread(mixture: Mixture, places: Sequence[int], num_rows: int) -> Mixture:
    """A mixture of some rows of a batch as one of all its rows; the others get none of it."""
    slots = torch.zeros(num_rows, mixture.slots.shape[1], dtype=torch.long)
    weights = torch.zeros(slots.shape)
    slots[places], weights[places] = mixture.slots, mixture.weights
    return Mixture(mixture.increments, slots, weights)


def _until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


def main() -> None:
    """The harness's own command line, with ``--model slm`` known to it."""
    from lm_eval.__main__ import cli_evaluate

    # Run as a script this module is called __main__ and has registered itself on the way here.
    cli_evaluate()


if __name__ == "__main__":
    main()
