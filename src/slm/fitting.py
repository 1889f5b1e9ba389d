"""Whether settings of a new store fit its backbone and this machine, found before anything is written."""

from __future__ import annotations

from dataclasses import replace

import torch

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.load import lasting_source
from slm.config import Config
from slm.errors import ConfigError
from slm.extractor import Extractor
from slm.retrieval.cosine import check_groups
from slm.retrieval.features import first_bent_block, settle_reading
from slm.retrieval.index import build_index


def settled(config: Config, backbone: Backbone) -> Config:
    """What a store writes down: it names what it reads, whatever later versions read by default.

    Raises:
        ConfigError: a setting is not what the backbone was loaded with, or names a layer it does not have.
    """
    retrieval = settle_reading(config.retrieval, backbone.num_layers)
    if retrieval.extractor == "sentence":
        retrieval = replace(retrieval, sentence_model=lasting_source(retrieval.sentence_model))
    return replace(config, backbone=backbone.settled(config.backbone), retrieval=retrieval)


def fitting_extractor(config: Config, backbone: Backbone) -> Extractor:
    """The extractor of a new store, whose settings are found to fit.

    Raises:
        BackboneError: a wanted layer cannot be re-parameterized, or the sentence encoder is missing.
        ConfigError: a setting would be refused by everything that the store is for.
    """
    retrieval = config.retrieval
    backbone.targets(config.increments.targets, first_bent_block(retrieval, backbone.num_layers))
    if config.learning.start == "retrieved":
        check_start(backbone)
    if retrieval.index == "vector":
        # The number of keys that FAISS wants at least, of one channel.
        build_index(torch.zeros(39, 1, dtype=torch.float64), retrieval)
    extractor = Extractor(backbone, retrieval)
    if retrieval.form == "cosine":
        check_groups(extractor.num_channels, retrieval.cosine.num_groups)
    return extractor


def check_start(backbone: Backbone) -> None:
    """Expect a backbone on which a task may start from earlier ones.

    Raises:
        ConfigError: it is no encoder.
    """
    if backbone.kind is not BackboneKind.ENCODER:
        raise ConfigError(
            f"start is 'retrieved', which judges starts by an encoder's labels; {backbone.source!r} is "
            f"a {backbone.kind.value} backbone: set start to 'none'"
        )
