"""Rendering and padding."""

from __future__ import annotations

import copy
from datetime import date
from unittest.mock import Mock

import pytest
import torch

from slm.backbone import prompts
from slm.backbone.prompts import IGNORED, Renderer
from slm.errors import BackboneError, DataError


def test_answers_are_predicted_from_the_last_prompt_token_on(smollm2):
    rows = [
        smollm2.row(p, a, is_truncating=False, where="row")
        for p, a in (("hi", "yes"), ("a longer one", "no no"))
    ]
    batch = smollm2.batch(rows)
    for i, row in enumerate(rows):
        counted = (batch.targets[i] != IGNORED).nonzero()[:, 0]
        assert batch.targets[i][counted].tolist() == list(row.target)
        assert row.target[-1] == smollm2.renderer.tokenizer.eos_token_id
        assert batch.ids[i][counted[0]] == row.prompt[-1]
    assert bool(batch.mask[:, -1].all())  # left padding: every row ends in the last column


def test_a_conversation_is_rendered_by_the_chat_template(smollm2):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    text = smollm2.renderer.render(messages)
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert text.endswith("<|im_start|>assistant\n")


def test_a_date_that_a_chat_template_names_is_none_of_the_users_words(smollm2, monkeypatch):
    tokenizer = copy.deepcopy(smollm2.renderer.tokenizer)
    tokenizer.chat_template = "given below"
    days = iter(["29 Nov 2026"] * 3 + ["30 Nov 2026"] * 3)
    rendered = tokenizer.apply_chat_template

    def on_a_day(messages, **options):
        tokenizer.chat_template = f"Today: {next(days)}\n\n{{{{ messages[0]['content'] }}}}\n"
        return rendered(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", on_a_day)
    renderer = Renderer(tokenizer, "chat", 128)
    for day in (29, 30):
        monkeypatch.setattr(prompts, "date", Mock(today=lambda day=day: date(2026, 11, day)))
        row = renderer.row("hello", is_truncating=False, where="row")
        assert f"{day} Nov" in tokenizer.decode(row.prompt)
        assert tokenizer.decode(row.prompt[slice(*row.content)]).strip() == "hello"


def test_the_middle_of_an_over_long_text_is_cut_out_and_both_ends_stay(minilm):
    text = "first " + "filler " * 500 + "last"
    with pytest.raises(
        DataError, match=r"^row 3 has 1004 tokens, the window holds 128: shorten it, or allow cutting"
    ):
        minilm.row(text, is_truncating=False, where="row 3")
    row = minilm.row(text, is_truncating=True, where="row 3")
    words = minilm.renderer.tokenizer.decode(row.prompt)
    assert len(row.prompt) == 128
    assert words.startswith("[CLS] first")
    assert words.endswith("last [SEP]")


def test_an_over_long_answer_loses_its_end_and_the_prompt_keeps_both_of_its_own(smollm2):
    row = smollm2.row("start " + "so " * 300 + "stop", "yes " * 300, is_truncating=True, where="row")
    decode = smollm2.renderer.tokenizer.decode
    assert len(row.prompt) == len(row.target) == 64
    assert decode(row.target).startswith("yes yes")
    assert "<|im_start|>assistant" in decode(row.prompt)
    short = smollm2.row("why?", "yes " * 300, is_truncating=True, where="row")
    assert len(short.prompt) + len(short.target) == 128


def test_chat_without_a_template_is_refused(minilm):
    with pytest.raises(
        BackboneError, match=r"needs a tokenizer with a chat template, this one has none: use 'plain'"
    ):
        Renderer(minilm.renderer.tokenizer, "chat", 128)


def test_a_pad_token_that_the_backbone_has_no_row_for_is_not_used(smollm2):
    tokenizer = copy.deepcopy(smollm2.renderer.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    new, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    sizes = {None: new, new + 1: new, new: end, end: 0}
    found = {size: Renderer(tokenizer, "plain", 128, num_embeddings=size).pad_id for size in sizes}
    assert found == sizes


def test_positions_count_only_real_tokens(smollm2):
    rows = [smollm2.row(p, is_truncating=False, where="row") for p in ("hi", "a much longer text than that")]
    batch = smollm2.batch(rows)
    for i in range(2):
        assert torch.equal(batch.positions[i][batch.mask[i]], torch.arange(int(batch.mask[i].sum())))


@pytest.mark.parametrize("which", ["minilm", "smollm2"])
def test_a_row_taken_out_of_a_batch_is_the_one_that_was_never_in_it(which, request):
    backbone = request.getfixturevalue(which)
    rows = [backbone.row(p, is_truncating=False, where="row") for p in ("hi", "a much longer text than that")]
    taken, single = backbone.batch(rows).alone(0), backbone.batch(rows[:1])
    for name in ("ids", "mask", "content", "positions"):
        assert torch.equal(getattr(taken, name), getattr(single, name))
    assert taken.targets.shape == (1, 0)


def words_read(backbone, prompt) -> str:
    row = backbone.row(prompt, is_truncating=False, where="row")
    return backbone.renderer.tokenizer.decode(row.prompt[slice(*row.content)])


@pytest.mark.parametrize("system", ["Be brief.", "You are a helpful clerk. " * 4])
def test_a_system_message_of_its_own_costs_no_word_of_the_user(smollm2, system):
    question = "Why was I charged twice? I only ordered one thing."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    read = words_read(smollm2, messages)
    assert question in read
    assert system.split()[-1] in read
    assert read.endswith(question)


def test_the_words_every_prompt_shares_are_not_read(smollm2, minilm):
    assert words_read(smollm2, "Why was I charged twice?") == "Why was I charged twice?"
    assert words_read(smollm2, [{"role": "user", "content": "hello"}]) == "hello"
    assert words_read(minilm, "hello") == "[CLS] hello [SEP]"
