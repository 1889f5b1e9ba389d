"""Shared fixtures: real small pretrained backbones, loaded once, and stores taught once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models of most tests are so small that a second thread only holds up every step.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shapes in annotations are checked in tests, and only there.
install_import_hook(
    ["slm.retrieval", "slm.backbone.heads", "slm.backbone.reparameterize", "slm.reading"],
    "beartype.beartype",
)

from pathlib import Path

import pytest

from slm.backbone.load import load_backbone
from slm.config import BackboneConfig, Config, LearningConfig
from slm.model import ScalableLM
from slm.tasks import Task

SHARED_DATA = Path(os.environ.get("SLM_DATA") or Path(__file__).parents[2] / "shared" / "data")

LANGUAGES = {
    "french": ["où est la gare", "je voudrais du pain", "il fait beau", "merci beaucoup", "le chat dort ici"],
    "german": [
        "wo ist der Bahnhof",
        "ich möchte Brot",
        "das Wetter ist gut",
        "vielen Dank",
        "die Katze schläft",
    ],
}
MOODS = {
    "good": [
        "what a lovely film",
        "a joy from start to end",
        "brilliant acting",
        "i loved it",
        "a warm delight",
    ],
    "bad": [
        "what a dreadful film",
        "a bore from start to end",
        "terrible acting",
        "i hated it",
        "a cold mess",
    ],
}
SUMS = [(f"what is {a} plus {b}?", str(a + b)) for a in range(2, 7) for b in range(3, 6)]


def rows_of(texts: dict[str, list[str]]) -> list[dict[str, str]]:
    """Rows of a classification, a few variants of each text."""
    return [
        {"text": form.format(text), "label": label}
        for label, own in texts.items()
        for text in own
        for form in ("{}", "{}!", "well, {}")
    ]


@pytest.fixture(scope="session")
def languages() -> Task:
    return Task.from_rows("languages", rows_of(LANGUAGES))


@pytest.fixture(scope="session")
def moods() -> Task:
    return Task.from_rows("moods", rows_of(MOODS))


@pytest.fixture(scope="session")
def sums() -> Task:
    return Task.from_rows("sums", [{"prompt": q, "completion": a} for q, a in SUMS])


def config(num_epochs: int, max_tokens: int = 128) -> Config:
    return Config(
        backbone=BackboneConfig(dtype="float32", max_tokens=max_tokens),
        learning=LearningConfig(num_epochs=num_epochs, has_progress=False),
    )


@pytest.fixture(scope="session")
def minilm():
    return load_backbone("minilm", BackboneConfig(dtype="float32", max_tokens=128))


@pytest.fixture(scope="session")
def smollm2():
    return load_backbone("smollm2", BackboneConfig(dtype="float32", max_tokens=128))


@pytest.fixture(scope="session")
def small_t5_folder(tmp_path_factory):
    """A small T5 trained on packaged texts, as a folder that transformers loads."""
    from tests.backbone.trained_t5 import train_t5

    folder = tmp_path_factory.mktemp("models") / "small-t5"
    train_t5(folder)
    return folder


@pytest.fixture(scope="session")
def small_t5(small_t5_folder):
    return load_backbone(str(small_t5_folder), BackboneConfig(dtype="float32", max_tokens=128))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, minilm, languages, moods):
    """MiniLM taught two tasks."""
    model = ScalableLM.create(tmp_path_factory.mktemp("encoder") / "store", minilm, config(6))
    model.learn(languages)
    model.learn(moods)
    return model


@pytest.fixture(scope="session")
def causal(tmp_path_factory, smollm2, moods, sums):
    """SmolLM2 taught a classification and a generation."""
    model = ScalableLM.create(tmp_path_factory.mktemp("causal") / "store", smollm2, config(3))
    model.learn(moods)
    model.learn(sums)
    return model
