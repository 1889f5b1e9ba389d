"""Requests that the OpenAPI document allows, and some that it does not, drawn by schemathesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase

OWN_STATUSES = {501, 502, 503, 504}
"""Refusals above 500 that are meant: a server that stops, an upstream that is gone, a deadline."""


def fuzz(
    address: str, num_examples: int, seed: int = 0, on_answer: Callable[[], None] = lambda: None
) -> Counter[tuple[str, int]]:
    """Send requests to every operation in turn, and count the statuses.

    Args:
        address: of a running server.
        num_examples: requests, about as many for each operation.
        seed: chooses them.
        on_answer: is called after each.

    Raises:
        AssertionError: an answer is a defect of the server, or shows one.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    counts: Counter[tuple[str, int]] = Counter()
    modes = list(schemathesis.GenerationMode)
    for number, operation in enumerate(operations):
        if operation.path.endswith("/events"):
            continue  # a stream that ends with its job
        per_mode = max(1, num_examples // (len(operations) * len(modes)))
        for mode in modes:
            _fuzz_one(address, operation, mode, per_mode, seed + number, counts, on_answer)
    return counts


def _fuzz_one(address, operation, mode, num_examples, seed, counts, on_answer) -> None:
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Exception as error:
        if "negative" in str(error).lower() or "Unsatisfiable" in type(error).__name__:
            return
        raise

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def send(case) -> None:
        answer = case.call(base_url=address, timeout=120)
        name = f"{operation.method.upper()} {operation.path}"
        counts[name, answer.status_code] += 1
        text = answer.text
        assert answer.status_code < 500 or answer.status_code in OWN_STATUSES, (name, text[:500])
        assert "Traceback (most recent call last)" not in text, (name, text[:500])
        if answer.status_code >= 400 and answer.headers.get("content-type") == "application/json":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (name, text[:500])
        on_answer()

    try:
        send()
    except hypothesis.errors.Unsatisfiable:
        return
