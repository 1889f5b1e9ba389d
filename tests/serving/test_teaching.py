"""Uploads are checked before anything is made of them, and a job tells how it ends."""

from __future__ import annotations

import io
import json
import time
import zipfile

import httpx2
import pytest

from slm.exchange import export_tasks
from slm.model import ScalableLM
from tests.backbone.families import load
from tests.serving.conftest import serving
from tests.serving.stores import COOKING, increments, make_store

ROWS = "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in COOKING).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A store that may be changed, and the server of it."""
    folder = tmp_path_factory.mktemp("teaching") / "store"
    model = make_store(folder, load(tiny_folder))
    with serving(model, is_teaching=True, max_upload_bytes=100_000) as address:
        yield folder, address


def teach(address, name, content, file_name="x.jsonl", **fields):
    files = {"file": (file_name, content)}
    if isinstance(fields.get("adapter"), bytes):
        files["adapter"] = ("a.zip", fields.pop("adapter"))
    return httpx2.post(f"{address}/v1/tasks", data={"name": name, **fields}, files=files, timeout=60)


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def damaged(compression: int) -> bytes:
    name = b"adapter_config.json"
    archive = bytearray(zipped({name.decode(): bytes(range(256)) * 20}, compression))
    start = archive.find(name) + len(name)
    archive[start + 9 : start + 40] = b"\xff" * 31
    if compression == zipfile.ZIP_DEFLATED:
        archive[start : start + 6] = b"\xff" * 6
    return bytes(archive)


@pytest.mark.parametrize(
    ("name", "content", "fields", "status", "message"),
    [
        ("../up", ROWS, {}, 400, "task name '../up' is not allowed"),
        ("Recipes", ROWS, {}, 400, "task name 'Recipes' is not allowed: use 1 to 64 of a-z"),
        ("new", ROWS, {"num_epoch": "3"}, 400, "unknown field 'num_epoch': did you mean 'num_epochs'?"),
        ("sums", ROWS, {}, 409, "task 'sums' is already learned"),
        ("new", b"", {}, 400, "file is empty"),
        ("new", b"{broken", {}, 400, "examples.jsonl line 1"),
        ("new", ROWS, {"file_name": "../../etc/passwd"}, 400, "the file must end in .jsonl"),
        ("new", ROWS, {"num_epochs": "many"}, 400, "num_epochs must be in 1..1000"),
        ("new", ROWS, {"num_epochs": "000000000001" + "9" * 4}, 400, "num_epochs must be in 1..1000"),
        ("new", ROWS, {"num_epochs": "000000000001" + "9" * 5000}, 400, "num_epochs must be in 1..1000"),
        ("new", ROWS, {"kind": "magic"}, 400, "kind must be classification or generation"),
        ("new", b"x" * 200_000, {}, 413, "the body is longer than 100000 bytes"),
        ("new", ROWS, {"adapter": b"no zip"}, 400, "the adapter cannot be unpacked"),
        ("new", ROWS, {"adapter": damaged(zipfile.ZIP_DEFLATED)}, 400, "the adapter cannot be unpacked"),
        ("new", ROWS, {"adapter": damaged(zipfile.ZIP_LZMA)}, 400, "the adapter cannot be unpacked"),
        ("new", ROWS, {"adapter": "cook"}, 400, "adapter must be a file"),
        ("new", ROWS, {"adapter": zipped({"../../evil.py": b""})}, 400, "nothing else: leave it out"),
        ("new", ROWS, {"adapter": zipped({"adapter_config.json": b"{}"})}, 400, "the adapter must hold"),
        ("new", ROWS, {"adapter": zipped({"adapter_config.json": b"0" * 500_000})}, 413, "too large"),
    ],
)  # fmt: skip
def test_a_wrong_upload_is_refused_and_leaves_nothing(place, name, content, fields, status, message):
    _, address = place
    answer = teach(address, name, content, **dict(fields))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert "slm-quarantine" not in answer.text
    assert httpx2.get(f"{address}/v1/jobs").json()["data"] == []


def test_a_name_that_is_not_allowed_is_the_name_s_fault(place):
    for name in ("Recipes", "a" * 80):
        assert teach(place[1], name, ROWS).json()["error"]["param"] == "name"


def test_an_adapter_is_taken_over_while_serving_and_forgotten_again(place, tiny_folder, tmp_path):
    folder, address = place
    other = ScalableLM.open(folder, load(tiny_folder))
    export_tasks(other.backbone, other.store, "cooking", tmp_path / "adapter", False)
    files = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir() if p.suffix != ".md"}
    rows = b"".join(
        json.dumps({"prompt": f"sing the song number {n} of the sea", "completion": "la la"}).encode() + b"\n"
        for n in range(12)
    )
    queued = teach(address, "songs", rows, adapter=zipped(files))
    assert queued.status_code == 202, queued.text
    assert queued.headers["location"] == f"/v1/jobs/{queued.json()['id']}"
    assert teach(address, "songs", rows).json()["error"]["code"] == "task_exists"
    cards = []
    with httpx2.stream("GET", f"{address}/v1/jobs/{queued.json()['id']}/events", timeout=200) as events:
        cards += [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    assert [cards[0]["state"] in ("queued", "running"), cards[-1]["state"]] == [True, "succeeded"], cards[-1]
    assert cards[-1]["report"]["task"] == "songs"
    body = {"messages": [{"role": "user", "content": "sing the song number 3 of the sea"}], "max_tokens": 3}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["slm"]["mixture"][0]["task"] == "songs"
    forgotten = httpx2.delete(f"{address}/v1/tasks/songs", timeout=60)
    assert forgotten.json()["is_deleted"] is True
    assert httpx2.get(f"{address}/v1/tasks/songs").status_code == 404
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert "songs" not in [part["task"] for part in answer["slm"]["mixture"]]


def test_a_job_can_be_cancelled_and_the_store_is_as_it_was(place):
    _, address = place
    job = teach(address, "never", ROWS, num_epochs="1000").json()
    cancelled = httpx2.delete(f"{address}/v1/jobs/{job['id']}", timeout=60)
    assert cancelled.status_code == 200
    ends = time.monotonic() + 60
    while httpx2.get(f"{address}/v1/jobs/{job['id']}").json()["finished"] is None:
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert httpx2.get(f"{address}/v1/jobs/{job['id']}").json()["state"] == "cancelled"
    assert httpx2.get(f"{address}/v1/tasks/never").status_code == 404


def test_a_server_that_stops_does_not_wait_for_those_who_watch_a_job(tmp_path, tiny_folder):
    model, cards = make_store(tmp_path / "store", load(tiny_folder)), []
    with serving(model, is_teaching=True) as address:
        job = teach(address, "never", ROWS, num_epochs="1000").json()
        events = httpx2.stream("GET", f"{address}/v1/jobs/{job['id']}/events", timeout=60)
        lines = events.__enter__().iter_lines()
        cards.append(json.loads(next(lines)[6:]))
        begun = time.monotonic()
    assert time.monotonic() - begun < 5  # of a grace time of 10 s
    cards += [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    events.__exit__(None, None, None)
    assert all(card["state"] in ("queued", "running") for card in cards)


def test_what_another_process_teaches_is_taken_in(place, tiny_folder):
    folder, address = place
    other = ScalableLM.open(folder, load(tiny_folder))
    before = httpx2.get(f"{address}/v1/tasks").json()["store_version"]
    record = other.store.task("cooking")
    keys = other.store.all_keys([record])[0]
    from slm.store import TaskKnowledge

    knowledge = TaskKnowledge(keys, (increments(other, 9),))
    other.store.commit("cooking-2", "generation", (), 24, knowledge)
    ends = time.monotonic() + 30
    while httpx2.get(f"{address}/v1/tasks").json()["store_version"] == before:
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert httpx2.get(f"{address}/v1/tasks/cooking-2").json()["num_examples"] == 24
    other.store.forget("cooking-2")
