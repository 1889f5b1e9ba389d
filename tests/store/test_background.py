"""What a store knows of text that belongs to no task: kept to the bit, and missed when it is gone."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from slm.errors import StoreError
from slm.retrieval.background import learn_background
from slm.store import Manifest, Store
from slm.store.background import BACKGROUND_NAME, read_background


@pytest.fixture
def background():
    return learn_background(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def kept(tmp_path, background):
    return Store.create(tmp_path / "kept", Manifest("a/backbone", "f", {}), background)


def test_it_comes_back_to_the_bit(kept, background):
    found = Store.open(kept.path).background
    assert torch.equal(found.mean, background.mean)
    assert torch.equal(found.scatter, background.scatter)
    assert found.num_texts == 30
    assert kept.check() == []


def test_a_store_may_go_without(tmp_path):
    made = Store.create(tmp_path / "bare", Manifest("a/backbone", "f", {}))
    assert made.background is None
    assert Store.open(made.path).background is None
    assert not (made.path / BACKGROUND_NAME).exists()


def test_a_missing_or_altered_file_is_told_by_the_reader_and_by_the_doctor(kept):
    file = kept.path / BACKGROUND_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = f"{file} has been altered (its sha256 is wrong): restore it from a copy"
    with pytest.raises(StoreError) as caught:
        _ = Store.open(kept.path).background
    assert str(caught.value) == message
    assert kept.check() == [message]
    file.unlink()
    assert kept.check() == [f"{file} is missing: restore it from a copy"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"mean": torch.zeros(2)}, "lacks a mean, a scatter or a number of texts"),
        (
            {"mean": torch.zeros(2), "scatter": torch.zeros(2), "num_texts": torch.tensor(3)},
            "do not fit each other",
        ),
        (
            {"mean": torch.zeros(2), "scatter": torch.zeros(3), "num_texts": torch.tensor(0)},
            "do not fit each other",
        ),
        (
            {"mean": torch.tensor([0.0, torch.nan]), "scatter": torch.zeros(3), "num_texts": torch.tensor(3)},
            "holds NaN or infinity at 'mean'",
        ),
    ],
)
def test_a_file_of_other_tensors_is_refused(tmp_path, tensors, said):
    file = tmp_path / BACKGROUND_NAME
    save_file(tensors, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(StoreError, match=said):
        read_background(tmp_path, Manifest("a/backbone", "f", {}, background_sha256=digest))
