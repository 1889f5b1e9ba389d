"""Fixtures of the tests that run over families of backbones: each is made and loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from slm.backbone.backbone import Backbone
from tests.backbone.families import load, save


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, request) -> Callable[[str], Any]:
    """Folder of a family's tiny model."""
    folders: dict[str, Any] = {}

    def find(name: str) -> Any:
        if name == "small T5":
            return request.getfixturevalue("small_t5_folder")
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp("family"))
        return folders[name]

    return find


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    return {}


@pytest.fixture
def backbone(family, request, backbones, folder_of) -> Backbone:
    if family == "SmolLM2" and not os.environ.get("SLM_ALL_BACKBONES"):
        pytest.skip(
            "SmolLM2 takes a minute here, and other tests hold it to most of this: SLM_ALL_BACKBONES=1"
        )
    if family in ("MiniLM", "SmolLM2"):
        return request.getfixturevalue(family.lower())
    if family not in backbones:
        backbones[family] = load(folder_of(family))
    backbones[family].reparameterizer.release()
    return backbones[family]
