"""Which layers give the query."""

from __future__ import annotations

import pytest

from slm.config import RetrievalConfig
from slm.errors import ConfigError
from slm.retrieval.features import first_bent_block, num_passes, query_layers, query_parts, settle_reading


def test_a_shallow_backbone_spends_a_frozen_pass_and_bends_every_block():
    config = RetrievalConfig()
    assert query_layers(config, 6) == (3, 5)
    assert query_layers(RetrievalConfig(pooling="mean"), 6) == (1, 3, 5)
    assert num_passes(config, 6) == 2
    assert first_bent_block(config, 6) == 0


def test_a_deep_backbone_reads_its_first_layers_and_bends_the_rest():
    config = RetrievalConfig()
    assert query_layers(config, 30) == (2, 6)
    assert query_layers(config, 16) == (1, 3)
    assert query_layers(RetrievalConfig(pooling="mean"), 30) == (2, 4)
    assert query_layers(RetrievalConfig(pooling="split-ends"), 30) == (2, 4)
    assert num_passes(config, 30) == 1
    assert first_bent_block(config, 30) == 6


def test_layers_the_backbone_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"^layers has 9, the backbone has 6 layers: lower it$"):
        query_layers(RetrievalConfig(layers=(2, 9)), 6)


def test_a_single_pass_that_leaves_nothing_to_bend_is_refused():
    with pytest.raises(
        ConfigError, match=r"read after layer 6 of 6 in one pass, which leaves nothing to bend"
    ):
        first_bent_block(RetrievalConfig(layers=(6,), num_passes=1), 6)


@pytest.mark.parametrize(
    ("num_layers", "pooling", "layers"),
    [(6, "split-ends", (3, 5)), (16, "ends", (1, 3)), (30, "ends", (2, 6))],
)
def test_what_is_read_by_default_is_decided_by_depth_and_then_written_down(num_layers, pooling, layers):
    settled = settle_reading(RetrievalConfig(), num_layers)
    assert (settled.pooling, settled.layers) == (pooling, layers)
    assert query_parts(RetrievalConfig(), num_layers) == query_parts(settled, num_layers)
    assert settle_reading(settled, num_layers) == settled


@pytest.mark.parametrize(
    ("pooling", "parts"),
    [
        ("ends", ((2, "even-mean"), (4, "even-mean"), (4, "last"), (4, "first"))),
        ("split-ends", ((2, "even-mean"), (4, "even-mean"), (4, "last"), (2, "first"))),
        ("mean", ((2, "mean"), (4, "mean"))),
    ],
)
def test_a_query_holds_means_and_the_words_at_both_ends(pooling, parts):
    assert query_parts(RetrievalConfig(layers=(2, 4), pooling=pooling), 30) == parts
