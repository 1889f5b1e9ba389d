"""Generated requests by the thousand: no failure, no traceback, no growth of memory.

    PYTHONPATH=. python benchmarks/fuzz_serving.py --requests 10000 --write

schemathesis draws requests from the OpenAPI document of a server of a tiny random model, valid ones and
others. The server runs in a process of its own; its resident memory is read after every request.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
from tests.backbone.families import load, save
from tests.serving.fuzz import fuzz
from tests.serving.stores import make_store

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def resident_mib(process_id: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    """Serve, fuzz, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as sock:
        folder = Path(scratch)
        make_store(folder / "store", load(save("LLaMA", folder / "tiny")))
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.close()
        command = [sys.executable, "-m", "slm.cli.main", "serve", str(folder / "store"), "--port", str(port)]
        log = (folder / "log").open("wb")
        process = subprocess.Popen([*command, "--max-queue", "64"], stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    httpx2.get(f"{address}/ready", timeout=5)
                    break
                except httpx2.HTTPError:
                    time.sleep(0.5)
            memory: list[float] = []

            def note() -> None:
                memory.append(resident_mib(process.pid))

            counts = fuzz(address, options.requests, on_answer=note)
        finally:
            process.terminate()
            process.wait(60)
        num_tracebacks = (folder / "log").read_text(errors="replace").count("Traceback")
    late = memory[len(memory) // 2 :]
    tenth = max(1, len(late) // 10)
    growth = sum(late[-tenth:]) / sum(late[:tenth]) - 1
    statuses: dict[str, int] = {}
    for (_, status), number in counts.items():
        statuses[str(status)] = statuses.get(str(status), 0) + number
    report = {
        "requests": len(memory),
        "operations": len({name for name, _ in counts}),
        "statuses": dict(sorted(statuses.items())),
        "tracebacks_in_log": num_tracebacks,
        "resident_mib_at_half": round(late[0], 1),
        "resident_mib_at_end": round(late[-1], 1),
        "growth_over_last_half": round(growth, 4),
    }
    print(json.dumps(report, indent=2))
    if options.write:
        (RESULTS / "fuzz_serving.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
