from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from slm.store import Manifest, Store

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """worker.py as a module, whatever way pytest imports tests."""
    spec = importlib.util.spec_from_file_location("store_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path: Path) -> Store:
    manifest = Manifest("a/backbone", "fingerprint-1", {"rank": 2, "targets": ["q_proj"]})
    return Store.create(tmp_path / "knowledge", manifest)


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts worker.py in a process of its own; what is still running at the end is stopped."""
    running = []

    def begin(*arguments: object, **settings: str) -> subprocess.Popen[str]:
        environment = (
            os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            | settings
        )
        process = subprocess.Popen(
            [sys.executable, "-B", str(WORKER), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def contents() -> Callable[[Path], dict[str, tuple[bytes, int]]]:
    """The bytes and the time of change of every file below a folder."""

    def look(folder: Path) -> dict[str, tuple[bytes, int]]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}

    return look
