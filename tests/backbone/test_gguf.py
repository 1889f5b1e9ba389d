"""GGUF files: dequantised once, to the values their own reader gives, and refused when they are damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from slm.backbone.load import cache_folder, load_backbone, locate
from slm.config import BackboneConfig
from slm.errors import BackboneError


def test_the_weights_are_those_the_files_own_reader_dequantises(smollm2):
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(locate("smollm2")).tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.base.weight",
        "blk.29.attn_output.weight": "model.layers.29.self_attn.o_proj.base.weight",
    }
    weights = smollm2.model.state_dict()
    for name, own in pairs.items():
        values = torch.from_numpy(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).copy())
        assert torch.equal(weights[own], values.bfloat16().float())  # the cache keeps bfloat16


def test_a_path_and_its_alias_are_one_backbone_and_the_cache_is_read_the_second_time(smollm2):
    path = Path(locate("smollm2"))
    kept = cache_folder() / "gguf" / hashlib.sha256(path.read_bytes()).hexdigest() / "model.safetensors"
    before = kept.stat().st_mtime_ns
    again = load_backbone(str(path), BackboneConfig(dtype="bfloat16", max_tokens=128))
    assert again.fingerprint == smollm2.fingerprint
    assert kept.stat().st_mtime_ns == before


def test_a_missing_or_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BackboneError, match=r"backbone file .*none\.gguf does not exist: check the path$"):
        load_backbone(str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(BackboneError, match=r"bad\.gguf cannot be read as GGUF \(.*\): use an intact file$"):
        load_backbone(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
