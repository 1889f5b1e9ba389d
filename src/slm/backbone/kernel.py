"""The row kernel: a layer's whole change in one call on a CPU; compiled once, where there is a compiler.

The plain ways of :mod:`slm.backbone.bindings` compute the same and are its reference in the tests. Without a
compiler, or with ``SLM_KERNEL=0``, they do all the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from slm.backbone.cache import cache_folder

SOURCE = Path(__file__).with_name("kernel.cpp")
MAX_RANK = 512
"""K·R up to which the kernel can be used; ``kernel.cpp`` has the same number."""

_FLAGS = ["-shared", "-fPIC", "-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"]
_CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
_NAMES = {torch.bfloat16: "bend_bf16", torch.float32: "bend_f32"}
_MIN_PARALLEL = 1 << 16


@functools.cache
def row_kernel(dtype: torch.dtype) -> Any:
    """The compiled function for a dtype, given what ``kernel.cpp`` says; None where there is none."""
    name = _NAMES.get(dtype)
    library = _library() if name and os.environ.get("SLM_KERNEL", "1") != "0" else None
    if library is None or name is None:
        return None
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int]
    function.restype = None
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or platform.system() != "Linux":
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    command = [compiler, *_FLAGS, *_CAPABILITIES.get(capability, [])]
    digest = hashlib.sha256(SOURCE.read_bytes() + repr([platform.machine(), *command]).encode()).hexdigest()
    target = cache_folder() / "kernels" / f"{digest[:16]}.so"
    try:
        if not target.is_file():
            _compile(command, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None  # the plain ways remain


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, timeout=120)
        made.replace(target)


def kernel_sizes(
    num_rows: int, num_tokens: int, num_slots: int, rank: int, stride: int, features: tuple[int, int]
) -> tuple[Any, int]:
    """The sizes as the kernel reads them, and how many threads are worth waking for them.

    Args:
        num_rows: B.
        num_tokens: T.
        num_slots: K.
        rank: R.
        stride: room for ranks in a slot.
        features: I and O.
    """
    cost = num_rows * num_tokens * num_slots * rank * sum(features)
    num_threads = torch.get_num_threads() if cost >= _MIN_PARALLEL else 1
    return (ctypes.c_int64 * 7)(num_rows, num_tokens, num_slots, rank, stride, *features), num_threads
