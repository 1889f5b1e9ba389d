"""What a model answers from: one consistent snapshot of the store, and what DTKR gives each row of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, final

import torch
from torch import Tensor

from slm.backbone.reparameterize import Mixture
from slm.config import PoolConfig, RetrievalConfig
from slm.errors import IncrementError, StoreError, TaskError
from slm.increments.increment import Increment
from slm.increments.pool import ByteCache, IncrementPool
from slm.retrieval.keys import TaskKeys
from slm.retrieval.retriever import Retrieved, Retriever
from slm.store import Store, TaskRecord

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """The tasks a model answers from: one consistent snapshot of the store.

    Attributes:
        version: of the store when it was read.
        records: the tasks in learning order.
        retriever: decides among them; None when there are none.
    """

    version: int
    records: tuple[TaskRecord, ...]
    retriever: Retriever | None

    @property
    def needs_two_passes(self) -> bool:
        """Whether a task bends the very layers that make the query, as imported ones may."""
        return any(record.metadata.get("needs_two_passes") for record in self.records)


@dataclass(frozen=True, slots=True)
class Share:
    """One increment of a row's mixture.

    Attributes:
        record: the task it is of.
        increment: which of the task's increments.
        weight: its part of the mixture, above 0.
    """

    record: TaskRecord
    increment: int
    weight: float


Shares = Sequence[Share]
"""The mixture of one row, largest first; empty where the frozen backbone answers."""


def shares_of(retrieved: Retrieved, records: Sequence[TaskRecord]) -> list[list[Share]]:
    """What was decided for each row, by record instead of by number."""
    rows: list[list[Share]] = [[] for _ in range(len(retrieved.weights))]
    for row, column in (retrieved.weights > 0).nonzero().tolist():
        record = records[int(retrieved.tasks[row, column])]
        weight = float(retrieved.weights[row, column])
        rows[row].append(Share(record, int(retrieved.increments[row, column]), weight))
    return rows


@final
class KnowledgeReader:
    """Reads snapshots; of the store only the keys of tasks not seen before, one sum and a few scatters.

    One reader may be used from several threads.

    Args:
        store: where knowledge is.
        config: DTKR's settings, the false-refusal rate decided.
        device: where the exact index computes.
        dtype: that the backbone computes in.
    """

    def __init__(
        self, store: Store, config: RetrievalConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._store, self._config, self._device = store, config, device
        self._epsilon = torch.finfo(dtype).eps
        self._keys: dict[str, TaskKeys] = {}  # by commit id, without scatters
        self._lock = threading.Lock()

    def newest(self) -> Knowledge:
        """Everything the store holds now.

        Raises:
            StoreError: it cannot be read.
        """
        while True:
            # The version first: what is committed in between is read now and once more later.
            version = self._store.version
            try:
                records = self._store.tasks()
                with self._lock:
                    for gone in self._keys.keys() - {record.commit_id for record in records}:
                        del self._keys[gone]
                return self.read(records, version)
            except StoreError:
                if not self.is_outdated(version):
                    raise

    def named(self, names: Sequence[str], *, is_abstaining: bool | None = None) -> Knowledge:
        """The tasks of these names alone, as the store holds them now.

        Args:
            names: of the tasks, in the order they get.
            is_abstaining: differs from the store's settings where it is given.

        Raises:
            TaskError: a name is unknown, or its task was forgotten while it was read.
            StoreError: the store cannot be read.
        """
        while True:
            version = self._store.version
            try:
                return self.read(self._store.named(names), version, is_abstaining=is_abstaining)
            except StoreError:
                if not self.is_outdated(version):
                    raise

    def is_outdated(self, version: int) -> bool:
        """Whether tasks have come or gone since; files of a task forgotten since may be missing."""
        return self._store.version != version

    def read(
        self, records: Sequence[TaskRecord], version: int, *, is_abstaining: bool | None = None
    ) -> Knowledge:
        """These tasks alone.

        Args:
            records: the tasks.
            version: of the store they were read from.
            is_abstaining: differs from the store's settings where it is given.
        """
        if not records:
            return Knowledge(version, (), None)
        with self._lock:
            new = [record for record in records if record.commit_id not in self._keys]
            for record, keys in zip(new, self._store.all_keys(new, has_scatter=False), strict=True):
                self._keys[record.commit_id] = keys
            own = [self._keys[record.commit_id] for record in records]
        config = self._config
        if is_abstaining is not None:
            config = replace(config, is_abstaining=is_abstaining)
        retriever = Retriever(
            own,
            self._store.scatter_sum(records),
            config,
            lambda number: self._store.scatter(records[number]),
            self._device,
            self._store.background,
            self._epsilon,
        )
        return Knowledge(version, tuple(records), retriever)


@final
class CurrentKnowledge:
    """The snapshot a model answers from; it follows the store unless it is pinned.

    Args:
        reader: reads the store.
        pinned: the snapshot to stay with, whatever the store learns or forgets.

    Attributes:
        held: the snapshot as it was last read.
        is_pinned: whether it stays.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, reader: KnowledgeReader, pinned: Knowledge | None = None) -> None:
        self._reader, self.is_pinned = reader, pinned is not None
        self.held = pinned or reader.newest()

    def newest(self) -> Knowledge:
        """The snapshot, with what other processes have committed or forgotten since taken in.

        Raises:
            StoreError: the store cannot be read.
        """
        if not self.is_pinned and self._reader.is_outdated(self.held.version):
            self.held = self._reader.newest()
        return self.held

    def renewing(self, act: Callable[[Knowledge], _T]) -> _T:
        """What ``act`` makes of the held snapshot; once more where a task of it was forgotten meanwhile.

        Raises:
            StoreError: ``act`` did, and the snapshot is pinned or as new as the store.
        """
        while True:
            knowledge = self.held
            try:
                return act(knowledge)
            except StoreError:
                if self.is_pinned or not self._reader.is_outdated(knowledge.version):
                    raise
                self.newest()


@final
@dataclass
class Supply:
    """Increments and heads, from memory or else from the store.

    Args:
        store: where they are kept.
        budgets: bytes that may stay in memory.
        device: where the backbone computes.
    """

    store: Store
    budgets: PoolConfig
    device: torch.device
    num_hits: int = field(default=0, init=False)
    num_misses: int = field(default=0, init=False)
    loaded: dict[str, Increment] = field(default_factory=dict, init=False)
    """Increments of no store, by the commit id of the record that stands for them."""

    def __post_init__(self) -> None:
        self.pool = IncrementPool(self.budgets.host_bytes, self.device, self.budgets.device_bytes)
        self._heads: ByteCache[Mapping[str, Tensor]] = ByteCache(self.budgets.head_bytes, _size_of)

    def mixture(self, rows: Sequence[Shares]) -> Mixture:
        """Turn shares into increments: what crosses from DTKR to JARe.

        Raises:
            StoreError: an increment cannot be read.
        """
        places: dict[tuple[str, int], int] = {}
        wanted: dict[Hashable, Callable[[], Increment]] = {}
        num_kept = max((len(shares) for shares in rows), default=0) or 1
        slots = torch.zeros(len(rows), num_kept, dtype=torch.long)
        weights = torch.zeros(len(rows), num_kept)
        for row, shares in enumerate(rows):
            for column, share in enumerate(shares):
                key = (share.record.commit_id, share.increment)
                slots[row, column] = places.setdefault(key, len(places))
                weights[row, column] = share.weight
                wanted[key] = partial(self._read, share.record, share.increment)
        misses = self.num_misses
        increments = self.pool.get(wanted)
        self.num_hits += len(wanted) - (self.num_misses - misses)
        return Mixture(increments, slots, weights)

    def head(self, record: TaskRecord) -> Mapping[str, Tensor]:
        """A task's head.

        Raises:
            TaskError: it has none.
        """
        head = self._heads.get(record.commit_id)
        if head is None:
            head = self.store.head(record)
            if head is None:
                raise TaskError(
                    f"task {record.name!r} has no head, so an encoder cannot answer it: learn it again"
                )
            self._heads.put(record.commit_id, head)
        return head

    def take(self, record: TaskRecord, increment: Increment) -> None:
        """Keep an increment of no store, by the record that stands for it.

        Raises:
            IncrementError: together they would take more than the memory that increments may have.
        """
        size = sum(own.size_bytes for own in (*self.loaded.values(), increment))
        if size > self.budgets.host_bytes:
            raise IncrementError(
                f"adapter {record.name!r} would bring what is loaded by name to {size / 1e6:.1f} MB, "
                f"{self.budgets.host_bytes / 1e6:.1f} are allowed: unload one, or raise pool.host_bytes"
            )
        self.loaded[record.commit_id] = increment

    def drop(self, record: TaskRecord) -> None:
        """Let go of what a forgotten task left in memory."""
        self._heads.drop(record.commit_id)
        for index in range(record.num_increments):
            self.pool.drop((record.commit_id, index))

    def _read(self, record: TaskRecord, index: int) -> Increment:
        self.num_misses += 1
        if record.commit_id in self.loaded:
            return self.loaded[record.commit_id]
        return self.store.increment(record, index)


def _size_of(head: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in head.values())
