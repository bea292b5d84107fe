"""One key map for every BLIP-2 checkpoint, its inverse for export, and the sizes that names and shapes tell.

    ours                        Hugging Face                     LAVIS and the VPGTrans authors
    vpg.ln_vision               vision_model.post_layernorm      ln_vision
    vpg.query_tokens            query_tokens                     query_tokens
    vpg.qformer.layernorm       qformer.layernorm                Qformer.bert.embeddings.LayerNorm
    vpg.qformer.encoder         qformer.encoder                  Qformer.bert.encoder  (`attention.self` for `attention.attention`)
    projector                   language_projection              opt_proj, t5_proj, llama_proj
    vision                      vision_model                     visual_encoder, or the bare names of eva_vit_g.pth
    llm                         language_model                   opt_model, t5_model, llama_model

The layouts share no name but `query_tokens`, which means the same in each, so a name alone says where a tensor belongs.  Names follow
LAVIS's `blip2_models` and `eva_vit`, and transformers' `Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..checkpoint import CheckpointError
from ..recipe import QFormerConfig

VIT_G_WIDTH, VIT_G_BLOCKS, VIT_G_HEADS = 1408, 39, 16  # LAVIS's eva_vit; its file has 40 blocks
_BERT_HEAD_WIDTH = 64

PARTS = ("vpg", "projector", "vision", "llm")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs.  EVA-CLIP stores a third of the fused qkv bias each for query and value; the key has none."""

    part: str
    name: str
    slot: Literal["whole", "query", "value"] = "whole"


@dataclass(frozen=True)
class Leftover:
    """A stored tensor that no part of ours takes."""

    reason: str


_NOT_OURS = "not a name of any BLIP-2 layout"
_CLIP_VIT = "ViT that is no EVA-CLIP; load the tower from its own folder"

# (pattern, reason), before any renaming: these sit under prefixes that are otherwise kept.
_LEFTOVERS = (
    (re.compile(r"(^|\.)position_ids$"), "buffer"),
    (re.compile(r"^Qformer\.cls\."), "word head of image-text pre-training"),
    (re.compile(r"^(Qformer\.bert\.|qformer\.)?embeddings\.(word|position|token_type)_embeddings"), "text branch"),
    (re.compile(r"^(Qformer\.bert|qformer)\.encoder\.layer\.\d+\.(intermediate|output)\."), "text branch"),
    (re.compile(r"^Qformer\.bert\.pooler\."), "text branch"),
    (
        re.compile(r"^(vision_proj|text_proj|vision_projection|text_projection|itm_head)\.|^temp$"),
        "contrastive and matching heads",
    ),
    (re.compile(r"^(visual_encoder\.)?(norm|fc_norm|head)\."), "the ViT's own last norm and classifier"),
)

# (prefix stored, part, prefix of ours); the first that fits counts.
_PREFIXES = (
    ("vpg.", "vpg", ""),
    ("projector.", "projector", ""),
    ("vision_model.post_layernorm.", "vpg", "ln_vision."),
    ("vision_model.", "vision", ""),
    ("qformer.", "vpg", "qformer."),
    ("language_projection.", "projector", ""),
    ("language_model.", "llm", ""),
    ("ln_vision.", "vpg", "ln_vision."),
    ("Qformer.bert.embeddings.LayerNorm.", "vpg", "qformer.layernorm."),
    ("Qformer.bert.encoder.", "vpg", "qformer.encoder."),
    ("opt_proj.", "projector", ""),
    ("t5_proj.", "projector", ""),
    ("llama_proj.", "projector", ""),
    ("opt_model.", "llm", ""),
    ("t5_model.", "llm", ""),
    ("llama_model.", "llm", ""),
)

_EVA_STEM = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_EVA_BLOCK = re.compile(r"^blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)$")
_EVA_BLOCK_STEM = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EVA_BIAS = re.compile(r"^blocks\.(\d+)\.attn\.(q|v)_bias$")
_BARE_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def place(name: str) -> Place | Leftover:
    """Where the tensor `name` of a checkpoint of any layout belongs, or why it is not used."""
    for pattern, reason in _LEFTOVERS:
        if pattern.search(name):
            return Leftover(reason)
    if name == "query_tokens":
        return Place("vpg", name)
    for stored, part, ours in _PREFIXES:
        if name.startswith(stored):
            rest = ours + name[len(stored) :]
            if stored == "Qformer.bert.encoder.":
                rest = rest.replace("attention.self.", "attention.attention.")
            return Place(part, rest)
    found = _place_eva(name.removeprefix("visual_encoder."))
    if found is None:
        return Leftover(_CLIP_VIT if name.startswith("visual_encoder.") else _NOT_OURS)
    return found


def _place_eva(name: str) -> Place | None:
    if name in _EVA_STEM:
        return Place("vision", _EVA_STEM[name])
    if block := _EVA_BLOCK.match(name):
        layer, stem, kind = block.groups()
        return Place("vision", f"encoder.layers.{layer}.{_EVA_BLOCK_STEM[stem]}.{kind}")
    if bias := _EVA_BIAS.match(name):
        layer, which = bias.groups()
        return Place("vision", f"encoder.layers.{layer}.self_attn.qkv.bias", "query" if which == "q" else "value")
    return None


def bare_block(name: str) -> int | None:
    """The block number of a name of eva_vit_g.pth, which holds more blocks than BLIP-2 uses; None for any other name."""
    block = _BARE_BLOCK.match(name)
    return int(block[1]) if block else None


def hugging_face_name(part: str, name: str) -> str:
    """The name in transformers' `Blip2ForConditionalGeneration` of tensor `name` of one of our parts.

    Raises ValueError for a part that it does not have.
    """
    if part == "vpg":
        return re.sub(r"^ln_vision\.", "vision_model.post_layernorm.", name)
    prefixes = {"projector": "language_projection.", "vision": "vision_model.", "llm": "language_model."}
    if part not in prefixes:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    return prefixes[part] + name


def to_hugging_face(parts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name in `Blip2ForConditionalGeneration`, tensor) of every tensor of our parts, one at a time.

    parts: part -> name -> tensor, as `read_source` returns them or a module's `state_dict` gives them.
    """
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            yield hugging_face_name(part, name), tensor


# Without these the sizes cannot be told.
QFORMER_ANCHORS = {
    "ln_vision.weight": 1,
    "query_tokens": 3,
    "qformer.encoder.layer.0.intermediate_query.dense.weight": 2,
    "qformer.encoder.layer.0.crossattention.attention.key.weight": 2,
}
VISION_ANCHORS = {
    "embeddings.class_embedding": 3,
    "embeddings.position_embedding": 3,
    "embeddings.patch_embedding.weight": 4,
    "encoder.layers.0.mlp.fc1.weight": 2,
}


def lacking_anchors(shapes: dict[str, tuple[int, ...]], anchors: dict[str, int]) -> list[str]:
    return [name for name, dimensions in anchors.items() if len(shapes.get(name, ())) != dimensions]


def infer_qformer(shapes: dict[str, tuple[int, ...]], where: str) -> QFormerConfig | None:
    """Sizes of LAVIS's Q-Former, which is BERT: heads of width 64, LayerNorm eps 1e-12."""
    if lacking_anchors(shapes, QFORMER_ANCHORS):
        return None
    queries, width = shapes["query_tokens"][1:]
    layers = _layer_numbers(shapes, r"qformer\.encoder\.layer\.(\d+)\.")
    crossing = _layer_numbers(shapes, r"qformer\.encoder\.layer\.(\d+)\.crossattention\.")
    count = layers[-1] + 1
    frequency = crossing[1] if len(crossing) > 1 else count
    if crossing != list(range(0, count, frequency)):
        raise CheckpointError(
            f"{where}: expected cross-attention in every n-th of {count} Q-Former layers, found it in {crossing}; the file is incomplete"
        )
    if width % _BERT_HEAD_WIDTH:
        raise CheckpointError(
            f"{where}: expected a Q-Former of a width that heads of {_BERT_HEAD_WIDTH} divide, as LAVIS's, got {width}; "
            "give it as a Hugging Face folder, whose config.json states the heads"
        )
    return QFormerConfig(
        hidden_size=width,
        num_hidden_layers=count,
        num_attention_heads=width // _BERT_HEAD_WIDTH,
        intermediate_size=shapes["qformer.encoder.layer.0.intermediate_query.dense.weight"][0],
        cross_attention_frequency=frequency,
        num_query_tokens=queries,
    )


def _layer_numbers(shapes: dict[str, tuple[int, ...]], pattern: str) -> list[int]:
    return sorted({int(found[1]) for found in map(re.compile(pattern).match, shapes) if found})


def infer_vision(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Fields of a Blip2VisionConfig for LAVIS's EVA-CLIP ViT."""
    if lacking_anchors(shapes, VISION_ANCHORS):
        return None
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    side = round((shapes["embeddings.position_embedding"][1] - 1) ** 0.5)
    is_vit_g = width == VIT_G_WIDTH
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": VIT_G_BLOCKS if is_vit_g else _layer_numbers(shapes, r"encoder\.layers\.(\d+)\.")[-1] + 1,
        "num_attention_heads": VIT_G_HEADS if is_vit_g else width // 64 if width % 64 == 0 else None,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": "encoder.layers.0.self_attn.qkv.bias" in shapes,
    }
