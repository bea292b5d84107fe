"""A transfer that trains in seconds, for tests and for benches that need many runs: random parts in their real formats, and a recipe for them.

Everything is real but small: scenes as JPEGs with COCO captions and questions, a ViT, two LLaMAs, a VPG, a source model; nothing is pre-trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Blip2VisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .data.scenes import BACKGROUNDS, COLOURS, LANDMARKS, SHAPES, SIZES, write_world
from .models.vision import eva_vit
from .models.vpg import VPG, save_parts
from .pretrain.tokenizer import train_word_level
from .recipe import QFormerConfig

Model = TypeVar("Model", bound=PreTrainedModel)
TOWER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    "hidden_act": "gelu", "initializer_range": 0.2,
}  # fmt: skip


def write_tiny_world(root: Path, train: int = 24, val: int = 6) -> Path:
    """Write `world/`, `tower/`, `lm_source/`, `lm_target/`, `vpg/` and `source/` into a folder; returns it.  train, val: images."""
    write_world(root / "world", train=train, source=8, val=val, text=8, pixels=32)
    captions = [a["caption"] for a in json.loads((root / "world" / "captions_text.json").read_text())["annotations"]]
    tokenizer = train_word_level(
        [*captions, "question: answer: what is beside the thing?", *COLOURS, *SHAPES, *LANDMARKS, *BACKGROUNDS, *SIZES]
    )
    for name, width, seed in (("lm_source", 24, 1), ("lm_target", 32, 2)):
        tiny_llama(tokenizer, width, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(3)
    write_tower(root / "tower", TOWER)
    config = QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_query_tokens=4, dropout=0.1, initializer_range=0.2,
    )  # fmt: skip
    vision = {"kind": "eva_vit", "path": str(root / "tower"), "image_size": 32}
    common = {"recipe": "tiny", "image_width": 16, "qformer": config.model_dump(), "pairs": 0, "vision": vision}
    save_parts(root / "vpg" / "model", {"vpg": VPG(config, 16)}, {**common, "llm": None})
    parts = {"vpg": VPG(config, 16), "projector": nn.Linear(16, 24)}
    save_parts(root / "source" / "model", parts, {**common, "llm": str(root / "lm_source")})
    return root


def write_tower(folder: Path, sizes: dict[str, Any]) -> Path:
    """A random ViT in transformers' format; sizes: of a Blip2VisionConfig."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(eva_vit(Blip2VisionConfig(**sizes)).model.state_dict(), folder / "model.safetensors")
    return folder


def tiny_llama(tokenizer: PreTrainedTokenizerBase, width: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """A random LLaMA with grouped keys and values in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return spread(LlamaForCausalLM(config))


def spread(model: Model) -> Model:
    """Random weights of a size at which attention is far from uniform, so that a wrong mask shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def tiny_recipe(root: Path, folder: Path) -> dict[str, Any]:
    """The values of a two-stage transfer in the world at `root`, with dropout, augmentation, carried captions and frequent checkpoints; output
    in `folder`."""
    world = root / "world"
    return {
        "name": "tiny", "seed": 3, "device": "cpu", "threads": 1,
        "source": {"vlm": str(root / "source"), "vpg": str(root / "vpg")},
        "target": {"llm": str(root / "lm_target")},
        "vision": {"kind": "eva_vit", "path": str(root / "tower"), "image_size": 32},
        "data": {
            "train": [{"name": "scenes", "captions": str(world / "captions_train.json"), "images": str(world / "images")}],
            "val": {"captions": str(world / "captions_val.json"), "images": str(world / "images")},
            "row_tokens": 96, "rows_per_micro_batch": 2, "transform": "train", "captions_per_image": 4,
        },
        "stages": [
            {"name": "warm_up", "trains": "projector", "learning_rate": 1e-3, "pairs": 66, "batch_pairs": 11, "eval_every_pairs": 33},
            {"name": "direct", "trains": "vpg_and_projector", "learning_rate": 1e-3, "pairs": 154, "batch_pairs": 11, "schedule": "cosine",
             "warmup_pairs": 22, "eval_every_pairs": 44},
        ],
        "evaluation": {
            "generate_images": 4, "generate": {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 0}, "attributes": True, "samples": 2,
            "questions": str(world / "questions_val.json"), "answers": str(world / "answers_val.json"), "question_prompt": "question: {} answer:",
        },
        "output": {"folder": str(folder), "checkpoint_every_pairs": 22, "log_every_updates": 2, "tensorboard": False},
    }  # fmt: skip
