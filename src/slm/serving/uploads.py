"""What was uploaded: into the quarantine under names of our own, checked before anything is made of it."""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from slm.errors import SlmError
from slm.serving.refusals import Refused
from slm.tasks import load_task

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "slm.json")
_CHUNK_BYTES = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
)


def save_examples(source: Any, file_name: str, folder: Path, max_bytes: int) -> Path:
    """Copy a data file into the quarantine; of the client's name only the known ending is used.

    Raises:
        Refused: the ending is unknown, or the file is too long.
    """
    suffix = PurePosixPath(file_name.replace("\\", "/")).suffix.lower()
    if suffix not in SUFFIXES:
        shown = suffix[:20] or "none"
        text = f"the file must end in {', '.join(SUFFIXES)}, got {shown!r}: rename or convert it"
        raise Refused(400, text, "invalid_file", "file")
    target = folder / f"examples{suffix}"
    _copy(source, target, max_bytes, "file")
    return target


def check_examples(name: str, file: Path, kind: str | None, max_examples: int = 1_000_000) -> None:
    """Read a data file once, so that whoever sent it learns at once what is wrong with it.

    Raises:
        Refused: it cannot be learned from.
    """
    try:
        task = load_task(name, file, kind=kind)
    except SlmError as error:
        text = " ".join(str(error).split()).replace(str(file), file.name)
        raise Refused(400, text, "invalid_file", "file") from None
    except RecursionError:
        raise Refused(400, "the file is nested too deeply: flatten it", "invalid_file", "file") from None
    if len(task.examples) > max_examples:
        raise Refused(400, f"the file has more than {max_examples} examples", "invalid_file", "file")
    if any(example.target is None for example in task.examples):
        raise Refused(
            400,
            "some examples have no answer: give every one a label or a completion",
            "invalid_file",
            "file",
        )


def unpack_adapter(source: Any, folder: Path, max_bytes: int) -> Path:
    """Unpack a zip of a PEFT adapter: only the files an adapter has, whatever else the archive claims.

    Raises:
        Refused: it is no such archive, or holds more than is allowed.
    """
    archive, target = folder / "adapter.zip", folder / "adapter"
    _copy(source, archive, max_bytes, "adapter")
    target.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(archive) as opened:
            left = max_bytes
            for entry in opened.infolist():
                left = _unpack(opened, entry, target, left)
    except _DAMAGED as error:
        text = f"the adapter cannot be unpacked ({type(error).__name__}): send a plain zip of its folder"
        raise Refused(400, text, "invalid_adapter", "adapter") from None
    archive.unlink()
    if not (target / ADAPTER_FILES[0]).is_file() or not (target / ADAPTER_FILES[1]).is_file():
        text = f"the adapter must hold {ADAPTER_FILES[0]} and {ADAPTER_FILES[1]}: zip its folder"
        raise Refused(400, text, "invalid_adapter", "adapter")
    return target


def _unpack(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, left: int) -> int:
    """Write one entry, and say how many bytes may still come."""
    if entry.is_dir():
        return left
    name = PurePosixPath(entry.filename.replace("\\", "/")).name
    if name not in ADAPTER_FILES or (target / name).exists() or stat.S_ISLNK(entry.external_attr >> 16):
        text = f"the adapter may hold {', '.join(ADAPTER_FILES)} once each and nothing else: leave it out"
        raise Refused(400, text, "invalid_adapter", "adapter")
    with opened.open(entry) as source, (target / name).open("xb") as out:
        # The header's size is a claim; what is read is what counts.
        while chunk := source.read(_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise Refused(413, "the adapter is too large when unpacked", "body_too_long", "adapter")
            out.write(chunk)
    return left


def _copy(source: Any, target: Path, max_bytes: int, param: str) -> None:
    num_bytes = 0
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        while chunk := source.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise Refused(413, f"{param} is longer than {max_bytes} bytes", "body_too_long", param)
            out.write(chunk)
    if not num_bytes:
        raise Refused(400, f"{param} is empty: send some examples", "invalid_file", param)
