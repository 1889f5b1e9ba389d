"""Freed memory is kept for the next pass."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from slm.backbone.memory import ENVIRONMENT

PROGRAM = """
import resource, torch
from slm.backbone.memory import keep_freed_memory
print(keep_freed_memory())
wide, narrow = torch.randn(2048, 512), torch.randn(512, 2048)
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(1024, 512)
    for _ in range(4):
        x = (x @ wide.T).tanh() @ narrow.T
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def run(**variables: str) -> tuple[str, int]:
    """What keep_freed_memory says, and how many new pages a pass touches that is like those before it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | variables, check=True, capture_output=True, text=True
    )
    said, faults = done.stdout.split()
    return said, int(faults)


def test_a_pass_touches_hardly_any_new_page():
    said, faults = run()
    assert said == "True"
    assert faults < 200


def test_a_process_started_with_the_variables_does_the_same():
    said, faults = run(**ENVIRONMENT)
    assert said == "False"
    assert faults < 200


def test_the_user_decides_otherwise_in_the_environment():
    said, faults = run(MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert said == "False"
    assert faults > 5_000
    assert run(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576")[0] == "False"
