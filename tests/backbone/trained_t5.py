"""A small T5 that has really learned something: packaged texts with gaps, for a quarter of a minute."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from slm.tasks.packaged import bbc_topics, question_languages
from tests.backbone.families import NUM_BLOCKS, TEMPLATES, VOCABULARY, tokenizer

NUM_STEPS = 250
BATCH_SIZE = 16
NUM_TOKENS = 40


def gapped(ids: Sequence[int], mask_id: int, eos_id: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's own exercise: spans of a text replaced by a mark, and the spans, each behind that mark."""
    given: list[int] = []
    wanted: list[int] = []
    at = 0
    while at < len(ids):
        if rng.random() < 0.08:
            length = rng.randint(1, 4)
            given.append(mask_id)
            wanted += [mask_id, *ids[at : at + length]]
        else:
            length = 1
            given.append(ids[at])
        at += length
    return [*given, eos_id], [*wanted, eos_id]


def texts(num_articles: int = 200, num_questions: int = 600) -> list[str]:
    """Sentences of news articles and questions in ten languages."""
    articles = [str(example.prompt) for example in bbc_topics(num_articles, 0).examples]
    lines = [line for text in articles for line in text.split("\n") if len(line) > 40]
    return lines + [str(example.prompt) for example in question_languages(num_questions, 0).examples]


def train_t5(folder: Path) -> float:
    """Train the model, write it to a folder as transformers does, and return its last losses' mean."""
    words = tokenizer(TEMPLATES["sequence-to-sequence"])
    torch.manual_seed(0)
    rng = random.Random(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=NUM_BLOCKS,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=NUM_STEPS)
    rows = [ids for ids in words(texts(), add_special_tokens=False)["input_ids"] if len(ids) > 4]
    losses = []
    for _ in range(NUM_STEPS):
        chosen = [ids[:NUM_TOKENS] for ids in rng.sample(rows, BATCH_SIZE)]
        pairs = [gapped(ids, words.mask_token_id, words.eos_token_id, rng) for ids in chosen]
        given = words.pad({"input_ids": [a for a, _ in pairs]}, return_tensors="pt")
        wanted = words.pad({"input_ids": [b for _, b in pairs]}, return_tensors="pt")["input_ids"]
        labels = wanted.masked_fill(wanted == words.pad_token_id, -100)
        loss = model(**given, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return sum(losses[-50:]) / 50
