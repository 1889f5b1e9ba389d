"""Tensors of a file that nobody vouches for: its header is checked before any value is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.errors import IncrementError, StoreError
from slm.store.values import open_tensors, refuse_infinite

_MAX_HEADER_BYTES = 1 << 25
_FLOATS = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def open_foreign(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory within the block; its header is one of usual size.

    Raises:
        StoreError: it cannot be read, or is no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    if size > _MAX_HEADER_BYTES:
        raise StoreError(
            f"{file} announces a header of {size} bytes, at most {_MAX_HEADER_BYTES} are read: it is damaged"
        )
    with open_tensors(file, str(file)) as opened:
        yield opened


def read_floats(opened: Any, names: Iterable[str], where: str) -> dict[str, Tensor]:
    """Some tensors of an open file, copied out of it; float64 becomes float32.

    Raises:
        StoreError: one holds NaN, infinity or what is too large for float32.
        IncrementError: one does not hold floats of 16 bits or more.
    """
    names = tuple(names)
    kinds = {name: opened.get_slice(name).get_dtype() for name in names}
    for name, kind in kinds.items():
        if kind not in _FLOATS:
            raise IncrementError(
                f"{where} holds {kind} at {name!r}: values must be floats of 16 bits or more"
            )
    tensors = {name: _read(opened, name, where) for name in names}
    refuse_infinite(tensors, where)
    return tensors


def _read(opened: Any, name: str, where: str) -> Tensor:
    """A tensor copied out; float64 becomes float32, in which slm computes."""
    tensor: Tensor = opened.get_tensor(name)
    if tensor.dtype != torch.float64:
        return tensor.clone()
    narrow = tensor.float()
    if bool((narrow.isinf() & tensor.isfinite()).any()):
        raise StoreError(
            f"{where} holds values too large for float32 at {name!r}: restore it from a copy or train it anew"
        )
    return narrow
