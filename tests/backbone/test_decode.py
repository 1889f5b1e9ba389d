"""Label scoring and generation against the model's own slow way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slm.backbone import decode
from slm.backbone.decode import prefill, score_labels
from slm.backbone.generate import generate
from slm.backbone.prompts import IGNORED
from slm.errors import DataError
from tests.backbone.families import load, save

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


def test_few_rows_at_a_time_score_labels_as_all_at_once(smollm2, start, monkeypatch):
    labels = [["Paris", "London", "New York City"], ["yes", "no"], ["New Orleans", "maybe so"]]
    expected = score_labels(smollm2, start, [0, 2, 1], labels)
    passes = []
    forward = smollm2.model.forward
    monkeypatch.setattr(decode, "MAX_LOGITS", 1)
    monkeypatch.setattr(
        smollm2.model, "forward", lambda **x: (passes.append(len(x["input_ids"])), forward(**x))[1]
    )
    for found, own in zip(score_labels(smollm2, start, [0, 2, 1], labels), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert passes == [1, 1, 1]


def test_a_label_that_does_not_fit_behind_its_prompt_is_refused(tmp_path):
    backbone = load(save("GPT-2", tmp_path / "model"))
    row = replace(
        backbone.row("a question", is_truncating=False, where="row"), prompt=(5,) * 127, content=(0, 127)
    )
    start = prefill(backbone, backbone.batch([row]))
    assert backbone.window == 128
    with pytest.raises(
        DataError, match=r"a question of 127 tokens leaves 1 of the window's 128 to its labels"
    ):
        score_labels(backbone, start, [0], [["no", "quite wonderful indeed, and more"]])


def test_generating_from_the_prefill_equals_generating_from_the_prompt(smollm2, start):
    fast = generate(smollm2, start, [1, 0], 16)
    for (answer,), prompt in zip(fast, (PROMPTS[1], PROMPTS[0]), strict=True):
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
