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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.backbone.cache import cache_folder
from slm.errors import BackboneError

SOURCE = Path(__file__).with_name("kernel.cpp")
MAX_RANK = 512
"""K·R up to which the kernel can be used; ``kernel.cpp`` has the same number."""

_FLAGS = ["-shared", "-fPIC", "-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"]
_CAPABILITIES = {
    "AVX512": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    + ["-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
_NAMES = {
    (torch.bfloat16, torch.bfloat16): "bend_bf16",
    (torch.float32, torch.float32): "bend_f32",
    (torch.float32, torch.float16): "bend_f32_f16",
}
_MIN_PARALLEL = 1 << 16


@functools.cache
def row_kernel(dtype: torch.dtype, kept: torch.dtype | None = None) -> Any:
    """The compiled function, given what ``kernel.cpp`` says; None where there is none.

    Args:
        dtype: of the activations.
        kept: of the pairs; the same where it is not given.
    """
    name = _NAMES.get((dtype, kept or dtype))
    library = _library() if name and os.environ.get("SLM_KERNEL", "1") != "0" else None
    function = getattr(library, name, None) if library and name else None
    if function is None:
        return None
    function.argtypes = [ctypes.c_void_p] * 3
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
    try:
        target = cache_folder() / "kernels" / f"{digest[:16]}.so"
        if not target.is_file():
            _compile(command, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError, BackboneError):
        return None  # the plain ways remain


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, timeout=120)
        made.replace(target)


def kernel_call(parts: Sequence[Tensor], sizes: Sequence[int]) -> Any:
    """What the kernel is given beside x and y, for as long as these tensors live.

    Args:
        parts: down (S, stride, I), up (S, stride, O), slots (B, K), weights (B, K) and order (B).
        sizes: B, T, K, R, stride, I and O.
    """
    num_rows, num_tokens, num_slots, rank, _, num_in, num_out = sizes
    cost = num_rows * num_tokens * num_slots * rank * (num_in + num_out)
    num_threads = torch.get_num_threads() if cost >= _MIN_PARALLEL else 1  # worth waking
    words = *(part.data_ptr() for part in parts), *sizes, num_threads
    return (ctypes.c_int64 * len(words))(*words)
