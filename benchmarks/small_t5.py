"""A small T5 of our own: 4 million parameters, pretrained for some minutes on texts that packages carry.

    python benchmarks/small_t5.py --model ~/.cache/slm/small-t5

BBC articles, film reviews and English questions. Its word vectors start as those that explain which words
stand near each other; then a third of the steps fill gaps (T5's own exercise), the others say the topic of an
article or question, or whether a review is positive. No benchmark's task is among them. It is written once,
tokenizer included; ``pretraining.json`` in the folder says how it went.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slm.tasks import Example
from slm.tasks.packaged import bbc_topics, film_sentiment, question_topics

NUM_STEPS = 1000
BATCH_SIZE = 32
NUM_TOKENS = 64
PEAK_RATE = 1e-2
NUM_WARMUP = 20
VOCABULARY = 6000
NUM_GAPS = 16
PAD, END = "<pad>", "</s>"
GAPS = [f"<gap_{i}>" for i in range(NUM_GAPS)]
SHAPE = {
    "d_model": 192,
    "d_kv": 48,
    "d_ff": 576,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
SHARES = {"gaps": 0.33, "film-sentiment": 0.37, "bbc-topics": 0.2, "question-topics": 0.1}
"""Share of the steps per exercise."""

Pair = tuple[list[int], list[int]]


def exercises() -> tuple[dict[str, Sequence[Example]], dict[str, Sequence[Example]]]:
    """Labelled examples to learn from, and others to measure what was learned."""
    tasks = (bbc_topics(1900, 200), film_sentiment(12_000, 400), question_topics(450, 50))
    return {task.name: task.examples for task in tasks}, {task.name: task.test for task in tasks}


def train_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level tokenizer of lower-case texts."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *GAPS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=GAPS,
    )


def with_gaps(ids: Sequence[int], gap_ids: Sequence[int], rng: random.Random) -> Pair:
    """Spans of 1 to 5 tokens, a sixth of a text, replaced by marks; the spans, each behind its mark."""
    given: list[int] = []
    wanted: list[int] = []
    at = num_gaps = 0
    while at < len(ids):
        if num_gaps < len(gap_ids) and rng.random() < 0.06:
            length = rng.randint(1, 5)
            given.append(gap_ids[num_gaps])
            wanted += [gap_ids[num_gaps], *ids[at : at + length]]
            num_gaps += 1
        else:
            length = 1
            given.append(ids[at])
        at += length
    return given, wanted


def window(ids: Sequence[int], rng: random.Random) -> list[int]:
    """A piece of a text, one time in two its beginning."""
    last = max(0, len(ids) - NUM_TOKENS)
    start = rng.randint(0, last) if rng.random() < 0.5 else 0
    return list(ids[start : start + NUM_TOKENS])


class Exercises:
    """Draws batches of one exercise each.

    Args:
        labelled: examples by exercise.
        words: the tokenizer.
        seed: of the draws.
    """

    def __init__(self, labelled: dict[str, Sequence[Example]], words: Any, seed: int) -> None:
        self.words = words
        self.rng = random.Random(seed)
        self.gap_ids = words.convert_tokens_to_ids(GAPS)
        self.rows = {}
        for name, examples in labelled.items():
            texts = words([str(e.prompt) for e in examples], add_special_tokens=False)["input_ids"]
            labels = words([str(e.target) for e in examples], add_special_tokens=False)["input_ids"]
            self.rows[name] = list(zip(texts, labels, strict=True))
        self.texts = [text for name in self.rows for text, _ in self.rows[name] if len(text) > 8]

    def draw(self) -> tuple[str, list[Pair]]:
        """Name of an exercise, and its pairs, without end tokens."""
        name = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        if name == "gaps":
            texts = self.rng.choices(self.texts, k=BATCH_SIZE)
            return name, [with_gaps(window(text, self.rng), self.gap_ids, self.rng) for text in texts]
        rows = self.rng.choices(self.rows[name], k=BATCH_SIZE)
        return name, [(window(text, self.rng), label) for text, label in rows]

    def batch(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Padded, with end tokens, as the model's forward takes it."""
        end = self.words.eos_token_id
        given = self.words.pad({"input_ids": [[*a, end] for a, _ in pairs]}, return_tensors="pt")
        wanted = self.words.pad({"input_ids": [[*b, end] for _, b in pairs]}, return_tensors="pt")
        labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}


def word_vectors(
    texts: Sequence[Sequence[int]], vocabulary: int, seed: int, reach: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Word vectors: a factorised table of how much oftener than by chance tokens stand near each other.

    Returns:
        (V, C) of root mean square 1, and (V,) whether a token was seen.
    """
    ids = np.concatenate([np.array([*text[:256], -1]) for text in texts])
    counts = np.zeros(vocabulary * vocabulary, dtype=np.float32)
    for distance in range(1, reach + 1):
        one, other = ids[:-distance], ids[distance:]
        inside = (one >= 0) & (other >= 0)
        counts += np.bincount(one[inside] * vocabulary + other[inside], minlength=len(counts))
    table = torch.from_numpy(counts.reshape(vocabulary, vocabulary))
    table = table + table.T
    total = table.sum(1)
    chance = total[:, None] * (total**0.75 / (total**0.75).sum())
    lead = torch.where(table > 0, (table / chance.clamp(min=1e-9)).clamp(min=1.0).log(), 0.0)
    torch.manual_seed(seed)
    left, sizes, _ = torch.svd_lowrank(lead, q=SHAPE["d_model"], niter=2)
    vectors = left * sizes.sqrt()
    vectors = vectors - vectors.mean(0)
    return vectors / vectors.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6), total > 0


def train(model: Any, drawn: Exercises, num_steps: int) -> dict[str, list[float]]:
    """Fit a model to the exercises, as T5's authors did, and return the losses of each."""
    optimizer = transformers.Adafactor(model.parameters(), lr=PEAK_RATE, relative_step=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / NUM_WARMUP, 1.2 * (1 - step / num_steps), 1.0)
    )
    begun = time.perf_counter()
    losses: dict[str, list[float]] = {name: [] for name in SHARES}
    for step in range(1, num_steps + 1):
        name, pairs = drawn.draw()
        loss = model(**drawn.batch(pairs)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[name].append(float(loss.detach()))
        if step % 100 == 0:
            recent = {name: round(mean_of_last(own), 3) for name, own in losses.items()}
            print(f"step {step}/{num_steps}, {time.perf_counter() - begun:.0f} s, loss {recent}", flush=True)
    return losses


def mean_of_last(losses: Sequence[float]) -> float:
    """Mean of the last twenty, 0 where there are none."""
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


def pretrain(folder: Path, seed: int = 0, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Train the model, write it to a folder as transformers does, and say how it went."""
    begun = time.perf_counter()
    torch.manual_seed(seed)
    labelled, held = exercises()
    words = train_tokenizer(str(e.prompt) for name in labelled for e in labelled[name])
    drawn = Exercises(labelled, words, seed)
    config = transformers.T5Config(
        vocab_size=len(words), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **SHAPE
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    with torch.no_grad():
        vectors, is_known = word_vectors(drawn.texts, len(words), seed)
        model.shared.weight[is_known] = vectors[is_known]
    losses = train(model, drawn, num_steps)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    report = {
        "num_parameters": model.num_parameters(),
        "num_steps": num_steps,
        "batch_size": BATCH_SIZE,
        "seed": seed,
        "time_s": time.perf_counter() - begun,
        "last_losses": {name: mean_of_last(own) for name, own in losses.items()},
        "held_out_accuracy": {name: accuracy(model, drawn, held[name], labelled[name]) for name in held},
    }
    (folder / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@torch.no_grad()
def accuracy(model: Any, drawn: Exercises, examples: Sequence[Example], known: Sequence[Example]) -> float:
    """Share of unseen examples whose label text is the likeliest of the exercise's."""
    labels = sorted({str(example.target) for example in known})
    ids = drawn.words(labels, add_special_tokens=False)["input_ids"]
    right = 0
    for example in examples:
        text = drawn.words(str(example.prompt), add_special_tokens=False)["input_ids"][:NUM_TOKENS]
        batch = drawn.batch([(text, label) for label in ids])
        log_probs = model(**batch).logits.log_softmax(-1)
        counted = batch["labels"] != -100
        found = log_probs.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
        right += labels[int((found * counted).sum(1).argmax())] == example.target
    return right / len(examples)


def main() -> None:
    """Pretrain into the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    args = parser.parse_args()
    print(json.dumps(pretrain(args.model, args.seed, args.steps), indent=1))


if __name__ == "__main__":
    main()
