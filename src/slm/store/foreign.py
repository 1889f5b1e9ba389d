"""Tensors of a file that nobody vouches for: its header is checked before any value is read.

The file is read, not mapped into memory: a map of a file that somebody else cuts short ends the process.
Reading needs no parser but JSON's, and takes memory for what is asked alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from slm.errors import IncrementError, StoreError
from slm.store.values import refuse_infinite, unreadable

_MAX_HEADER_BYTES = 1 << 25
_MAX_DIMENSIONS = 64
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@final
@dataclass(frozen=True, slots=True)
class ForeignEntry:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: its kind of numbers, in safetensors' own letters.
        shape: its sizes.
        begin: offset of its first byte behind the header.
        end: offset of the byte behind its last.
    """

    dtype: str
    shape: list[int]
    begin: int
    end: int

    def get_dtype(self) -> str:
        """The kind of numbers."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """The sizes."""
        return self.shape


@final
class ForeignFile:
    """An open safetensors file, asked as safetensors' own are.

    Args:
        stream: open at its first byte.
        where: how a message calls it.

    Raises:
        StoreError: it is no safetensors file, or its header is larger than usual.
    """

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._stream, self._where = stream, where
        size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise StoreError(
                f"{where} announces a header of {size} bytes, at most {_MAX_HEADER_BYTES} are read: "
                "it is damaged"
            )
        self._start = 8 + size
        try:
            self._entries = _parse(stream.read(size))
            _expect_filled(self._entries.values(), os.fstat(stream.fileno()).st_size - self._start)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise unreadable(where) from error

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._entries)

    def get_slice(self, name: str) -> ForeignEntry:
        """What the header says of a tensor; no value is read."""
        return self._entries[name]

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of floats, read into memory of its own.

        Raises:
            StoreError: it cannot be read, or the file has become shorter.
        """
        entry = self._entries[name]
        data = bytearray(entry.end - entry.begin)
        try:
            self._stream.seek(self._start + entry.begin)
            num_bytes = self._stream.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise StoreError(
                f"{self._where} cannot be read ({error.strerror}): check its permissions"
            ) from error
        if num_bytes != len(data):
            raise StoreError(
                f"{self._where} became shorter while it was read: wait until it is written and try again"
            )
        dtype = _FLOATS[entry.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(entry.shape)


def _parse(text: bytes) -> dict[str, ForeignEntry]:
    """The entries of a header by name; what is raised where it is none says no more than that."""
    found = json.loads(text.decode())
    return {name: _entry(said) for name, said in found.items() if name != "__metadata__"}


def _entry(said: Any) -> ForeignEntry:
    dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise TypeError
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise TypeError
    if dtype in _FLOATS and math.prod(shape) * _FLOATS[dtype].itemsize != end - begin:
        raise ValueError
    return ForeignEntry(dtype, shape, begin, end)


def _expect_filled(entries: Iterable[ForeignEntry], num_bytes: int) -> None:
    """Expect tensors to lie one behind the other, from the end of the header to that of the file."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end or entry.end < end:
            raise ValueError
        end = entry.end
    if end != num_bytes:
        raise ValueError


@contextlib.contextmanager
def open_foreign(file: Path) -> Iterator[ForeignFile]:
    """A safetensors file, open within the block; its header is one of usual size.

    Raises:
        StoreError: it cannot be read, or is no safetensors file.
    """
    with contextlib.ExitStack() as stack:
        try:
            opened = ForeignFile(stack.enter_context(file.open("rb")), str(file))
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
        yield opened


def read_floats(opened: ForeignFile, names: Iterable[str], where: str) -> dict[str, Tensor]:
    """Some tensors of an open file; float64 becomes float32.

    Raises:
        StoreError: one holds NaN, infinity or what is too large for float32, or cannot be read.
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


def _read(opened: ForeignFile, name: str, where: str) -> Tensor:
    """A tensor; float64 becomes float32, in which slm computes."""
    tensor = opened.get_tensor(name)
    if tensor.dtype != torch.float64:
        return tensor
    narrow = tensor.float()
    if bool((narrow.isinf() & tensor.isfinite()).any()):
        raise StoreError(
            f"{where} holds values too large for float32 at {name!r}: restore it from a copy or train it anew"
        )
    return narrow
