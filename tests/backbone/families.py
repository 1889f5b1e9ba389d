"""One tiny random model per backbone family, built from its config, and the names of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from slm.backbone.backbone import Backbone
from slm.backbone.load import load_backbone
from slm.config import BackboneConfig
from slm.tasks.packaged import bbc_topics, question_languages

NUM_BLOCKS = 3
VOCABULARY = 1000
PAD, BEGIN, END, MASK = "<pad>", "<s>", "</s>", "<mask>"

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 16
"""Sliding window of the models that have one: shorter than most rows of the tests."""


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
        config: name of its config class in transformers.
        model: name of the model class that is saved.
        kind: encoder, causal or sequence-to-sequence.
        settings: of the tiny model.
        layers: linear layers of a block, by name inside the block; those of a decoder's block second.
        outputs: those of them that are attention outputs.
        stacks: names of the stacks of blocks.
        frozen: layers that rows share, so that they stay frozen.
    """

    config: str
    model: str
    kind: str
    settings: dict[str, Any]
    stacks: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    frozen: tuple[str, ...] = ()


_BERT = (
    *(f"attention.self.{x}" for x in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_LLAMA = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


def _bert(name: str, **settings: Any) -> Family:
    shape = {**_SHAPE, "max_position_embeddings": 131, **settings}  # RoBERTa keeps places for padding
    layers = (_BERT,), (("attention.output.dense",),)
    return Family(f"{name}Config", f"{name}Model", "encoder", shape, ("encoder.layer",), *layers)


def _llama(name: str, config: str | None = None, **settings: Any) -> Family:
    layers = (_LLAMA,), (("self_attn.o_proj",),)
    shape = {**_GROUPED, **settings}
    return Family(
        f"{config or name}Config", f"{name}ForCausalLM", "causal", shape, ("model.layers",), *layers
    )


_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _MIXED_LAYERS, "query_pre_attn_scalar": 8}
_BART = tuple(f"self_attn.{x}_proj" for x in ("k", "v", "q", "out"))
_T5 = tuple(f"layer.0.SelfAttention.{x}" for x in "qkvo")

FAMILIES: dict[str, Family] = {
    "BERT": _bert("Bert"),
    "RoBERTa": _bert("Roberta"),
    "DeBERTa-v2": Family(
        "DebertaV2Config",
        "DebertaV2Model",
        "encoder",
        {
            **_SHAPE,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        ("encoder.layer",),
        (("attention.self.value_proj", *_BERT[3:]),),
        (("attention.output.dense",),),
        ("attention.self.query_proj", "attention.self.key_proj"),
    ),
    "MPNet": Family(
        "MPNetConfig",
        "MPNetModel",
        "encoder",
        {**_SHAPE, "max_position_embeddings": 131},
        ("encoder.layer",),
        ((*(f"attention.attn.{x}" for x in "qkvo"), *_BERT[4:]),),
        (("attention.attn.o",),),
    ),
    "ModernBERT": Family(
        "ModernBertConfig",
        "ModernBertModel",
        "encoder",
        {**_SHAPE, "local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
        ("layers",),
        (("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),),
        (("attn.Wo",),),
    ),
    "LLaMA": _llama("Llama"),
    "Mistral": _llama("Mistral", sliding_window=WINDOW),
    "Qwen2": _llama("Qwen2"),
    "Qwen3": _llama("Qwen3", head_dim=8),
    "Gemma 2": _llama("Gemma2", **_GEMMA),
    "Gemma 3": _llama("Gemma3", "Gemma3Text", **_GEMMA),
    "Phi-3": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        "causal",
        _GROUPED,
        ("model.layers",),
        (("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),),
        (("self_attn.o_proj",),),
    ),
    "GPT-2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        "causal",
        {"n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 128},
        ("transformer.h",),
        (("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),),
        (("attn.c_proj",),),
    ),
    "GPT-NeoX": Family(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        "causal",
        _SHAPE,
        ("gpt_neox.layers",),
        (("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),),
        (("attention.dense",),),
    ),
    "T5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        "sequence-to-sequence",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": NUM_BLOCKS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("encoder.block", "decoder.block"),
        (
            (*_T5, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            (
                *_T5,
                *(f"layer.1.EncDecAttention.{x}" for x in "qkvo"),
                "layer.2.DenseReluDense.wi",
                "layer.2.DenseReluDense.wo",
            ),
        ),
        (("layer.0.SelfAttention.o",), ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o")),
    ),
    "BART": Family(
        "BartConfig",
        "BartForConditionalGeneration",
        "sequence-to-sequence",
        {
            "d_model": 32,
            "encoder_layers": NUM_BLOCKS,
            "decoder_layers": NUM_BLOCKS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        ("model.encoder.layers", "model.decoder.layers"),
        (
            (*_BART, "fc1", "fc2"),
            (*_BART, *(x.replace("self", "encoder") for x in _BART), "fc1", "fc2"),
        ),
        (("self_attn.out_proj",), ("self_attn.out_proj", "encoder_attn.out_proj")),
    ),
}

_SMALL = {"hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4}


def _other(name: str, **settings: Any) -> Family:
    """A causal model of which only what its tests look at is given."""
    model = f"{name.removesuffix('Text')}ForCausalLM"
    return Family(f"{name}Config", model, "causal", settings, (), (), ())


APART: dict[str, Family] = {
    "BLOOM": _other("Bloom", **_SMALL),
    "MPT": _other("Mpt", d_model=32, n_heads=4, n_layers=NUM_BLOCKS, expansion_ratio=2, max_seq_len=128),
    "Falcon with ALiBi": _other("Falcon", alibi=True, **_SHAPE),
    "GPT-Neo": _other(
        "GPTNeo",
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
        max_position_embeddings=128,
    ),
    "Llama 4": _other(
        "Llama4Text",
        **_GROUPED,
        head_dim=8,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        attention_chunk_size=WINDOW,
        no_rope_layers=[1, 0, 1],
        moe_layers=[],
        intermediate_size_mlp=48,
        num_local_experts=1,
    ),
}
"""Causal models that must read each text in a row of its own."""

WRAPPED: dict[str, Family] = {
    "Gemma 3 with pictures": Family(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        "causal",
        {
            "text_config": {**_IDS, **_GROUPED, **_GEMMA},
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        (),
        (),
        (),
    )
}
"""Text models inside another, whose config holds theirs."""

DEEPER: dict[str, Family] = {
    "T5, deeper decoder": replace(
        FAMILIES["T5"], settings={**FAMILIES["T5"].settings, "num_decoder_layers": NUM_BLOCKS + 2}
    )
}
"""Models with more layers in the decoder than in the encoder."""

REFUSED: dict[str, Family] = {
    "LFM2": _other("Lfm2", **_GROUPED, layer_types=["conv", "full_attention", "conv"]),
    "Falcon-H1": _other(
        "FalconH1", **_GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "Mamba": _other("Mamba", hidden_size=32, num_hidden_layers=NUM_BLOCKS, state_size=4),
}
"""Causal models that keep something else than keys and values."""


def texts() -> Iterator[str]:
    """Packaged texts to train tokenizers on."""
    for task in (bbc_topics(60, 0), question_languages(200, 0)):
        yield from (str(example.prompt) for example in task.examples)


TEMPLATES = {"encoder": f"{BEGIN} $A {END}", "causal": f"{BEGIN} $A", "sequence-to-sequence": f"$A {END}"}
"""Special tokens by kind of backbone; BART begins its texts as encoders do."""


@cache
def tokenizer(template: str) -> Any:
    """A byte-level tokenizer trained on packaged texts, which adds special tokens by a template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts(), trainer)
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(BEGIN, 1), (END, 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, bos_token=BEGIN, eos_token=END, mask_token=MASK
    )


def save(name: str, folder: Path) -> Path:
    """Write a family's tiny model, random weights and all, as a folder that transformers loads."""
    family = {**FAMILIES, **APART, **WRAPPED, **DEEPER, **REFUSED}[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**_IDS, **family.settings)
    model = getattr(transformers, family.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough for every layer to matter
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer(TEMPLATES["encoder" if name == "BART" else family.kind]).save_pretrained(folder)
    return folder


def load(source: Path | str, quantization: str = "none") -> Backbone:
    """The backbone of a folder or an alias, activations in float32 on the CPU."""
    settings = BackboneConfig(dtype="float32", device="cpu", max_tokens=96, quantization=quantization)
    return load_backbone(str(source), settings)
