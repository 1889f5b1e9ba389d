"""The frozen Hugging Face model, its tokenizer, and the passes the rest of slm asks of it."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slm.backbone.heads import pool_mean, pool_words
from slm.backbone.prompts import Batch, Prompt, Renderer, Row
from slm.backbone.reparameterize import Reparameterizer
from slm.backbone.targets import choose_targets, find_blocks, find_linear
from slm.config import BackboneConfig
from slm.errors import BackboneError, ConfigError

_PROBE = "The quick brown fox: 1234, naïve café?"


class BackboneKind(str, enum.Enum):
    """What a backbone is: it decides how an answer is read from it."""

    ENCODER = "encoder"
    CAUSAL = "causal"


class _QueryRead(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass early, once the last layer the query needs has run."""


class Backbone:
    """A frozen model. Nothing here learns, and nothing here knows of tasks.

    Every linear layer of every block is wrapped once; with nothing bound it is the layer itself, so several
    stores may share one backbone. What is bound belongs to one request: hold ``lock`` from binding to answer.

    Args:
        source: what the user called it.
        kind: encoder or causal.
        model: the transformers model, on its device.
        tokenizer: its tokenizer.
        config: window and prompt format.
    """

    def __init__(
        self, source: str, kind: BackboneKind, model: Any, tokenizer: Any, config: BackboneConfig
    ) -> None:
        self.source = source
        self.kind = kind
        self.model = model.eval().requires_grad_(False)
        self.blocks = find_blocks(model)[1]
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        if kind is BackboneKind.CAUSAL and tokenizer.eos_token_id is None:
            raise BackboneError(
                f"the tokenizer of {source!r} has no end token: set one in its tokenizer_config"
            )
        self.window = int(getattr(model.config, "max_position_embeddings", None) or 512)
        if config.max_tokens is not None and config.max_tokens > self.window:
            raise ConfigError(
                f"max_tokens is {config.max_tokens}, the window of {source!r} holds {self.window}: lower it"
            )
        wanted = config.prompt_format
        if wanted == "auto":
            wanted = "chat" if tokenizer.chat_template else "plain"
        prompt_format = "raw" if kind is BackboneKind.ENCODER else wanted
        self.renderer = Renderer(tokenizer, prompt_format, config.max_tokens or min(self.window, 512))
        self.fingerprint = _fingerprint(model, tokenizer)
        self.side = "right" if kind is BackboneKind.ENCODER else "left"
        self._linear = find_linear(model)
        self.reparameterizer = Reparameterizer(model, [layer.name for layer in self._linear])
        self.lock = threading.RLock()

    @property
    def num_channels(self) -> int:
        """C, the width of a hidden state."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """The number of transformer blocks."""
        return len(self.blocks)

    def targets(self, which: str, first_block: int) -> list[str]:
        """Names of the layers that increments change; see :func:`slm.backbone.targets.choose_targets`."""
        return choose_targets(self._linear, which, first_block)

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

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pad rows for this backbone and move them to its device."""
        return self.renderer.batch(rows, self.side).to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward that a batch stands for."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        if self.kind is BackboneKind.CAUSAL:
            inputs["position_ids"] = batch.positions
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

        with self.reading_query(batch, parts, stop), contextlib.suppress(_QueryRead):
            self._base()(**self.inputs(batch))
        return found[0]

    def _base(self) -> Any:
        """The model without its language-model head."""
        return getattr(self.model, self.model.base_model_prefix, self.model)


def _fingerprint(model: Any, tokenizer: Any, num_samples: int = 512) -> str:
    """A sha256 that changes with the weights, their shapes or the tokenizer, but not with the dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // num_samples)
        sample = flat[::step].contiguous().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes()
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + sample)
    digest.update(json.dumps([len(tokenizer), tokenizer(_PROBE)["input_ids"]]).encode())
    return digest.hexdigest()
