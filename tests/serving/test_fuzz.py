"""No request that schemathesis thinks of makes the server fail; benchmarks/fuzz_serving.py sends more."""

from __future__ import annotations

import pytest

from tests.backbone.families import load
from tests.serving.conftest import serving
from tests.serving.stores import make_store


def test_no_generated_request_makes_the_server_fail(tmp_path, tiny_folder):
    pytest.importorskip("schemathesis")
    from tests.serving.fuzz import fuzz

    model = make_store(tmp_path / "store", load(tiny_folder))
    # Adapters are off and teaching is on: both ways are taken.
    with serving(model, is_teaching=True, max_tokens=8, default_tokens=4) as address:
        counts = fuzz(address, 200)
    statuses = {status for _, status in counts}
    assert sum(counts.values()) > 100
    assert {200, 400} <= statuses
    assert len({name for name, _ in counts}) > 12
