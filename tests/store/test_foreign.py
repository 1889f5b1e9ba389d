"""Files that nobody vouches for are read as safetensors reads them, whatever happens to them meanwhile."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slm.errors import IncrementError, StoreError
from slm.store import foreign
from slm.store.foreign import open_foreign, read_floats

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "usual": torch.randn(64, 2048),
    "half": torch.randn(3).half(),
    "short": torch.randn(2, 2).bfloat16(),
    "nothing": torch.empty(0, 5),
    "one": torch.tensor(3.5),
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "file.safetensors", {"format": "pt"})
    return tmp_path / "file.safetensors"


def test_names_kinds_shapes_and_values_are_those_that_safetensors_reads(file):
    with open_foreign(file) as opened, safe_open(file, framework="pt") as known:
        assert opened.keys() == sorted(known.keys())
        for name in opened.keys():  # noqa: SIM118
            found, expected = opened.get_slice(name), known.get_slice(name)
            assert (found.get_dtype(), found.get_shape()) == (expected.get_dtype(), expected.get_shape())
        floats = [name for name, tensor in TENSORS.items() if tensor.is_floating_point()]
        values = read_floats(opened, floats, "file")
    assert values.keys() == set(floats)
    for name, value in values.items():
        expected = TENSORS[name].float() if name == "wide" else TENSORS[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_what_is_read_belongs_to_nobody_else(file):
    with open_foreign(file) as opened:
        first, second = (read_floats(opened, ["usual"], "file")["usual"] for _ in range(2))
    first.zero_()
    assert torch.equal(second, TENSORS["usual"])
    file.unlink()


@pytest.mark.parametrize("size", [0, 8192])
def test_a_file_cut_short_while_it_is_read_is_an_error_and_not_the_end_of_the_process(file, size):
    with open_foreign(file) as opened:
        os.truncate(file, size)
        with pytest.raises(StoreError, match=r"became shorter while it was read: wait until it is written"):
            read_floats(opened, ["usual"], str(file))


def test_whole_numbers_are_refused_by_name(file):
    with (
        open_foreign(file) as opened,
        pytest.raises(IncrementError, match=r"^file holds I64 at 'whole': values must be floats of 16 bits"),
    ):
        read_floats(opened, ["whole"], "file")


def header(text: str, num_bytes: int = 4) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(num_bytes)


def entry(shape: str = "[1]", offsets: str = "[0,4]", dtype: str = '"F32"') -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05\0\0\0\0\0\0\0{}",
        header("[]"),
        header("[" * 100_000),
        header("{}"),  # nothing, and four bytes
        header('{"x":7}'),
        header('{"x":{}}'),
        header(f'{{"x":{entry()}}}', 3),
        header(f'{{"x":{entry()}}}', 5),
        header(f'{{"x":{entry(offsets="[0]")}}}'),
        header(f'{{"x":{entry(offsets="[4,0]")}}}'),
        header(f'{{"x":{entry(offsets="[-4,0]")}}}'),
        header(f'{{"x":{entry(offsets="[0,4.0]")}}}'),
        header(f'{{"x":{entry(shape="[true]")}}}'),
        header(f'{{"x":{entry(shape="[2]")}}}'),
        header(f'{{"x":{entry(shape="1")}}}'),
        header(f'{{"x":{entry(shape="[" + ",".join(["1"] * 65) + "]")}}}'),
        header(f'{{"x":{entry(shape="[1" + "0" * 5000 + "]")}}}'),
        header(f'{{"x":{entry(dtype="7")}}}'),
        header(f'{{"x":{entry()},"y":{entry()}}}'),  # one over the other
        header(f'{{"x":{entry()},"y":{entry(offsets="[8,12]")}}}', 12),  # a hole
    ],
)
def test_headers_that_describe_no_such_file_are_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with (
        pytest.raises(StoreError, match=r"file is not a safetensors file torch can hold: restore it from a"),
        open_foreign(tmp_path / "file"),
    ):
        pytest.fail("it was opened")


def test_a_file_that_cannot_be_read_is_named(file, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match=r"none cannot be read \(No such file or directory\): check its per"):
        open_foreign(tmp_path / "none").__enter__()
    monkeypatch.setattr(foreign, "_MAX_HEADER_BYTES", 10)
    with pytest.raises(StoreError, match=r"announces a header of \d+ bytes, at most 10 are read: it is dam"):
        open_foreign(file).__enter__()
