"""slm that never abstains: what abstention is worth for requests of no task."""

from __future__ import annotations

import dataclasses

from slm.bench.baselines.isolated import IsolatedRival
from slm.config import Config, RetrievalConfig


class NeverAbstaining(IsolatedRival):
    """Every question gets the nearest knowledge, however far it is."""

    name = "slm-never-abstaining"
    title = "slm, never abstaining"

    def retrieval(self, config: RetrievalConfig) -> RetrievalConfig:
        """The default without its threshold."""
        return dataclasses.replace(config, is_abstaining=False)

    @property
    def learning_config(self) -> Config:
        """What slm learns: abstention is no part of it."""
        return self.setup.config
