"""The frozen Hugging Face model, its tokenizer, and the passes the rest of slm asks of it."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slm.backbone.heads import pool_mean, pool_words
from slm.backbone.merge import Merge
from slm.backbone.prompts import IGNORED, Batch, Prompt, Renderer, Row
from slm.backbone.quantization import is_quantised, stored_method, stored_parts
from slm.backbone.reparameterize import Reparameterizer
from slm.backbone.targets import choose_targets, find_linear, find_stacks
from slm.config import BackboneConfig
from slm.errors import BackboneError, ConfigError

_PROBE = "The quick brown fox: 1234, naïve café?"


class BackboneKind(enum.StrEnum):
    """What a backbone is: it decides how an answer is read from it."""

    ENCODER = "encoder"
    CAUSAL = "causal"
    SEQUENCE_TO_SEQUENCE = "sequence-to-sequence"


class _QueryRead(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass early, once the last layer the query needs has run."""


class Backbone:
    """A frozen model. Nothing here learns, and nothing here knows of tasks.

    Every linear layer of every block is wrapped once; with nothing bound it is the layer itself, so several
    stores may share one backbone. What is bound belongs to one request: hold ``lock`` from binding to answer.
    Blocks are counted through encoder and decoder; the query is read from the encoder where there is one.

    Args:
        source: what the user called it.
        kind: encoder, causal or sequence-to-sequence.
        model: the transformers model, on its device.
        tokenizer: its tokenizer.
        config: what it was loaded with: window and prompt format, and how it came to be what ``model`` is.
    """

    def __init__(
        self, source: str, kind: BackboneKind, model: Any, tokenizer: Any, config: BackboneConfig
    ) -> None:
        self.source = source
        self.kind = kind
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.blocks = find_stacks(model)[0][1]
        self.device = next(model.parameters()).device
        # Of the activations: a quantised weight is no float, or stands for one of another dtype.
        self.dtype = next(p.dtype for p in model.parameters() if not is_quantised(p))
        self.quantization = stored_method(model.config)  # the package whose codes the weights are, or None
        if kind is not BackboneKind.ENCODER and tokenizer.eos_token_id is None:
            raise BackboneError(
                f"the tokenizer of {source!r} has no end token: set one in its tokenizer_config"
            )
        self.window = _window(model)
        if config.max_tokens is not None and config.max_tokens > self.window:
            raise ConfigError(
                f"max_tokens is {config.max_tokens}, the window of {source!r} holds {self.window}: lower it"
            )
        self.start_id = _start_id(source, model) if kind is BackboneKind.SEQUENCE_TO_SEQUENCE else None
        self.side = "left" if kind is BackboneKind.CAUSAL else "right"
        prompt_format, max_tokens = _reading(kind, tokenizer, config, self.window)
        is_apart = kind is BackboneKind.SEQUENCE_TO_SEQUENCE
        self.renderer = Renderer(
            tokenizer, prompt_format, max_tokens, is_apart=is_apart, num_embeddings=_num_embeddings(model)
        )
        self.fingerprint = _fingerprint(model, tokenizer)
        self._linear = find_linear(model, self._probe())
        self.reparameterizer = Reparameterizer(
            model, [x.name for x in self._linear if x.is_bendable], self.dtype
        )
        # Whether a text is continued in a row of its own; `slm.backbone.trial` sets it where it is found out.
        self.is_reading_apart = kind is BackboneKind.SEQUENCE_TO_SEQUENCE
        self.merged: Merge | None = None  # set by `slm.backbone.merge` alone
        self.lock = threading.RLock()

    def _probe(self) -> dict[str, Tensor]:
        """Two short rows, to see which layers run on what."""
        row = Row(tuple(self.renderer.tokenizer(_PROBE)["input_ids"][:3]), (0, 3))
        return self.inputs(self.batch([row, row]))

    @property
    def num_channels(self) -> int:
        """C, the width of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """The number of blocks the query can be read from: all, or those of the encoder."""
        return len(self.blocks)

    def settled(self, given: BackboneConfig) -> BackboneConfig:
        """How this backbone was loaded, as a store that is made with it writes it down.

        Args:
            given: what that store shall say; a setting at its default says nothing.

        Raises:
            ConfigError: it says something else.
        """
        usual, own = asdict(BackboneConfig()), asdict(self.config)
        wanted = {name: value for name, value in asdict(given).items() if value != usual[name]}
        is_formatted = self.kind is BackboneKind.CAUSAL
        in_other_words = {
            "dtype": (str(self.dtype).removeprefix("torch."),),
            "device": (str(self.device), self.device.type),
            "max_tokens": (self.renderer.max_tokens,),
            "prompt_format": (self.renderer.prompt_format,) if is_formatted else ("chat", "plain"),
        }
        misfits = [
            f"backbone.{name} is {value!r}, {self.source!r} was loaded with {own[name]!r}"
            for name, value in wanted.items()
            if value != own[name] and value not in in_other_words.get(name, ())
        ]
        if misfits:
            raise ConfigError(
                "; ".join(misfits) + ": leave the setting out, or load the backbone with it beforehand"
            )
        return replace(self.config, **wanted)

    def misreadings(self, kept: BackboneConfig) -> list[str]:
        """How prompts become other rows here than under the settings that a store keeps; a line for each."""
        expected = _reading(self.kind, self.renderer.tokenizer, kept, self.window)
        found = (self.renderer.prompt_format, self.renderer.max_tokens)
        return [
            f"{name} {want!r}, not {have!r}"
            for name, want, have in zip(("prompt_format", "max_tokens"), expected, found, strict=True)
            if want != have
        ]

    def targets(self, which: str, first_block: int) -> list[str]:
        """Names of the layers that increments change; see :func:`slm.backbone.targets.choose_targets`."""
        return choose_targets(self._linear, which, first_block)

    def bendable(self, first_block: int) -> set[str]:
        """Names of all layers from a block on that can be re-parameterized row by row."""
        return {layer.name for layer in self._linear if layer.is_bendable and layer.block >= first_block}

    @contextlib.contextmanager
    def learning_attention(self) -> Iterator[None]:
        """Unfused attention within the block on a CPU: its fused kernel is slow backwards (docs/log.md)."""
        usual = self.model.config._attn_implementation
        if self.device.type == "cpu":
            self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)

    def row(self, prompt: Prompt, target: str | None = None, **options: Any) -> Row:
        """Tokenize one prompt; see :meth:`slm.backbone.prompts.Renderer.row`."""
        return self.renderer.row(prompt, target, **options)

    def question_rows(
        self, prompts: Sequence[Prompt], *, is_truncating: bool, max_new_tokens: int = 128
    ) -> list[Row]:
        """Tokenize questions; an error gives the number of the one it is about, from 1.

        Args:
            prompts: the questions.
            is_truncating: cut the middle out of an over-long question instead of refusing it.
            max_new_tokens: what is cut leaves room in the window for an answer of so many tokens, of 128 at
                least, and never more than half of the window.

        Raises:
            DataError: a question is empty or too long, or neither text nor a conversation.
        """
        most = None
        if is_truncating and self.kind is BackboneKind.CAUSAL:
            most = self.window - min(max(max_new_tokens, 128), self.window // 2)
        return [
            self.row(prompt, is_truncating=is_truncating, where=f"question {i}", most_tokens=most)
            for i, prompt in enumerate(prompts, start=1)
        ]

    def room_behind(self, rows: Sequence[Row]) -> int:
        """Tokens of the window that are left for answers behind the longest of some questions."""
        if self.renderer.is_apart:
            return self.window
        return self.window - max((len(row.prompt) for row in rows), default=0)

    def check_room(self, rows: Sequence[Row], max_new_tokens: int) -> None:
        """Expect answers of so many tokens to fit into the window, behind the question where it stands there.

        Raises:
            ConfigError: they do not, or there would be none.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}: raise it")
        if self.kind is BackboneKind.ENCODER:
            return
        room = self.room_behind(rows)
        if max_new_tokens > room:
            question = (
                f" and the longest question has {self.window - room} tokens" if room < self.window else ""
            )
            mend = f"lower max_new_tokens to at most {room}"
            if room < 1:
                mend = "shorten it, or allow cutting its middle out (--truncate, is_truncating=True)"
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}{question}, the "
                f"window of the backbone holds {self.window}: {mend}"
            )

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pad rows for this backbone and move them to its device."""
        return self.renderer.batch(rows, self.side).to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward that a batch stands for.

        The decoder of a sequence-to-sequence model is given the start token and then the answers but
        for their last token, so position i predicts ``batch.targets[:, i]``.
        """
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        if self.kind is BackboneKind.CAUSAL:
            inputs["position_ids"] = batch.positions
        if self.start_id is not None:
            answers = batch.targets[:, :-1]
            answers = answers.masked_fill(answers == IGNORED, self.renderer.pad_id)
            first = answers.new_full((len(answers), 1), self.start_id)
            inputs["decoder_input_ids"] = torch.cat([first, answers], dim=1)
        return inputs

    def hidden(self, batch: Batch) -> Float[Tensor, "B T C"]:
        """Last hidden state of an encoder, with whatever is bound."""
        hidden: Tensor = self.model(**self.inputs(batch)).last_hidden_state
        return hidden

    def pooled(self, batch: Batch) -> Float[Tensor, "B C"]:
        """Mean last hidden state of an encoder's rows, in float32: what a head reads."""
        return pool_mean(self.hidden(batch), batch.mask)

    @contextlib.contextmanager
    def reading_query(
        self, batch: Batch, parts: Sequence[tuple[int, str]], decide: Callable[[Tensor], None]
    ) -> Iterator[None]:
        """Within the block, the next forward pass hands ``decide`` the query as soon as it is known.

        The query of a row is the concatenation, over ``parts``, of its own words' hidden states after a
        layer, pooled one way or another (:func:`slm.backbone.heads.pool_words`, method section 2c);
        (B, len(parts)·C) float32. Layer 0 is the input of the first block.
        """
        layers = sorted({layer for layer, _ in parts})
        found: dict[tuple[int, str], Tensor] = {}

        def keep(layer: int, hidden: Any) -> None:
            own = [part for part in parts if part[0] == layer]
            if own[0] in found:
                return  # decoding steps: the mixture was decided at prefill
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            found.update({part: pool_words(hidden, batch.content, part[1]) for part in own})
            if layer == layers[-1]:
                decide(torch.cat([found[part] for part in parts], dim=1))

        hooks = []
        for layer in layers:
            if layer > self.num_layers:
                raise ConfigError(f"layers has {layer}, the backbone has {self.num_layers}: lower it")
            if layer == 0:
                hooks.append(
                    self.blocks[0].register_forward_pre_hook(
                        lambda _m, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                )
            else:
                hooks.append(
                    self.blocks[layer - 1].register_forward_hook(
                        lambda _m, _a, output, layer=layer: keep(layer, output)
                    )
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def queries(self, batch: Batch, parts: Sequence[tuple[int, str]]) -> Float[Tensor, "B C"]:
        """The queries of a batch from a frozen pass that stops where the last layer of ``parts`` ends."""
        found: list[Tensor] = []

        def stop(query: Tensor) -> None:
            found.append(query)
            raise _QueryRead

        inputs = self.inputs(batch)
        inputs.pop("decoder_input_ids", None)
        with self.reading_query(batch, parts, stop), contextlib.suppress(_QueryRead):
            self._reader()(**inputs)
        return found[0]

    def _reader(self) -> Any:
        """The part of the model that reads prompts: its encoder, or all but a language-model head."""
        if self.kind is BackboneKind.SEQUENCE_TO_SEQUENCE:
            return self.model.get_encoder()
        return getattr(self.model, self.model.base_model_prefix, self.model)


def _num_embeddings(model: Any) -> int | None:
    """Rows of the model's table of tokens; None where it does not say them."""
    found: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return found


def _reading(kind: BackboneKind, tokenizer: Any, config: BackboneConfig, window: int) -> tuple[str, int]:
    """Prompt format, which is raw for whatever has an encoder, and max_tokens under some settings."""
    wanted = config.prompt_format
    if wanted == "auto":
        wanted = "chat" if tokenizer.chat_template else "plain"
    prompt_format = wanted if kind is BackboneKind.CAUSAL else "raw"
    return prompt_format, config.max_tokens or min(window, 512)


def _window(model: Any) -> int:
    """The longest row in tokens; 512 where the model's config sets no limit.

    Position tables that keep places for padding (RoBERTa's, say) hold that many rows less. Rotary positions
    that a longer row changes for its whole batch (``longrope``, ``dynamic``) reach as far as they stay.
    """
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    window = int(next(filter(None, named), 512))
    rope: Any = getattr(config, "rope_parameters", None) or {}
    for own in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if own.get("rope_type") in ("longrope", "dynamic"):
            original = own.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            window = min(window, int(original or window))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            window = min(window, module.num_embeddings - module.padding_idx - 1)
    return window


def _start_id(source: str, model: Any) -> int:
    """The token a decoder starts from."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise BackboneError(f"backbone {source!r} has no decoder_start_token_id: set one in its config.json")


def _fingerprint(model: Any, tokenizer: Any, num_samples: int = 512) -> str:
    """A sha256 that changes with the weights, their shapes or the tokenizer, but not with the dtype.

    A quantised copy is another backbone, known by its codes: what one has learned is not exact on the other.
    """
    digest = hashlib.sha256()
    whole = sorted(model.state_dict().items())
    for name, tensor in (part for item in whole for part in stored_parts(*item)):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // num_samples)
        sample = flat[::step].contiguous().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes()
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + sample)
    digest.update(json.dumps([len(tokenizer), tokenizer(_PROBE)["input_ids"]]).encode())
    return digest.hexdigest()
