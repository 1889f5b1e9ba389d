"""Store: knowledge on disk; one atomic commit per task; no pickle, ever."""
