"""Tensors on disk: safetensors files, and increments as PEFT adapter folders. No pickle, ever.

An increment's folder is what PEFT calls a LoRA adapter, so it loads there unchanged; reading one
trusts nothing in it and needs no PEFT.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as render_safetensors
from torch import Tensor

from slm.errors import IncrementError, StoreError
from slm.increments.increment import Increment, LowRankPair

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# Settings under which PEFT computes something else than s · B A with one s and one rank.
_FOREIGN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


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


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors file of ``tensors``; views and shared storage are copied first."""
    data: bytes = render_safetensors({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})
    return data


def bytes_to_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes; ``where`` names the file in the message.

    Raises:
        StoreError: the bytes are no safetensors file, or hold NaN or infinity.
    """
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise StoreError(
            f"{where} is not a safetensors file torch can hold: restore it from a copy"
        ) from error
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
        if not bool(torch.isfinite(wide).all()):
            raise StoreError(f"{where} holds NaN or infinity at {name}: restore it from a copy")
    return tensors


def write_adapter(folder: Path, increment: Increment, backbone_source: str) -> None:
    """Write ``increment`` as a new PEFT LoRA adapter folder, so that PEFT adds the same s · B A."""
    folder.mkdir()
    alpha = increment.alpha
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": None,
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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B
    write_bytes(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_bytes(folder / ADAPTER_MODEL, tensors_to_bytes(tensors))
    sync_folder(folder)


def read_adapter(folder: Path) -> Increment:
    """Read any plain LoRA adapter folder, this store's or another program's.

    Raises:
        StoreError: a file is missing, or is no safetensors file.
        IncrementError: the files do not hold one increment.
    """
    try:
        config, tensors = (folder / ADAPTER_CONFIG).read_bytes(), (folder / ADAPTER_MODEL).read_bytes()
    except OSError as error:
        raise StoreError(
            f"{folder} is not an adapter folder ({error.strerror}): "
            f"it needs {ADAPTER_CONFIG} and {ADAPTER_MODEL}"
        ) from error
    return parse_adapter(config, tensors, str(folder))


def parse_adapter(config: bytes, tensors: bytes, where: str) -> Increment:
    """The increment in the bytes of an adapter's two files; ``where`` names its folder in messages.

    Raises:
        StoreError: the second is no safetensors file, or holds NaN or infinity.
        IncrementError: the two do not hold one increment.
    """
    rank, alpha = _parse_config(config, f"{where}/{ADAPTER_CONFIG}")
    file = f"{where}/{ADAPTER_MODEL}"
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in bytes_to_tensors(tensors, file).items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        module = name[len(_PREFIX) : -len(suffix)] if suffix else ""
        if suffix is None or not name.startswith(_PREFIX) or not module:
            raise IncrementError(
                f"{file} holds {name!r}, which is no lora_A or lora_B weight: not an increment"
            )
        if not tensor.is_floating_point():
            raise IncrementError(
                f"{file} holds {tensor.dtype} at {name}: an increment has floating point values"
            )
        halves.setdefault(module, {})[_SUFFIXES[suffix]] = tensor
    for module, half in halves.items():
        if len(half) != 2:
            missing = "lora_B" if "A" in half else "lora_A"
            raise IncrementError(
                f"{file} has no {missing} for {module}: the file does not hold one increment"
            )
    try:
        pairs = {module: LowRankPair(half["A"], half["B"]) for module, half in halves.items()}
        return Increment(pairs, rank, alpha)
    except IncrementError as error:
        raise IncrementError(f"{file}: {error}") from error


def _parse_config(config: bytes, where: str) -> tuple[int, float]:
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
