"""Encoders and sequence-to-sequence backbones are served too, with the library's answers."""

from __future__ import annotations

import httpx2
import pytest

from slm.model import ScalableLM
from tests.backbone.families import load, save
from tests.serving.conftest import serving
from tests.serving.stores import COOK, FRENCH, GOOD, OUTSIDE, SUM, make_store


def chat(address, question, **options):
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8} | options
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_decoder_whose_first_token_is_fixed_begins_with_it(tmp_path):
    source = save("BART", tmp_path / "model")
    library, served = (load(source) for _ in range(2))
    make_store(tmp_path / "store", library)
    for backbone in (library, served):
        backbone.model.generation_config.forced_bos_token_id = 300
    own = ScalableLM.open(tmp_path / "store", library).ask(COOK, max_new_tokens=8)[0]
    with serving(ScalableLM.open(tmp_path / "store", served)) as address:
        told = chat(address, COOK, logprobs=True, top_logprobs=2)
    others = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [other["logprob"] for other in others] == [0.0, -9999.0]
    first = library.renderer.tokenizer.decode([300]).strip()
    assert first
    assert told["choices"][0]["message"]["content"] == own.text
    assert own.text.startswith(first)
    assert told["slm"]["confidence"] == pytest.approx(own.confidence, rel=1e-4)


@pytest.mark.parametrize("family", ["BERT", "T5"])
def test_other_kinds_of_backbones_answer_as_the_library(tmp_path, family):
    source = save(family, tmp_path / "model")
    library = make_store(tmp_path / "store", load(source))
    with serving(ScalableLM.open(tmp_path / "store", load(source))) as address:
        for question in (FRENCH, GOOD, SUM, COOK, OUTSIDE):
            told, own = chat(address, question), library.ask(question, max_new_tokens=8)[0]
            assert told["choices"][0]["message"]["content"] == (own.text or "")
            assert told["slm"]["is_abstained"] == own.is_abstained
            assert told["slm"]["kind"] == own.kind
            assert told["slm"]["confidence"] == pytest.approx(own.confidence, rel=1e-4)
            assert [part["task"] for part in told["slm"]["mixture"]] == [task for task, _ in own.tasks]
        body = {"input": [FRENCH, GOOD]}
        found = httpx2.post(f"{address}/v1/classifications", json=body, timeout=60).json()["data"]
        for one, question in zip(found, body["input"], strict=True):
            own = library.ask(question)[0]
            if own.kind == "classification":
                assert one["label"] == own.text
                assert sum(label["probability"] for label in one["probabilities"]) == pytest.approx(
                    1, abs=1e-4
                )
        if family == "T5":
            chunks = httpx2.post(
                f"{address}/v1/chat/completions",
                json={"messages": [{"role": "user", "content": SUM}], "max_tokens": 8, "stream": True},
                timeout=60,
            ).text
            assert chunks.rstrip().endswith("data: [DONE]")
