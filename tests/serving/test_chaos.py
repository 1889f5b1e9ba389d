"""Under load: teach a task, forget a task, kill and restart a replica; nobody gets a half-loaded mixture."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2

from slm.model import ScalableLM
from slm.tasks import Task
from tests.backbone.families import load
from tests.serving.conftest import serving
from tests.serving.stores import COOK, COOKING, FRENCH, GOOD, SUM, commit, make_store

STEADY = [FRENCH, GOOD, SUM, "what is 5 plus 5?"]
SONGS = [f"sing the song number {n} of the sea" for n in range(12)]


class Client(threading.Thread):
    """Asks one replica again and again; where that is gone, the other."""

    def __init__(self, addresses: list[str], seed: int, is_over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.addresses, self.is_over, self.draw = addresses, is_over, random.Random(seed)
        self.heard: list[tuple[str, tuple[tuple[str, float], ...], str]] = []
        self.failed: list[str] = []
        self.num_moved = 0

    def run(self) -> None:
        while not self.is_over.is_set():
            question = self.draw.choice([*STEADY, COOK, COOKING[5][0], *SONGS[:2]])
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": 6}
            for address in self.draw.sample(self.addresses, 2):
                try:
                    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60)
                except httpx2.HTTPError:  # told at once, not lost silently
                    self.num_moved += 1
                    continue
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                    break
                told = answer.json()
                mixture = tuple((part["task"], round(part["weight"], 4)) for part in told["slm"]["mixture"])
                self.heard.append((question, mixture, told["choices"][0]["message"]["content"]))
                break
            time.sleep(0.2)


def start_replica(folder, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "slm.cli.main", "serve", str(folder), "--port", str(port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_ready(address: str) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            if httpx2.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"{address} did not start")


def wait_for_task(address: str, name: str, is_there: bool) -> None:
    ends = time.monotonic() + 120
    while (httpx2.get(f"{address}/v1/tasks/{name}").status_code == 200) != is_there:
        assert time.monotonic() < ends
        time.sleep(0.05)


def possible(folder, tiny_folder) -> set[tuple[str, tuple[tuple[str, float], ...], str]]:
    """What the library says of every question with the store as it is."""
    library = ScalableLM.open(folder, load(tiny_folder))
    questions = [*STEADY, COOK, COOKING[5][0], *SONGS[:2]]
    answers = library.ask(questions, max_new_tokens=6)
    return {
        (q, tuple((task, round(weight, 4)) for task, weight in a.tasks), a.text)
        for q, a in zip(questions, answers, strict=True)
    }


def test_no_answer_is_mixed_up_or_lost_while_the_store_and_the_replicas_change(tmp_path, tiny_folder):
    folder = tmp_path / "store"
    model = make_store(folder, load(tiny_folder))
    songs = Task.from_rows("songs", [{"prompt": text, "completion": "la"} for text in SONGS])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    second = f"http://127.0.0.1:{port}"
    allowed, is_over = possible(folder, tiny_folder), threading.Event()
    replica = start_replica(folder, port)
    try:
        with serving(model, is_teaching=True) as first:
            wait_ready(second)
            clients = [Client([first, second], seed, is_over) for seed in range(4)]
            for client in clients:
                client.start()
            # What a job's process does last; the job itself is tested in test_teaching.
            commit(ScalableLM.open(folder, load(tiny_folder)), songs, 7)
            wait_for_task(first, "songs", True)
            wait_for_task(second, "songs", True)
            allowed |= possible(folder, tiny_folder)
            replica.send_signal(signal.SIGKILL)
            replica.wait(30)
            assert httpx2.delete(f"{first}/v1/tasks/cooking", timeout=60).status_code == 200
            allowed |= possible(folder, tiny_folder)
            replica = start_replica(folder, port)
            wait_ready(second)
            assert httpx2.get(f"{second}/v1/tasks/cooking").status_code == 404
            time.sleep(0.5)
            is_over.set()
            for client in clients:
                client.join(60)
    finally:
        is_over.set()
        replica.kill()
        replica.wait(30)
    assert [text for client in clients for text in client.failed] == []
    heard = [answer for client in clients for answer in client.heard]
    close = {(q, tuple(task for task, _ in mixture), text) for q, mixture, text in allowed}
    strange = [a for a in heard if (a[0], tuple(task for task, _ in a[1]), a[2]) not in close]
    assert strange == []
    assert any("songs" in dict(mixture) for _, mixture, _ in heard)
    assert any("cooking" in dict(mixture) for _, mixture, _ in heard)
    assert len(heard) > 20
