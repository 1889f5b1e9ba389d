"""What ``retrieval.py`` measures of the extractor: a prefill that reads the query over one that does not."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from slm.backbone.backbone import Backbone
from slm.backbone.load import load_backbone
from slm.backbone.prompts import Batch
from slm.config import BackboneConfig, RetrievalConfig
from slm.retrieval.features import query_parts

NUM_TOKENS = 128


def prefill_s(backbone: Backbone, batch: Batch, parts: Any) -> float:
    """Seconds of one prefill; it reads the query where there are parts to read."""
    begun = time.perf_counter()
    if parts is None:
        backbone.model(**backbone.inputs(batch))
    else:
        with backbone.reading_query(batch, parts, lambda _: None):
            backbone.model(**backbone.inputs(batch))
    return time.perf_counter() - begun


@torch.inference_mode()
def reading_cost(num_pairs: int = 40) -> dict[str, dict[str, float]]:
    """Ratios of the two, taken in turn, for SmolLM2 at batch 1 and 8."""
    backbone = load_backbone("smollm2", BackboneConfig(max_tokens=512))
    parts = query_parts(RetrievalConfig(), backbone.num_layers)
    row = backbone.row("word " * 4 * NUM_TOKENS, is_truncating=True, where="the row")
    found = {}
    for batch_size in (1, 8):
        rows = backbone.batch([row] * batch_size)
        batch = Batch(**{name: getattr(rows, name)[:, :NUM_TOKENS] for name in Batch.__slots__})
        ratios = []
        for i in range(num_pairs + 3):
            times = {
                is_read: prefill_s(backbone, batch, parts if is_read else None)
                for is_read in (i % 2 == 0, i % 2 == 1)
            }
            ratios.append(times[True] / times[False])
        low, middle, high = statistics.quantiles(ratios[3:], n=4)
        found[f"smollm2, batch {batch_size}"] = {"ratio": middle, "low": low, "high": high}
    return found
