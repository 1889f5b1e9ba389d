"""``background.safetensors``: where text lies that belongs to no task, written once, with the store."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from slm.errors import StoreError
from slm.retrieval.background import Background
from slm.store.manifest import Manifest
from slm.store.values import bytes_to_tensors, refuse_infinite, tensors_to_bytes, write_bytes

BACKGROUND_NAME = "background.safetensors"
_REMEDY = "restore it from a copy"


def write_background(path: Path, background: Background) -> str:
    """Write the background of the store at ``path``; returns the SHA-256 of its file, in hexadecimal.

    Args:
        path: the store's folder.
        background: what is written.
    """
    data = tensors_to_bytes(
        {
            "mean": background.mean,
            "scatter": background.scatter,
            "num_texts": torch.tensor(background.num_texts),
        }
    )
    write_bytes(path / BACKGROUND_NAME, data)
    return hashlib.sha256(data).hexdigest()


def read_background(path: Path, manifest: Manifest) -> Background | None:
    """The background of the store at ``path``; None where it keeps none.

    Raises:
        StoreError: the file is missing, altered or holds no background.
    """
    if manifest.background_sha256 is None:
        return None
    file = path / BACKGROUND_NAME
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{file} is missing: {_REMEDY}") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}): {_REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != manifest.background_sha256:
        raise StoreError(f"{file} has been altered (its sha256 is wrong): {_REMEDY}")
    found = bytes_to_tensors(data, str(file))
    try:
        mean, scatter, num_texts = found["mean"], found["scatter"], int(found["num_texts"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"{file} lacks a mean, a scatter or a number of texts: {_REMEDY}") from error
    num_channels = mean.shape[0] if mean.ndim == 1 else 0
    if scatter.shape != (num_channels * (num_channels + 1) // 2,) or num_texts < 1:
        raise StoreError(f"{file} has a mean and a scatter that do not fit each other: {_REMEDY}")
    refuse_infinite(found, str(file))
    return Background(mean.to(torch.float64), scatter.to(torch.float32), num_texts)


def background_problems(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the background, in one line; empty when all is well."""
    try:
        read_background(path, manifest)
    except StoreError as error:
        return [str(error)]
    return []
