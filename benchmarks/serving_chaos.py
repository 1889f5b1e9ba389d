"""Under load a task is taught, a task is forgotten, and a replica is killed and started again.

    python benchmarks/serving_chaos.py --data data --write

Two replicas of a store of twenty tasks (``serving.py`` says what they are made of) are asked by many clients.
Meanwhile a task is taught over HTTP, from the upload to its commit; a task is forgotten; one replica is
killed and started again.
Prints, and with --write keeps in docs/results: requests answered; those that a client was told it had lost;
those that ended without a word, which must be none; and answers whose knowledge is not what the library
decides from the very version of the store that the answer names, which must be none either.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from serving import RESULTS, build, free_port, library_route, read_texts, start_server
from slm.model import ScalableLM

WAIT_S = 20
"""Seconds of load before, between and after what happens."""


@dataclass
class Heard:
    """What all clients heard.

    Attributes:
        answers: (replica, question, version of the store, task with the largest weight or "").
        lost: what clients were told of requests that were not answered, and how often.
        num_silent: answers that ended without an end and without an error.
    """

    answers: list[tuple[str, str, int, str]] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    num_silent: int = 0


async def ask(client: httpx2.AsyncClient, address: str, text: str, max_tokens: int, heard: Heard) -> None:
    """One streamed request."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": max_tokens}
    is_ended = False
    try:
        async with client.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                heard.lost[f"status {answer.status_code}"] += 1
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    heard.lost[f"error {event['error']['code']}"] += 1
                    return
                is_ended |= bool(event["choices"] and event["choices"][0]["finish_reason"])
            task = answer.headers["x-slm-mixture"].partition("=")[0]
            version = int(answer.headers["x-slm-store-version"])
    except httpx2.HTTPError as error:
        heard.lost[type(error).__name__] += 1
        await asyncio.sleep(0.5)
        return
    if not is_ended:
        heard.num_silent += 1
        return
    heard.answers.append((address, text, version, task))


async def load(
    addresses: list[str], questions: list[str], args: argparse.Namespace, is_over: asyncio.Event, heard: Heard
) -> None:
    """Ask both replicas at random until it is over."""
    limits = httpx2.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx2.AsyncClient(timeout=3600, limits=limits) as client:

        async def work(seed: int) -> None:
            draw = random.Random(seed)
            while not is_over.is_set():
                await ask(client, draw.choice(addresses), draw.choice(questions), args.max_tokens, heard)

        await asyncio.gather(*(work(seed) for seed in range(args.clients)))


def decisions(store: Path, questions: list[str]) -> tuple[int, dict[str, str]]:
    """The store's version, and the task that the library gives each question, one at a time."""
    model = ScalableLM.open(store)
    return model.store.version, {text: library_route(model, text) for text in questions}


def expected(known: dict[int, dict[str, str]], version: int, text: str) -> str | None:
    """What the library decides from a version of the store; None where there was no such version.

    Forgetting makes two versions of the same tasks: one without the task, one in which nothing of it is left.
    """
    later = [v for v in known if v >= version]
    return known[min(later)][text] if later else None


async def teach(
    client: httpx2.AsyncClient, address: str, name: str, rows: list[str], num_epochs: int
) -> float:
    """Teach a task over HTTP; gives the seconds from the upload to its commit."""
    begun = time.perf_counter()
    content = "".join(json.dumps({"prompt": text, "completion": "noted"}) + "\n" for text in rows)
    files = {"file": (f"{name}.jsonl", content.encode())}
    job = (
        await client.post(
            f"{address}/v1/tasks", data={"name": name, "num_epochs": str(num_epochs)}, files=files
        )
    ).json()
    while (card := (await client.get(f"{address}/v1/jobs/{job['id']}")).json())["finished"] is None:
        await asyncio.sleep(1)
    if card["state"] != "succeeded":
        raise SystemExit(f"teaching ended as {card['state']}: {card['error']}")
    return time.perf_counter() - begun


async def change(
    store: Path, taught: dict[str, list[str]], questions: list[str], args: argparse.Namespace
) -> None:
    """Load two replicas, change everything under them, and say what the clients heard."""
    ports, flags = [free_port(), free_port()], ("--allow-teaching",)
    replicas = [start_server(store, port, args.clients, *flags) for port in ports]
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    heard, is_over = Heard(), asyncio.Event()
    new, gone = list(taught)[-1], next(iter(taught))
    try:
        known = dict([decisions(store, questions)])
        loading = asyncio.create_task(load(addresses, questions, args, is_over, heard))
        async with httpx2.AsyncClient(timeout=3600) as client:
            begun = time.perf_counter()
            await asyncio.sleep(WAIT_S)
            taught_s = await teach(client, addresses[0], new, taught[new], args.epochs)
            print(f"taught under load in {taught_s:.0f} s", flush=True)
            known |= [await asyncio.to_thread(decisions, store, questions)]
            answer = await client.delete(f"{addresses[0]}/v1/tasks/{gone}")
            assert answer.status_code == 200, answer.text
            known |= [await asyncio.to_thread(decisions, store, questions)]
            replicas[1].kill()
            replicas[1].wait(60)
            print("forgotten; a replica killed", flush=True)
            await asyncio.sleep(WAIT_S)
            replicas[1] = await asyncio.to_thread(start_server, store, ports[1], args.clients, *flags)
            num_before = len(heard.answers)
            await asyncio.sleep(WAIT_S)
            is_over.set()
            await loading
            seconds = time.perf_counter() - begun
    finally:
        for process in replicas:
            process.terminate()
        for process in replicas:
            process.wait(60)
    wrong = [a for a in heard.answers if expected(known, a[2], a[1]) != a[3]]
    again = sum(address == addresses[1] for address, *_ in heard.answers[num_before:])
    report = {
        "backbone": args.backbone, "clients": args.clients, "max_tokens": args.max_tokens,
        "questions": len(questions), "seconds": seconds, "teaching_s": taught_s,
        "answers": len(heard.answers), "lost": dict(heard.lost), "silent": heard.num_silent,
        "versions": dict(sorted(Counter(str(a[2]) for a in heard.answers).items())),
        "wrong": len(wrong), "of_the_new_task": sum(a[3] == new for a in heard.answers),
        "after_the_restart": again,
    }  # fmt: skip
    for address, text, version, task in wrong[:10]:
        print(f"wrong: version {version} of {address} said {task!r}: {text[:60]!r}")
    print(json.dumps(report, indent=1))
    if args.write:
        (RESULTS / "serving_chaos.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Build a store, load it, change it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folders with train.jsonl")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=20, help="tasks at the start; one more is taught")
    parser.add_argument("--examples", type=int, default=40, help="texts that a task's keys are made of")
    parser.add_argument("--questions", type=int, default=5, help="different questions of each task")
    parser.add_argument("--epochs", type=int, default=1, help="of teaching")
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/results")
    args = parser.parse_args()
    texts = read_texts(args.data, args.tasks + 1, args.examples + args.questions)
    taught = {name: own[: args.examples] for name, own in texts.items()}
    questions = sorted({text for own in texts.values() for text in own[args.examples :]})
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        first = dict(list(taught.items())[: args.tasks])
        build(store, args.backbone, first, {"rank": 8, "targets": "all-linear", "stored": 0})
        asyncio.run(change(store, taught, questions, args))


if __name__ == "__main__":
    main()
