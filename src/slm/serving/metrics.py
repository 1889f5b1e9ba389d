"""What Prometheus is told: requests, latencies, queue, tokens, tasks retrieved, abstentions, pool hits."""

from __future__ import annotations

from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
MAX_TASKS = 1000
"""Tasks that get a series of their own; more would make the page too long."""


@final
class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("slm_requests", "Requests answered.", ["route", "status"], **own)
        self.latency = Histogram(
            "slm_request_seconds", "Time to the last byte.", ["route"], buckets=_SECONDS, **own
        )
        self.first_token = Histogram(
            "slm_first_token_seconds", "Time to the first text.", buckets=_SECONDS, **own
        )
        self.prompt_tokens = Counter("slm_prompt_tokens", "Tokens read.", **own)
        self.written_tokens = Counter("slm_written_tokens", "Tokens written.", **own)
        self.retrieved = Counter("slm_tasks_retrieved", "Answers that used a task.", ["task"], **own)
        self.abstentions = Counter("slm_abstentions", "Routed requests that belong to no task.", **own)
        self._tasks: set[str] = set()

    def watch(self, engine: Any) -> None:
        """Read the gauges off an engine whenever they are asked for."""
        supply = engine.model.supply
        watched = {
            ("slm_queue_length", "Requests waiting."): lambda: engine.num_waiting,
            ("slm_rows", "Answers being written."): lambda: engine.num_running,
            ("slm_steps", "Steps of the engine since it started."): lambda: engine.num_steps,
            ("slm_tasks", "Tasks in the store."): lambda: len(engine.knowledge.records),
            ("slm_store_version", "Version of the store in use."): lambda: engine.knowledge.version,
            ("slm_pool_hits", "Increments found in memory."): lambda: supply.num_hits,
            ("slm_pool_misses", "Increments read from the store."): lambda: supply.num_misses,
            ("slm_pool_bytes", "Bytes of increments in memory."): lambda: supply.pool.size_bytes,
        }
        for (name, text), function in watched.items():
            Gauge(name, text, registry=self.registry).set_function(function)

    def count_mixture(self, mixture: tuple[tuple[str, float], ...], is_abstained: bool) -> None:
        """Count which tasks an answer used."""
        if is_abstained:
            self.abstentions.inc()
        for task, _ in mixture:
            if task not in self._tasks and len(self._tasks) < MAX_TASKS:
                self._tasks.add(task)
            self.retrieved.labels(task if task in self._tasks else "(others)").inc()

    def page(self) -> bytes:
        """The text format of Prometheus."""
        return bytes(generate_latest(self.registry))
