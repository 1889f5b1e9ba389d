"""The official client works unchanged."""

from __future__ import annotations

import openai
import pytest

from slm.model import ScalableLM
from tests.backbone.families import load
from tests.serving.stores import COOK, FRENCH, GOOD, OUTSIDE, SUM


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def library(store, tiny_folder):
    return ScalableLM.open(store, load(tiny_folder))


def ask(client, question, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="auto", messages=messages, **options)


@pytest.mark.parametrize("question", [FRENCH, GOOD, SUM, COOK, OUTSIDE])
def test_a_chat_is_answered_as_the_library_answers(client, library, question):
    answer, own = ask(client, question, max_tokens=10), library.ask(question, max_new_tokens=10)[0]
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert [part["task"] for part in answer.slm["mixture"]] == [task for task, _ in own.tasks]
    assert answer.slm["is_abstained"] == own.is_abstained
    assert answer.slm["confidence"] == pytest.approx(own.confidence, rel=1e-4)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_whole_one_in_pieces(client):
    whole = ask(client, SUM, max_tokens=15)
    chunks = list(ask(client, SUM, max_tokens=15, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(bool(text) for text in texts) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert chunks[0].slm["mixture"] == whole.slm["mixture"]


def test_headers_say_what_an_answer_comes_from(client):
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": SUM}], max_tokens=2
    )
    assert raw.headers["X-SLM-Mixture"] == "sums=1.00"
    assert raw.headers["X-SLM-Abstained"] == "false"
    assert int(raw.headers["X-SLM-Store-Version"]) > 0
    assert len(raw.headers["X-Request-Id"]) == 32


def test_several_answers_are_samples_that_a_seed_repeats(client):
    options = {"n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 10}
    once, again = ask(client, SUM, **options), ask(client, SUM, **options)
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3


def test_text_completions_take_several_prompts_and_tell_log_probabilities(client, library):
    answer = client.completions.create(model="auto", prompt=[SUM, COOK], max_tokens=6, logprobs=2)
    for choice, question in zip(answer.choices, (SUM, COOK), strict=True):
        assert choice.text == library.ask(question, max_new_tokens=6)[0].text
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 6
    assert answer.choices[0].slm["mixture"] != answer.choices[1].slm["mixture"]
    stream = list(client.completions.create(model="auto", prompt=SUM, max_tokens=6, stream=True, logprobs=2))
    assert "".join(c.choices[0].text for c in stream) == answer.choices[0].text
    offsets = [place for c in stream if (told := c.choices[0].logprobs) for place in told.text_offset]
    assert offsets == answer.choices[0].logprobs.text_offset
    assert offsets[-1] > 0


def test_a_label_tells_log_probabilities_of_all_labels(client):
    answer = ask(client, FRENCH, logprobs=True, top_logprobs=4)
    token = answer.choices[0].logprobs.content[0]
    assert token.token == answer.choices[0].message.content
    assert {top.token for top in token.top_logprobs} == {"french", "german", "good", "bad"}


def test_stop_texts_end_an_answer(client):
    whole = ask(client, SUM, max_tokens=20).choices[0].message.content
    answer = ask(client, SUM, max_tokens=20, stop=[whole[5:8], "never"])
    assert answer.choices[0].message.content == whole[: whole.index(whole[5:8])].rstrip()
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_auto_the_backbone_and_each_task(client):
    names = [model.id for model in client.models.list()]
    assert names == ["auto", "tiny", *(f"tiny:{n}" for n in ("languages", "moods", "sums", "cooking"))]
    assert client.models.retrieve("tiny:sums").id == "tiny:sums"
    forced = client.chat.completions.create(
        model="tiny:cooking", messages=[{"role": "user", "content": SUM}], max_tokens=3
    )
    assert forced.slm["mixture"] == [{"task": "cooking", "weight": 1.0}]


def test_null_says_the_default(client):
    options = {"model": None, "stream": None, "n": None, "stream_options": {"include_usage": None}}
    answer = ask(client, SUM, max_tokens=4, extra_body=options)
    assert answer.choices[0].message.content == ask(client, SUM, max_tokens=4).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="auto", messages=None)


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="model 'nope' does not exist") as missing:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be less than or equal to 2"):
        ask(client, SUM, temperature=3)
    with pytest.raises(openai.BadRequestError, match="tools is not supported: leave it out"):
        ask(client, SUM, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="the window holds") as long:
        ask(client, "word " * 300)
    assert long.value.code == "context_length_exceeded"
