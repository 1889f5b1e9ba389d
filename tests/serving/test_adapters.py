"""Adapters loaded by name, beside the tasks of a store."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx2

from slm.exchange import export_tasks
from tests.serving.conftest import fresh_model, serving
from tests.serving.stores import SUM


def test_adapters_loaded_by_name_stay_within_the_memory_of_increments(store, tiny_folder, tmp_path):
    model = fresh_model(store, tiny_folder)
    export_tasks(model.backbone, model.store, "cooking", tmp_path / "cook", False)
    size = model.store.increment(model.store.task("cooking"), 0).size_bytes
    model.supply.budgets = replace(model.supply.budgets, host_bytes=2 * size)
    with serving(model, adapters_folder=tmp_path) as address:
        for number in range(3):
            body = {"lora_name": f"cook-{number}", "lora_path": "cook"}
            answer = httpx2.post(f"{address}/v1/load_lora_adapter", json=body, timeout=60)
            assert answer.status_code == (400 if number == 2 else 200)
    assert "unload one" in answer.json()["error"]["message"]
    assert len(model.supply.loaded) == 2


def test_a_loaded_adapter_is_asked_by_its_name_and_let_go_when_loaded_again(store, tiny_folder, tmp_path):
    model = fresh_model(store, tiny_folder)
    export_tasks(model.backbone, model.store, "cooking", tmp_path / "cook", False)
    with serving(model, adapters_folder=tmp_path) as address:

        def load(name):
            body = {"lora_name": name, "lora_path": "cook"}
            assert httpx2.post(f"{address}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200

        def text(name):
            body = {"model": name, "prompt": SUM, "max_tokens": 8}
            answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=60)
            return answer.json()["choices"][0]["text"]

        stored = text("tiny:languages")
        load("languages")
        assert text("languages") == text("tiny:cooking") != stored
        assert text("tiny:languages") == stored
        load("languages")
        ends = time.monotonic() + 20
        while len(model.supply.loaded) > 1 and time.monotonic() < ends:
            time.sleep(0.02)
        assert len(model.supply.loaded) == 1
        assert text("languages") == text("tiny:cooking")
