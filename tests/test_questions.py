"""What may be asked, and how: one text or many, conversations, and questions longer than the window."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from slm.answer import Candidate, Explanation
from slm.backbone.load import load_backbone
from slm.backbone.prompts import Renderer
from slm.config import BackboneConfig, Config, LearningConfig, RetrievalConfig
from slm.errors import ConfigError, DataError
from slm.model import ScalableLM
from slm.tasks import Example, Message, Stream, Task
from tests.backbone.families import save

WINDOW = 128
LONG = "word " * 400
MOODS = Task.from_rows("moods", [{"text": "a joy", "label": "good"}, {"text": "a bore", "label": "bad"}])
CHAT = Task.from_rows(
    "chat",
    [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"hello {n}"},
                {"role": "assistant", "content": "x"},
            ]
        }
        for n in range(4)
    ],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model whose rows may be as long as its window."""
    folder = save("LLaMA", tmp_path_factory.mktemp("models") / "tiny")
    settings = BackboneConfig(dtype="float32", device="cpu", max_tokens=WINDOW)
    config = Config(
        retrieval=RetrievalConfig(has_background=False, is_abstaining=False, layers=(1,), num_passes=1),
        learning=LearningConfig(num_epochs=1, has_progress=False, validation_share=0.0),
    )
    model = ScalableLM.create(folder.parent / "store", load_backbone(str(folder), settings), config)
    model.learn(MOODS)
    return model


def test_one_text_is_one_question_wherever_it_is_asked(made):
    text = "a joy"
    assert len(made.ask(text, max_new_tokens=2)) == 1
    assert torch.equal(made.queries(text), made.queries([text]))
    one, listed = made.retrieve(text), made.retrieve([text])
    assert one.tasks.shape == listed.tasks.shape == (1, 1)
    assert torch.equal(one.distances, listed.distances)


def test_conversations_of_messages_are_those_of_mappings(made):
    prompt = CHAT.examples[0].prompt
    assert isinstance(prompt[0], Message)
    mappings = [{"role": message.role, "content": message.content} for message in prompt]
    assert made.ask([prompt], max_new_tokens=2) == made.ask([mappings], max_new_tokens=2)
    assert made.explain(prompt) == made.explain(mappings)
    assert torch.equal(made.queries([prompt]), made.queries([mappings]))
    with pytest.raises(DataError, match=r"^question 1 is one message: put those of a conversation in"):
        made.ask(prompt)


@pytest.mark.parametrize("max_new_tokens", [1, 20, WINDOW // 2])
def test_what_is_cut_leaves_room_for_the_answer(made, max_new_tokens):
    (row,) = made.backbone.question_rows([LONG], is_truncating=True, max_new_tokens=max_new_tokens)
    assert len(row.prompt) == WINDOW // 2
    (answer,) = made.ask(LONG, is_truncating=True, max_new_tokens=max_new_tokens)
    assert answer.text in ("good", "bad")


def test_more_room_than_half_the_window_is_not_cut_free(made):
    with pytest.raises(
        ConfigError,
        match=r"^max_new_tokens is 65 and the longest question has 64 tokens, the window of the backbone "
        r"holds 128: lower max_new_tokens to at most 64$",
    ):
        made.ask(LONG, is_truncating=True, max_new_tokens=65)


def test_a_question_that_fills_the_window_is_told_to_be_shortened(made):
    whole = made.backbone.row(LONG, is_truncating=True, where="row")
    assert len(whole.prompt) == WINDOW
    with pytest.raises(ConfigError, match=r"holds 128: shorten it, or allow cutting its middle out \("):
        made.backbone.check_room([whole], 1)


def test_an_evaluation_cuts_over_long_questions_so_that_they_can_be_answered(made):
    stream = Stream((dataclasses.replace(MOODS, test=(Example(LONG, "good"),)),))
    found = made.evaluate(stream, is_truncating=True, has_progress=False)
    assert found.num_rows == (1,)


def test_a_chat_template_that_refuses_a_conversation_is_told_with_its_row(made, monkeypatch):
    tokenizer = copy.deepcopy(made.backbone.renderer.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(made.backbone, "renderer", Renderer(tokenizer, "chat", WINDOW))
    told = r"does not fit the backbone's chat template \(System role not supported\): correct it$"
    with pytest.raises(DataError, match=f"^question 2 {told}"):
        made.ask(["hello", CHAT.examples[0].prompt], max_new_tokens=2)
    with pytest.raises(DataError, match=f"^example 1 of task 'chat' {told}"):
        made.learn(CHAT)


def test_an_explanation_is_plain_json_where_nothing_is_refused():
    candidate = Candidate("moods", 1.0, 1.0, -0.5, float("inf"))
    found = Explanation("a joy", (candidate,), False).as_dict()
    assert found["candidates"][0] == {
        "task": "moods",
        "weight": 1.0,
        "probability": 1.0,
        "distance": -0.5,
        "threshold": None,
    }
    json.dumps(found, allow_nan=False)
