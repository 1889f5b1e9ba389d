"""Label scoring and generation against the model's own slow way."""

from __future__ import annotations

import pytest
import torch

from slm.backbone.decode import generate, prefill, score_labels
from slm.backbone.prompts import IGNORED

PROMPTS = ["What is the capital of France?", "Name three colours of the rainbow, please.", "Is water wet?"]


@pytest.fixture(scope="module")
def start(smollm2):
    smollm2.reparameterizer.release()
    rows = [smollm2.row(prompt, is_truncating=False, where="row") for prompt in PROMPTS]
    return prefill(smollm2, smollm2.batch(rows))


def test_label_scores_are_the_log_probabilities_of_each_text_run_alone(smollm2, start):
    labels = [["Paris", "London", "New York City"], ["yes", "no"]]
    scores = score_labels(smollm2, start, [0, 2], labels)
    for prompt, texts, own in zip((PROMPTS[0], PROMPTS[2]), labels, scores, strict=True):
        for text, score in zip(texts, own, strict=True):
            batch = smollm2.batch([smollm2.row(prompt, text, is_truncating=False, where="row")])
            with torch.no_grad():
                log_probs = smollm2.model(**smollm2.inputs(batch)).logits.log_softmax(-1)[0]
            counted = batch.targets[0] != IGNORED
            slow = log_probs[counted].gather(1, batch.targets[0][counted][:, None]).sum()
            assert float(score) == pytest.approx(float(slow), abs=1e-3)


def test_generating_from_the_prefill_equals_generating_from_the_prompt(smollm2, start):
    fast = generate(smollm2, start, [1, 0], 16)
    for answer, prompt in zip(fast, (PROMPTS[1], PROMPTS[0]), strict=True):
        batch = smollm2.batch([smollm2.row(prompt, is_truncating=False, where="row")])
        with torch.no_grad():
            ids = smollm2.model.generate(
                input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=16, do_sample=False
            )[0, batch.ids.shape[1] :]
        slow = smollm2.renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.text == slow
        assert 0 < answer.confidence <= 1


def test_the_query_excludes_what_every_prompt_shares(smollm2):
    row = smollm2.row("hello", is_truncating=False, where="row")
    words = smollm2.renderer.tokenizer.decode(row.prompt[row.content[0] : row.content[1]])
    assert words == "hello"


def test_queries_do_not_depend_on_padding(smollm2, minilm):
    poolings = ("mean", "even-mean", "last", "first")
    for backbone, layers in ((smollm2, (2, 4)), (minilm, (0, 1, 3))):
        parts = [(layer, pooling) for layer in layers for pooling in poolings]
        rows = [backbone.row(prompt, is_truncating=False, where="row") for prompt in PROMPTS]
        together = backbone.queries(backbone.batch(rows), parts)
        for i, row in enumerate(rows):
            alone = backbone.queries(backbone.batch([row]), parts)
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
