"""Routing to another server over real HTTP: a second slm stands in for vLLM or SGLang."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import httpx2
import openai
import pytest

from slm.errors import ConfigError
from slm.model import ScalableLM
from slm.serving.settings import ServingSettings
from slm.serving.upstream import Upstream, _through
from tests.backbone.families import load
from tests.serving.conftest import fresh_model, serving
from tests.serving.stores import COOK, OUTSIDE, SUM


@pytest.fixture(scope="module")
def servers(store, tiny_folder, tmp_path_factory):
    """A router and the server behind it, which knows no task of its own."""
    shared = tmp_path_factory.mktemp("shared") / "adapters"
    shared.mkdir()
    empty = ScalableLM.create(
        tmp_path_factory.mktemp("empty") / "store", load(tiny_folder), fresh_model(store, tiny_folder).config
    )
    with (
        serving(empty, adapters_folder=shared) as behind,
        serving(fresh_model(store, tiny_folder), upstream=behind, adapters_folder=shared) as router,
    ):
        yield router, behind, shared


def test_a_request_is_answered_upstream_by_its_tasks_own_adapter(servers, store, tiny_folder):
    router, behind, shared = servers
    library = ScalableLM.open(store, load(tiny_folder))
    with openai.OpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0) as client:
        for question, task in ((SUM, "sums"), (COOK, "cooking"), (SUM, "sums")):
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(model="auto", messages=messages, max_tokens=8)
            own = library.restricted([task], is_abstaining=False).ask(question, max_new_tokens=8)[0]
            assert answer.choices[0].message.content == own.text
            assert answer.model == "auto"
            assert answer.slm["mixture"][0]["task"] == task
            stream = list(
                client.chat.completions.create(model="auto", messages=messages, max_tokens=8, stream=True)
            )
            assert "".join(c.choices[0].delta.content or "" for c in stream) == own.text
            assert {c.model for c in stream} == {"auto"}
            assert {c.slm["mixture"][0]["task"] for c in stream} == {task}
    commits = {record.name: record.commit_id[:8] for record in library.tasks}
    assert {path.name for path in shared.iterdir()} == {f"{n}-{commits[n]}" for n in ("sums", "cooking")}
    loaded = {card["id"] for card in httpx2.get(f"{behind}/v1/models").json()["data"]}
    assert {f"sums-{commits['sums']}", f"cooking-{commits['cooking']}"} <= loaded


def test_how_long_an_answer_may_be_is_the_upstreams_to_say(servers):
    router, behind, _ = servers
    longest = [httpx2.get(f"{server}/v1/limits").json()["max_tokens"] for server in (router, behind)]
    assert longest[0] is None
    assert longest[1] > 1


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_a_streamed_event_is_told_more_wherever_it_is_cut_and_whatever_its_text(width):
    text = "one\u2028two\x85three"
    event = {"model": "adapter", "choices": [{"delta": {"content": text}}]}
    body = f"data: {json.dumps(event, ensure_ascii=False)}\n\n: a comment\ndata: [DONE]\n\n".encode()

    class Cut(httpx2.AsyncByteStream):
        async def __aiter__(self):
            for start in range(0, len(body), width):
                yield body[start : start + width]

    async def read():
        response = httpx2.Response(200, stream=Cut())
        return b"".join(
            [part async for part in _through(response, AsyncExitStack(), {"model": "auto"}, {"x": 1})]
        )

    told, *others = asyncio.run(read()).split(b"\n")
    assert json.loads(told[6:]) == {"model": "auto", "choices": event["choices"], "slm": {"x": 1}}
    assert others == [b"", b": a comment", b"data: [DONE]", b"", b""]


def test_an_adapter_that_the_upstream_lost_is_loaded_again(servers):
    router, behind, _ = servers
    body = {"model": "auto", "messages": [{"role": "user", "content": SUM}], "max_tokens": 4}
    first = httpx2.post(f"{router}/v1/chat/completions", json=body, timeout=60).json()
    loaded = [
        c["id"] for c in httpx2.get(f"{behind}/v1/models").json()["data"] if c["id"].startswith("sums-")
    ]
    httpx2.post(f"{behind}/v1/unload_lora_adapter", json={"lora_name": loaded[0]}, timeout=60)
    again = httpx2.post(f"{router}/v1/chat/completions", json=body, timeout=60)
    assert again.status_code == 200
    assert again.json()["choices"] == first["choices"]


def test_what_belongs_to_no_task_goes_to_the_upstreams_backbone(servers):
    router, behind, _ = servers
    body = {"model": "tiny", "messages": [{"role": "user", "content": OUTSIDE}], "max_tokens": 6}
    routed = httpx2.post(f"{router}/v1/chat/completions", json=body, timeout=60).json()
    direct = httpx2.post(f"{behind}/v1/chat/completions", json=body, timeout=60).json()
    assert routed["choices"] == direct["choices"]
    assert routed["slm"]["mixture"] == []


def test_a_backbone_of_another_name_than_before_is_asked_for_again(
    servers, store, tiny_folder, tmp_path, monkeypatch
):
    begin = Upstream.__init__

    def remember(self, *args):
        begin(self, *args)
        self._base = "its-former-name"

    monkeypatch.setattr(Upstream, "__init__", remember)
    shared = {"upstream": servers[1], "adapters_folder": tmp_path}
    with serving(fresh_model(store, tiny_folder), **shared) as router:
        body = {"model": "tiny", "messages": [{"role": "user", "content": OUTSIDE}], "max_tokens": 3}
        assert httpx2.post(f"{router}/v1/chat/completions", json=body).status_code == 200


def test_adapters_are_loaded_from_their_folder_alone(servers, tmp_path):
    _, behind, shared = servers
    outside = tmp_path / "outside"
    outside.mkdir()
    (shared / "link").symlink_to(outside)
    for path in (str(outside), "../outside", "link", "/etc", "nope", "a\x00b"):
        answer = httpx2.post(f"{behind}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path"), path
    (shared / "link").unlink()


def test_an_upstream_that_is_gone_is_a_bad_gateway(store, tiny_folder, tmp_path):
    settings = {"upstream": "http://127.0.0.1:9", "adapters_folder": tmp_path}
    with serving(fresh_model(store, tiny_folder), **settings) as router:
        body = {"messages": [{"role": "user", "content": SUM}], "max_tokens": 4}
        answer = httpx2.post(
            f"{router}/v1/chat/completions",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
            timeout=60,
        )
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_unavailable"


def test_an_upstream_needs_a_folder_to_share():
    with pytest.raises(ConfigError, match="give --adapters"):
        ServingSettings(upstream="http://127.0.0.1:1")
