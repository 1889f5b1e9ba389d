"""Tensors on disk: safetensors files, and increments as PEFT adapter folders. No pickle, ever.

An increment's folder is what PEFT calls a LoRA adapter, so it loads there unchanged; reading one
trusts nothing in it and needs no PEFT.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as render_safetensors
from torch import Tensor

from slm.errors import IncrementError, StoreError
from slm.increments.increment import Increment, LowRankPair

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# Settings under which PEFT computes something else than s · B A with one s and one rank.
_FOREIGN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")

# Everything the parsers of safetensors and torch are known to raise on bytes that are no tensors.
_NO_TENSORS = (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` by rename: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        write_bytes(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; a no-op where folders cannot be synced."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors file of ``tensors``; views and shared storage are copied first.

    Same tensors, same bytes: safetensors writes metadata in any order, here it is sorted.
    """
    copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    data: bytes = render_safetensors(copies, dict(metadata) if metadata else None)
    if not metadata:
        return data
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return data[:8] + text + data[8 + size :]


def bytes_to_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes; ``where`` names the file in the message.

    Raises:
        StoreError: the bytes are no safetensors file, or hold NaN or infinity.
    """
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except _NO_TENSORS as error:
        raise unreadable(where) from error
    refuse_infinite(tensors, where)
    return tensors


def refuse_infinite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        StoreError: a tensor holds one.
    """
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
        if not bool(torch.isfinite(wide).all()):
            raise StoreError(f"{where} holds NaN or infinity at {name!r}: restore it from a copy")


def write_adapter(
    folder: Path, increment: Increment, backbone_source: str, task_type: str | None = None
) -> None:
    """Write ``increment`` as a new PEFT LoRA adapter folder, so that PEFT adds the same s · B A.

    Rank and alpha stand in the tensors' file too, so that slm reads that one file only.
    """
    folder.mkdir()
    alpha = increment.alpha
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": backbone_source,
        "revision": None,
        "r": increment.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(increment.pairs),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for name, pair in increment.pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B
    write_bytes(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    metadata = {"format": "pt", "rank": str(increment.rank), "alpha": repr(float(alpha))}
    write_bytes(folder / ADAPTER_MODEL, tensors_to_bytes(tensors, metadata))
    sync_folder(folder)


def read_adapter(folder: Path) -> Increment:
    """Read a plain LoRA adapter folder, as :func:`write_adapter` makes them.

    Raises:
        StoreError: a file is missing, or is no safetensors file.
        IncrementError: the files do not hold one increment.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_MODEL) if not (folder / name).is_file()]
    if missing:
        raise StoreError(
            f"{folder} is not an adapter folder (no file {missing[0]}): "
            f"it needs {ADAPTER_CONFIG} and {ADAPTER_MODEL}"
        )
    settings = parse_config((folder / ADAPTER_CONFIG).read_bytes(), f"{folder}/{ADAPTER_CONFIG}")
    return load_increment(folder / ADAPTER_MODEL, f"{folder}/{ADAPTER_MODEL}", lambda: settings)


def load_increment(file: Path, where: str, read_settings: Callable[[], tuple[int, float]]) -> Increment:
    """The increment in an adapter's tensors, through one memory map that is given up before returning.

    The values are copied out, so the file may go and the caller's byte budget counts what is resident.

    Args:
        file: the safetensors file.
        where: how a message calls it.
        read_settings: gives rank and alpha where the file does not say them itself.

    Raises:
        StoreError: it is no safetensors file, or holds NaN or infinity.
        IncrementError: it does not hold one increment.
    """
    with open_tensors(file, where) as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    refuse_infinite(tensors, where)
    try:
        rank, alpha = _parse_metadata(metadata) if "rank" in metadata else read_settings()
        return Increment(_pair_up(tensors), rank, alpha)
    except IncrementError as error:
        raise IncrementError(f"{where}: {error}") from error


@contextlib.contextmanager
def open_tensors(file: Path, where: str) -> Iterator[Any]:
    """A safetensors file, mapped into memory within the block; its header has been checked.

    Raises:
        StoreError: it is no safetensors file, also when that turns out within the block.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except _NO_TENSORS as error:
        raise unreadable(where) from error


def unreadable(where: str) -> StoreError:
    """The error that bytes are no tensors; ``where`` names the file in the message."""
    return StoreError(f"{where} is not a safetensors file torch can hold: restore it from a copy")


def _pair_up(tensors: Mapping[str, Tensor]) -> dict[str, LowRankPair]:
    """Layer name -> pair, out of PEFT's names."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        module = name[len(PREFIX) : -len(suffix)] if suffix else ""
        if suffix is None or not name.startswith(PREFIX) or not module:
            raise IncrementError(f"it holds {name!r}, which is no lora_A or lora_B weight: not an increment")
        if not tensor.is_floating_point():
            raise IncrementError(
                f"it holds {tensor.dtype} at {name!r}: an increment has floating point values"
            )
        halves.setdefault(module, {})[_SUFFIXES[suffix]] = tensor
    for module, half in halves.items():
        if len(half) != 2:
            missing = "lora_B" if "A" in half else "lora_A"
            raise IncrementError(f"it has no {missing} for {module!r}: the file does not hold one increment")
    return {module: LowRankPair(half["A"], half["B"]) for module, half in halves.items()}


def _parse_metadata(metadata: Mapping[str, str]) -> tuple[int, float]:
    try:
        return int(metadata["rank"]), float(metadata["alpha"])
    except (KeyError, ValueError) as error:
        raise IncrementError("its rank and alpha cannot be read: restore it from a copy") from error


def parse_config(config: bytes, where: str) -> tuple[int, float]:
    """Rank and alpha out of a plain adapter's settings.

    Raises:
        IncrementError: they are no JSON, or describe something else than LoRA of one rank and alpha.
    """
    try:
        found = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise IncrementError(f"{where} is not JSON: restore it from a copy") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise IncrementError(f"{where} does not describe a LoRA adapter: only peft_type LORA is an increment")
    foreign = [name for name in _FOREIGN if found.get(name)]
    if foreign or found.get("bias", "none") != "none":
        raise IncrementError(
            f"{where} sets {', '.join(foreign or ['bias'])}: "
            "only plain LoRA with one rank and one alpha is an increment"
        )
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise IncrementError(f"{where} has r = {rank!r}: it must be a whole number, at least 1")
    if (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9  # true of NaN
    ):
        raise IncrementError(f"{where} has lora_alpha = {alpha!r}: it must be a number up to 1e9")
    return rank, float(alpha)
