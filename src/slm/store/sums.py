"""Sums of scatters over tasks, exact, and the snapshot that saves adding them all up again.

A sum is kept as two float64 numbers per entry, high + low, 106 bits in all. Float32 scatters add up
in that without any rounding unless one entry's addends differ by more than about 2^75, and that is
noticed, entry by entry. So ``high`` is the exact sum rounded once: it does not depend on the order of
the tasks, and taking a task away gives back, bit for bit, what was there before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from slm.errors import StoreError
from slm.store.values import bytes_to_tensors, replace_bytes, tensors_to_bytes


def add_exactly(high: Tensor, low: Tensor, addend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(high + low) + addend without rounding, by error-free transformations (Knuth's TwoSum).

    Args:
        high: (P,) float64, the sum so far rounded to float64.
        low: (P,) float64, what that rounding left out.
        addend: (P,) float64.

    Returns:
        high and low of the new sum, each (P,) float64, and the part that did not fit, (P,) float64,
        zero wherever the new sum is exact.
    """
    total, error = _two_sum(high, addend)
    rest, lost = _two_sum(low, error)
    return *_two_sum(total, rest), lost


def sum_exactly(scatters: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, Tensor, bool]:
    """The exact sum of float32 tensors, one tensor in memory at a time.

    Args:
        scatters: gives the (P,) float32 addends, again at every call.

    Returns:
        high, (P,) float64, the exact sum rounded once; low, (P,) float64, the rest; and whether
        high + low is the exact sum in every entry.
    """
    high = low = lossy = torch.zeros(0, dtype=torch.float64)
    for index, scatter in enumerate(scatters()):
        if index == 0:
            high, low = scatter.double(), torch.zeros(len(scatter), dtype=torch.float64)
            lossy = torch.zeros(len(scatter), dtype=torch.bool)
            continue
        high, low, lost = add_exactly(high, low, scatter.double())
        lossy = lossy | (lost != 0)
    places = lossy.nonzero().flatten()
    if len(places) == 0:
        return high, low, True
    columns = torch.stack([scatter[places] for scatter in scatters()]).double().T.tolist()
    high[places] = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return high, low, False


@final
class Snapshots:
    """The ``pooled`` folder: one file with the sum over all visible tasks. A cache, nothing more.

    Its name is the digest of the tasks' commit ids, so it can never be taken for the sum over other
    tasks; it carries its own sha256, so a damaged one is as good as none.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, commit_ids: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """High and low, each (P,) float64, of the sum over these tasks; None when not at hand."""
        file = self._file(commit_ids)
        try:
            found = bytes_to_tensors(file.read_bytes(), str(file))
        except (OSError, StoreError):
            return None
        sums, checksum = found.get("sums"), found.get("sha256")
        if sums is None or checksum is None or sums.dtype != torch.float64 or sums.ndim != 2:
            return None
        if len(sums) != 2 or not torch.equal(checksum, _checksum(sums)):
            return None
        return sums[0], sums[1]

    def write(self, commit_ids: Sequence[str], high: Tensor, low: Tensor) -> None:
        """Put the sum over these tasks at hand; high and low: (P,) float64.

        Does nothing where the folder cannot be written: the next reader adds up by itself.
        """
        file, sums = self._file(commit_ids), torch.stack([high, low])
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            replace_bytes(file, tensors_to_bytes({"sums": sums, "sha256": _checksum(sums)}))

    def derive(self, before: Sequence[str], after: Sequence[str], change: Tensor) -> None:
        """Snapshot of the tasks ``after`` from that of the tasks ``before``, by one addition; older files go.

        Without a snapshot to start from, or when the addition is not exact, none is written.

        Args:
            before: commit ids the present snapshot stands for.
            after: commit ids the new one shall stand for.
            change: (P,) float64, scatter of the task that came, or minus that of the one that went.
        """
        nothing = torch.zeros_like(change)
        start = (nothing, nothing) if not before else self.read(before)
        if start is not None and after and len(start[0]) == len(change):
            high, low, lost = add_exactly(*start, change)
            if not bool(lost.any()):
                self.write(after, high, low)
        self.keep_only(after)

    def keep_only(self, commit_ids: Sequence[str]) -> None:
        """Remove every file but the snapshot of these tasks."""
        for file in self.strays(commit_ids):
            with suppress(OSError):  # read-only, or gone: nothing depends on it
                file.unlink()

    def remove(self, commit_ids: Sequence[str]) -> None:
        """Remove the snapshot of these tasks."""
        with suppress(OSError):
            self._file(commit_ids).unlink()

    def strays(self, commit_ids: Sequence[str]) -> list[Path]:
        """Everything in the folder but the snapshot of these tasks, by name."""
        kept = self._file(commit_ids)
        try:
            return sorted(file for file in self.folder.iterdir() if file != kept)
        except OSError:
            return []

    def _file(self, commit_ids: Sequence[str]) -> Path:
        digest = hashlib.sha256("\n".join(sorted(commit_ids)).encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A + b as its float64 rounding and the exact error of that rounding."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def _checksum(sums: Tensor) -> Tensor:
    digest = hashlib.sha256(sums.contiguous().numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
