"""Serving: routed requests against the same server on the frozen backbone, and small stores against large.

    python benchmarks/serving.py --data data --write

Twenty tasks have keys from real texts, and random increments too small to change what is written much: what
an increment says costs nothing, that it is there does. A server in a process of its own is asked by many
clients at once, in blocks that alternate between `auto` and the frozen backbone, so that a busy machine slows
both.
Prints, and with --write keeps in docs/results: tokens a second, time to the first token, wrong routes against
the library, errors; the same for stores of few and of many tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import torch

from slm.config import Config, IncrementConfig
from slm.increments.increment import Increment, LowRankPair
from slm.learning.learner import prepare
from slm.model import ScalableLM
from slm.retrieval.keys import TaskKeys
from slm.store import TaskKnowledge
from slm.tasks import Task

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MOST_CHARACTERS = 300


@dataclass
class Block:
    """What one block of requests gave."""

    model: str
    seconds: float = 0.0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    routes: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def read_texts(data: Path, num_tasks: int, num_examples: int) -> dict[str, list[str]]:
    """Texts of each task, cut to a length that a chat has."""
    found = {}
    for folder in sorted(p for p in data.iterdir() if (p / "train.jsonl").is_file())[:num_tasks]:
        texts = []
        with (folder / "train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                texts.append(str(row.get("text") or row.get("prompt"))[:MOST_CHARACTERS])
                if len(texts) == num_examples:
                    break
        found[folder.name] = texts
    return found


def increment(model: ScalableLM, seed: int) -> Increment:
    """A random increment of every target layer, of the rank that learning gives."""
    draw, rank = torch.Generator().manual_seed(seed), model.config.increments.rank
    layers = model.backbone.reparameterizer.layers
    pairs = {}
    for name in model.targets:
        num_out, num_in = layers[name].shape
        down = torch.randn(rank, num_in, generator=draw) * num_in**-0.5
        pairs[name] = LowRankPair(down, torch.randn(num_out, rank, generator=draw) * 1e-3)
    return Increment(pairs, rank, model.config.increments.alpha).in_float16()


def build(folder: Path, backbone: str, texts: dict[str, list[str]], options: dict[str, object]) -> ScalableLM:
    """A store with a task for each set of texts, and idle ones up to `stored`."""
    increments = IncrementConfig(rank=int(str(options["rank"])), targets=str(options["targets"]))
    model = ScalableLM.create(folder, backbone, Config(increments=increments))
    keys: list[TaskKeys] = []
    for seed, (name, own) in enumerate(texts.items()):
        task = Task.from_rows(name, [{"prompt": text, "completion": "-"} for text in own])
        keys.append(prepare(model, task, model.config.learning).keys)
        model.store.commit(
            name, "generation", (), len(own), TaskKnowledge(keys[-1], (increment(model, seed),))
        )
    spread = torch.cat([k.means for k in keys]).std(0)
    draw = torch.Generator().manual_seed(0)
    for number in range(len(texts), int(str(options["stored"]))):
        like = keys[number % len(keys)]
        # Farther from every text than the real keys are: nothing is routed to them.
        means = like.means + 6 * spread * torch.randn(like.means.shape, generator=draw, dtype=torch.float64)
        idle = TaskKeys(**{**{f: getattr(like, f) for f in like.__dataclass_fields__}, "means": means})
        knowledge = TaskKnowledge(idle, (increment(model, number),))
        model.store.commit(f"idle-{number}", "generation", (), 10, knowledge)
    return model


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_server(store: Path, port: int, num_rows: int, *flags: str) -> subprocess.Popen[bytes]:
    """A server in a process of its own, ready to answer at 127.0.0.1."""
    command = [sys.executable, "-m", "slm.cli.main", "serve", str(store), "--port", str(port)]
    command += ["--max-rows", str(num_rows), "--max-queue", "4096", "--deadline", "3600", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return process
        except httpx2.HTTPError:
            time.sleep(0.5)
    process.kill()
    raise SystemExit("the server did not start")


@contextmanager
def serving(store: Path, num_rows: int):
    """A server in a process of its own; gives its address."""
    port = free_port()
    process = start_server(store, port, num_rows)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: httpx2.AsyncClient, block: Block, number: int, text: str, max_tokens: int) -> None:
    """One streamed request."""
    body = {"model": block.model, "messages": [{"role": "user", "content": text}], "stream": True}
    body |= {"max_tokens": max_tokens, "stream_options": {"include_usage": True}}
    begun, first, tokens = time.perf_counter(), None, None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                block.errors.append(f"status {answer.status_code}")
                return
            block.routes[number] = answer.headers["x-slm-mixture"].partition("=")[0]
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    block.errors.append(event["error"]["message"])
                    return
                if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - begun
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except httpx2.HTTPError as error:
        block.errors.append(type(error).__name__)
        return
    if tokens is None:
        block.errors.append("no end")
        return
    block.num_tokens += tokens
    block.first_s.append(first if first is not None else time.perf_counter() - begun)


async def run_block(
    address: str, model: str, questions: list[tuple[int, str]], num_clients: int, max_tokens: int
) -> Block:
    """Ask all questions, as many clients as given at any time."""
    block, waiting = Block(model), list(reversed(questions))
    limits = httpx2.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    async with httpx2.AsyncClient(base_url=address, timeout=3600, limits=limits) as client:

        async def work() -> None:
            while waiting:
                number, text = waiting.pop()
                await ask(client, block, number, text, max_tokens)

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(num_clients)))
        block.seconds = time.perf_counter() - begun
    return block


def measure(store: Path, questions: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Alternate blocks of both models on one server."""
    name = options.backbone
    numbered = list(enumerate(questions))
    half = (len(numbered) + 1) // 2
    parts = [numbered[:half], numbered[half:]]
    blocks: list[Block] = []
    with serving(store, options.clients) as address:
        warm = numbered[: options.clients]
        for model in ("auto", name):  # caches, kernels, memory
            asyncio.run(run_block(address, model, warm, options.clients, 4))
        for model, part in (("auto", 0), (name, 0), (name, 1), ("auto", 1)):
            clients, tokens = options.clients, options.max_tokens
            blocks.append(asyncio.run(run_block(address, model, parts[part], clients, tokens)))
            print(f"  {model}: {blocks[-1].num_tokens / blocks[-1].seconds:.1f} tokens/s", flush=True)
    found: dict[str, object] = {}
    for label, model in (("routed", "auto"), ("frozen", name)):
        own = [block for block in blocks if block.model == model]
        first = sorted(s for block in own for s in block.first_s)
        found[label] = {
            "tokens": sum(b.num_tokens for b in own),
            "tokens_per_s": sum(b.num_tokens for b in own) / sum(b.seconds for b in own),
            "first_token_p50_s": statistics.median(first),
            "first_token_p99_s": first[min(len(first) - 1, int(0.99 * len(first)))],
            "errors": [error for b in own for error in b.errors],
        }
    routed, frozen = found["routed"], found["frozen"]
    assert isinstance(routed, dict)
    assert isinstance(frozen, dict)
    found["speed_ratio"] = routed["tokens_per_s"] / frozen["tokens_per_s"]
    found["first_token_p99_ratio"] = routed["first_token_p99_s"] / frozen["first_token_p99_s"]
    found["routes"] = {n: r for b in blocks if b.model == "auto" for n, r in b.routes.items()}
    return found


def library_route(model: ScalableLM, question: str) -> str:
    """The likeliest task of a question asked alone, "" where it belongs to none."""
    retrieved = model.retrieve([question])
    assert retrieved is not None
    return "" if retrieved.is_abstained[0] else model.tasks[int(retrieved.tasks[0, 0])].name


def wrong_routes(model: ScalableLM, questions: list[str], routes: dict[int, str]) -> int:
    """Requests whose likeliest task is another than the library decides, one question at a time."""
    decided = {text: library_route(model, text) for text in set(questions)}
    return sum(routes.get(number) != decided[text] for number, text in enumerate(questions))


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folders with train.jsonl")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--examples", type=int, default=40, help="texts that a task's keys are made of")
    parser.add_argument("--stored", type=int, nargs="*", default=[5, 500], help="store sizes to compare")
    parser.add_argument("--store", type=Path, help="where the store of the tasks is, or is to be kept")
    parser.add_argument("--flat-requests", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/results")
    options = parser.parse_args()
    random.seed(0)
    everything = read_texts(options.data, options.tasks, options.examples * 2)
    taught = {name: texts[: options.examples] for name, texts in everything.items()}
    asked = [text for texts in everything.values() for text in texts[options.examples :]]
    report: dict[str, object] = {
        "backbone": options.backbone, "requests": options.requests, "clients": options.clients,
        "max_tokens": options.max_tokens, "tasks": len(taught), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine(),
    }  # fmt: skip
    questions = [random.choice(asked) for _ in range(options.requests)]
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch) / "tasks"
        if (store / "store.json").is_file():
            model = ScalableLM.open(store)
        else:
            all_layers = {"rank": 8, "targets": "all-linear", "stored": 0}
            model = build(store, options.backbone, taught, all_layers)
        print(f"{len(taught)} tasks", flush=True)
        mixed = measure(store, questions, options)
        routes = mixed.pop("routes")
        assert isinstance(routes, dict)
        mixed["wrong_routes"] = wrong_routes(model, questions, routes)
        report["mixed"] = mixed
        del model
        report["stored"] = {}
        few = dict(list(taught.items())[:5])
        own = [text for name in few for text in everything[name][options.examples :]]
        some = [random.choice(own) for _ in range(options.flat_requests)]
        for size in options.stored:
            folder = Path(scratch) / f"stored-{size}"
            build(folder, options.backbone, few, {"rank": 4, "targets": "attention-output", "stored": size})
            print(f"{size} stored tasks", flush=True)
            found = measure(folder, some, options)
            found.pop("routes")
            report["stored"][str(size)] = found  # type: ignore[index]
    print(json.dumps(report, indent=2))
    if options.write:
        write(report)


def write(report: dict[str, object]) -> None:
    """Keep the figures, as JSON, as a page and as a plot."""
    (RESULTS / "serving.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        "# Serving", "",
        f"`benchmarks/serving.py`: {report['clients']} clients at once, {report['requests']} requests of "
        f"{report['tasks']} tasks mixed at random, answers of at most {report['max_tokens']} tokens, "
        f"{report['backbone']}, {report['threads']} threads on {report['cores']} cores (load "
        f"{report['load']:.1f} when it began). Keys are of real texts, increments random and small. Blocks "
        "of routed and frozen requests alternate on one server, so their ratio holds on a busy machine; "
        "their absolute figures do not.", "",
        "| store | routed, tokens/s | frozen, tokens/s | ratio | p99 first token, ratio | wrong | errors |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    rows = [(f"{report['tasks']} tasks, all layers, rank 8", report["mixed"])]
    rows += [(f"{size} tasks, attention outputs, rank 4", one) for size, one in report["stored"].items()]  # type: ignore[attr-defined]
    for label, one in rows:
        assert isinstance(one, dict)
        wrong, errors = (
            one.get("wrong_routes", ""),
            len(one["routed"]["errors"]) + len(one["frozen"]["errors"]),
        )
        lines.append(
            f"| {label} | {one['routed']['tokens_per_s']:.1f} | {one['frozen']['tokens_per_s']:.1f} | "
            f"{one['speed_ratio']:.3f} | {one['first_token_p99_ratio']:.3f} | {wrong} | {errors} |"
        )
    (RESULTS / "serving.md").write_text("\n".join([*lines, "", "![speed ratios](serving.png)"]) + "\n")
    draw(rows)


def draw(rows: list[tuple[str, object]]) -> None:
    """Ratios as bars, with what is aimed at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2 + 0.4 * len(rows)), layout="constrained", sharey=True)
    titles = (
        ("speed_ratio", "tokens/s, routed / frozen", 0.85),
        ("first_token_p99_ratio", "p99 first token", 1.3),
    )
    for axis, (field_name, title, aim) in zip(axes, titles, strict=True):
        values = [one[field_name] for _, one in rows]  # type: ignore[index]
        axis.barh([label for label, _ in rows], values, color="#4477aa")
        axis.axvline(aim, color="#cc6677", linestyle="--")
        axis.set_title(title)
        axis.invert_yaxis()
    figure.savefig(RESULTS / "serving.png", dpi=120)


if __name__ == "__main__":
    main()
