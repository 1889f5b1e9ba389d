"""Settings, as frozen dataclasses. One docstring per field; every mistake of a mapping is reported at once.

A config is plain data: it loads no model, and ``as_dict`` / ``from_mapping`` are inverse, which is how a
store remembers the settings it was made with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from slm.checked import CheckedConfig

MAX_SEED = 2**32 - 1
"""Largest seed that every library takes."""

MAX_NORM = 1e30
"""Largest norm that gradients are clipped to: JSON, which a store writes, knows no infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig(CheckedConfig):
    """How the frozen model is loaded and fed."""

    dtype: str = "auto"
    """``auto``, ``float32`` or ``bfloat16``; auto is bfloat16 where that is the faster."""
    device: str = "auto"
    """``auto`` (a GPU where there is one) or a torch device name."""
    quantization: str = "none"
    """How the frozen weights are kept: ``none`` (floats), ``int8`` (torchao), ``bnb-int8`` or ``bnb-4bit``
    (bitsandbytes, NF4). Increments stay floats; a quantised copy is another backbone than its original."""
    max_tokens: int | None = None
    """Longest row in tokens, answer included; None is the backbone's own window, at most 512."""
    prompt_format: str = "auto"
    """``chat`` (the tokenizer's chat template), ``plain``, or ``auto``: chat where there is a template."""

    _choices = {
        "dtype": ("auto", "float32", "bfloat16"),
        "quantization": ("none", "int8", "bnb-int8", "bnb-4bit"),
        "prompt_format": ("auto", "chat", "plain"),
    }
    _ranges = {"max_tokens": (8, 1_000_000)}


@dataclass(frozen=True, slots=True, kw_only=True)
class IncrementConfig(CheckedConfig):
    """Shape of the low-rank increments of a task (method section 3)."""

    rank: int = 8
    """R, the rank of every pair."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / rank."""
    targets: str = "all-linear"
    """``all-linear`` layers of a block, or ``attention-output`` alone, as in the paper."""

    _choices = {"targets": ("all-linear", "attention-output")}
    _ranges = {"rank": (1, 1024), "alpha": (1e-6, 1e6)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineConfig(CheckedConfig):
    """The cosine form of DTKR: learned keys, compared in groups of channels (method section 2a).

    The defaults are the paper's; it keeps K = 4 keys per row with BERT and 2 with LLaMA (``top_k``).
    """

    num_groups: int = 6
    """G, slices of a query compared each by itself; it must divide the channels; 1 is plain cosine."""
    keys_per_task: int = 4
    """Learned keys per task, each owning an increment of its own."""
    key_mask: float = 0.2
    """Probability with which a key is masked for a row while keys are learned; 0 masks none."""
    num_epochs: int = 3
    """Passes over the task's queries while its keys are learned."""
    min_steps: int = 1000
    """Optimizer steps below which passes are added: the paper's 3 passes are 21,564 steps for its 115,000
    rows a task, but 96 for 500 rows, which leave the keys near their random start; 0 adds none."""
    batch_size: int = 16
    """Queries per step of key learning."""
    learning_rate: float = 1e-3
    """AdamW's learning rate of the keys."""
    weight_decay: float = 0.01
    """AdamW's weight decay on the keys."""
    max_grad_norm: float = 0.1
    """Gradient clipping of the keys."""

    _ranges = {
        "num_groups": (1, 65_536),
        "keys_per_task": (1, 1000),
        "key_mask": (0.0, 0.99),
        "num_epochs": (1, 10_000),
        "min_steps": (0, 10_000_000),
        "batch_size": (1, 65_536),
        "learning_rate": (1e-7, 1.0),
        "weight_decay": (0.0, 1.0),
        "max_grad_norm": (1e-6, MAX_NORM),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(CheckedConfig):
    """How much knowledge is kept near at hand; the rest is read from the store when it is asked for."""

    host_bytes: int = 1 << 30
    """Most bytes of increments in memory."""
    device_bytes: int = 1 << 30
    """Most bytes of increments on the GPU; means nothing where the backbone computes on the CPU."""
    head_bytes: int = 1 << 26
    """Most bytes of encoders' heads in memory."""

    _ranges = {"host_bytes": (0, 1 << 50), "device_bytes": (0, 1 << 50), "head_bytes": (0, 1 << 50)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig(CheckedConfig):
    """DTKR: how a text finds its knowledge (method section 2)."""

    form: str = "gaussian"
    """``gaussian`` (closed-form keys under one covariance) or ``cosine`` (the paper's learned keys)."""
    cosine: CosineConfig = field(default_factory=CosineConfig)
    """Settings of the ``cosine`` form alone."""
    extractor: str = "backbone"
    """``backbone`` (hidden states of the frozen model) or ``sentence`` (a sentence-transformers model)."""
    layers: tuple[int, ...] | None = None
    """Layers whose hidden states are concatenated to the query, 1 being the first block's output; None
    picks the measured default for the backbone's depth."""
    pooling: str | None = None
    """``ends`` reads the mean of the words after each of ``layers``, and after the last of them the last word
    and the first ones, each as signed square roots of unit norm; ``split-ends`` reads the first words after
    the first layer instead; ``mean`` reads plain means alone. None is the measured default for the
    backbone's depth: ``ends`` from 16 layers on, else ``split-ends``."""
    num_passes: int | None = None
    """1 reads the query inside the one forward pass, so increments act only above the last of
    ``layers``; 2 spends a frozen pass on the query, so increments act on every layer; None is 1 for
    backbones of 16 layers or more, else 2."""
    sentence_model: str = "minilm"
    """The encoder of the ``sentence`` extractor: an alias, a folder or a hub id."""
    keys_per_task: int | None = 1
    """Keys per task of the ``gaussian`` form, found by k-means, fewer where a task has fewer than 8 prompts a
    key; None is one key per label of two prompts and more."""
    prior: str = "uniform"
    """``uniform``, or ``size``: a key of the ``gaussian`` form is as likely beforehand as its share of all
    training rows, where what is asked is mixed as what was taught."""
    top_k: int = 2
    """K, keys kept per row."""
    min_weight: float = 0.05
    """Weights below this, but the largest, are dropped and the rest renormalised, so clear rows carry one
    increment; the paper drops none (0)."""
    temperature: float | None = None
    """Divides the log-densities before the softmax; the ``cosine`` form raises similarities to 1 over it.
    None is 8 in the ``gaussian`` form, where weights are then the shares of rows that are right
    (``docs/results/retrieval.md``), and the paper's 1 in the ``cosine`` form."""
    false_refusal_rate: float | None = None
    """Share of a task's own rows that abstention may refuse (method section 2d); None is 0.01 where the
    frozen backbone answers what is refused, and 0.001 for an encoder, which then has nothing to say."""
    is_abstaining: bool = True
    """False never abstains: every row gets the nearest knowledge."""
    has_background: bool = True
    """Whether the ``gaussian`` form also knows where text lies that belongs to no task (method section 2d);
    decided when the store is made."""
    has_runoff: bool = True
    """Whether the ``gaussian`` form asks the two nearest tasks again, under a covariance of their own, where
    both claim a row (method section 2b)."""
    index: str = "auto"
    """``exact`` (torch, all keys), ``vector`` (FAISS, opens the nearest cells of keys), or ``auto``: the
    vector index from the number of keys on where it wins."""

    @property
    def settled_temperature(self) -> float:
        """The temperature in use."""
        if self.temperature is not None:
            return self.temperature
        return 8.0 if self.form == "gaussian" else 1.0

    _choices = {
        "form": ("gaussian", "cosine"),
        "extractor": ("backbone", "sentence"),
        "pooling": ("ends", "mean", "split-ends"),
        "prior": ("uniform", "size"),
        "index": ("auto", "exact", "vector"),
    }
    _ranges = {
        "num_passes": (1, 2),
        "keys_per_task": (1, 1000),
        "top_k": (1, 64),
        "min_weight": (0.0, 0.5),
        "temperature": (1e-3, 1e6),
        "false_refusal_rate": (1e-4, 0.5),
    }

    def _mistakes(self) -> Iterator[str]:
        # Not super(): a slots dataclass is a new class, which zero-argument super() would miss.
        yield from CheckedConfig._mistakes(self)
        yield from self._misplaced()
        if "layers" in dict(self._mistyped()) or self.layers is None:
            return
        if not self.layers or any(layer < 0 for layer in self.layers):
            yield f"layers must be layer numbers from 0 (the embeddings) upwards, got {self.layers!r}"

    def settled(self, *, has_words: bool) -> RetrievalConfig:
        """The same, the false-refusal rate decided by whether the frozen backbone can answer in words."""
        if self.false_refusal_rate is not None:
            return self
        return replace(self, false_refusal_rate=0.01 if has_words else 0.001)

    def _misplaced(self) -> Iterator[str]:
        """Settings of the form that was not chosen, which would change nothing."""
        if self.form == "cosine" and self.keys_per_task != 1:
            yield f"keys_per_task ({self.keys_per_task!r}) is of the gaussian form, set cosine.keys_per_task"
        if self.form == "cosine" and self.prior == "size":
            yield "prior size is of the gaussian form, the cosine form has none: leave it uniform"
        if (
            self.form == "gaussian"
            and isinstance(self.cosine, CosineConfig)
            and self.cosine != CosineConfig()
        ):
            yield "settings of cosine have no effect in the gaussian form, set form to cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig(CheckedConfig):
    """How free text is written. Labels are scored, so nothing here changes them."""

    num_beams: int = 1
    """Beams per row; 1 is no beam search."""
    num_sequences: int = 1
    """Texts per row: the best beams, or samples."""
    temperature: float | None = None
    """Divides the logits before a token is sampled; None samples nothing and takes the likeliest."""
    top_p: float = 1.0
    """Samples only from the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Seeds the samples of a batch; other batches give other samples."""
    assistant_model: object = None
    """Refused: transformers runs assisted generation for one row at a time, which would undo the batch."""
    prompt_lookup_num_tokens: object = None
    """Refused for the same reason."""

    _ranges = {
        "num_beams": (1, 64),
        "num_sequences": (1, 64),
        "temperature": (1e-3, 1e3),
        "top_p": (1e-3, 1.0),
        "seed": (0, MAX_SEED),
    }

    @property
    def is_beam_search(self) -> bool:
        """Whether several beams compete."""
        return self.num_beams > 1

    def _mistakes(self) -> Iterator[str]:
        yield from CheckedConfig._mistakes(self)
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if getattr(self, name) is not None:
                yield (
                    f"{name} asks for assisted generation, which takes one row at a time and is refused: "
                    "leave it out"
                )
        if dict(self._mistyped()):
            return
        if self.is_beam_search and self.temperature is not None:
            yield f"num_beams is {self.num_beams} and temperature {self.temperature:g}: set one of the two"
        if self.top_p < 1 and self.temperature is None:
            yield f"top_p is {self.top_p:g} and no temperature says to sample: set one, or leave top_p out"
        if self.num_sequences > 1 and self.temperature is None and self.num_sequences > self.num_beams:
            yield (
                f"num_sequences is {self.num_sequences} with num_beams {self.num_beams} and no temperature: "
                "raise num_beams to at least as many, or set a temperature to sample"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig(CheckedConfig):
    """How a task is fine-tuned."""

    learning_rate: float = 5e-4
    """Peak of the schedule for the increment; none of it reaches the frozen backbone."""
    head_learning_rate: float = 1e-2
    """Peak for the classification head, which starts from zero."""
    num_epochs: int = 10
    """Most passes over the task's training split; early stopping usually ends sooner."""
    patience: int = 2
    """Epochs without a better validation loss before training stops."""
    batch_size: int | None = None
    """Rows per optimizer step on one process. None is a fiftieth of the task's examples, at least 4 and at
    most 16, so that few examples make many steps too; the record of a task says what it was."""
    weight_decay: float = 0.01
    """AdamW's weight decay on the increments."""
    warmup_share: float = 0.06
    """Share of the steps spent warming up."""
    max_grad_norm: float | None = 1.0
    """Gradient clipping; None clips nothing."""
    dropout: float = 0.0
    """Dropout on the input of every increment while learning."""
    validation_share: float = 0.1
    """Share of the task's own rows kept for early stopping."""
    seed: int = 0
    """Seeds initialisation, order and split; the same seed gives the same bytes on one machine."""
    start: str = "none"
    """``none`` (every task is learned alone, so the order of tasks does not matter), or ``retrieved``: an
    encoder's new task may start from earlier tasks' increments, where its own rows say that this helps."""
    is_truncating: bool = False
    """True cuts the middle out of over-long texts; False refuses them with their row number."""
    checkpoint_folder: str | None = None
    """Where Trainer keeps checkpoints, so that an interrupted ``learn`` resumes; None keeps none."""
    has_progress: bool = True
    """Whether progress bars are shown on standard error."""

    _choices = {"start": ("none", "retrieved")}
    _ranges = {
        "learning_rate": (1e-7, 1.0),
        "head_learning_rate": (1e-7, 1.0),
        "num_epochs": (1, 10_000),
        "patience": (1, 10_000),
        "batch_size": (1, 65_536),
        "weight_decay": (0.0, 1.0),
        "warmup_share": (0.0, 1.0),
        "max_grad_norm": (1e-6, MAX_NORM),
        "dropout": (0.0, 0.9),
        "validation_share": (0.0, 0.5),
        "seed": (0, MAX_SEED),
    }

    def rows_per_step(self, num_examples: int) -> int:
        """The batch size for a task of so many examples."""
        return self.batch_size or min(max(num_examples // 50, 4), 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(CheckedConfig):
    """Everything a store is created with. Learning settings may be changed per task."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen model."""
    increments: IncrementConfig = field(default_factory=IncrementConfig)
    """The increments every new task gets."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """DTKR."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Byte budgets."""
    learning: LearningConfig = field(default_factory=LearningConfig)
    """Defaults of ``learn``."""
