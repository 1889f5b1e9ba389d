"""Store: knowledge on disk; one atomic commit per task; no pickle, ever."""

from slm.store.catalogue import FileRecord, Manifest, Store, TaskKnowledge, TaskRecord

__all__ = ["FileRecord", "Manifest", "Store", "TaskKnowledge", "TaskRecord"]
