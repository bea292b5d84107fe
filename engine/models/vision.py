"""Frozen vision towers behind one contract: images (B, 3, side, side) -> features (B, tokens, width).

eva_vit       BLIP-2's ViT (EVA-CLIP ViT-g/14 and smaller), no final norm: `ln_vision` follows
clip_vit      CLIP's ViT, its first blocks, no final norm
hf            any transformers vision model: its last hidden state as a sequence, a grid flattened
mobilenet_v2  folded MobileNetV2 weights, for small machines
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)

from ..checkpoint import check_fit, load_tensors
from ..recipe import WEIGHT_SUFFIXES, Vision
from . import hf_vision
from .llm import ModelError
from .mobilenet import MobileNetV2
from .sources import describe_source, read_source
from .tower import CLIP_NORM, PixelNorm, VisionTower

# EVA-CLIP ViT-g/14 as BLIP-2 uses it: 39 of its 40 blocks (LAVIS).
_EVA_VIT_G = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
# CLIP ViT-L/14 (arXiv 2103.00020, table 20), every block.
_CLIP_VIT_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


class _EvaViT(nn.Module):
    """transformers' BLIP-2 ViT (EVA-CLIP's layout) without its last norm, which is BLIP-2's `ln_vision`."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.model = Blip2VisionModel(config)
        self.model.post_layernorm = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state


def eva_vit(config: Blip2VisionConfig) -> nn.Module:
    """A randomly initialised ViT of the given sizes; images (B, 3, side, side) -> (B, 1 + patches, width)."""
    config._attn_implementation = "sdpa"
    return _EvaViT(config)


def eva_vit_g_config() -> Blip2VisionConfig:
    """The sizes of EVA-CLIP ViT-g/14 in BLIP-2: 985,949,440 parameters, the zero key biases of transformers' layout (54,912) counted."""
    return Blip2VisionConfig(**_EVA_VIT_G)


def eva_tower_from_tensors(
    config: Blip2VisionConfig, tensors: Mapping[str, Tensor], path: str, norm: PixelNorm = CLIP_NORM
) -> VisionTower:
    """A tower from tensors under transformers' names, with or without `vision_model.` before them; float32, not copied where they are.

    `post_layernorm` belongs to the VPG and is ignored, and so are blocks past those of `config`, which LAVIS does not use either.
    Raises CheckpointError naming every other tensor that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        module = eva_vit(config)
    kept = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("vision_model.")
        block = re.match(r"encoder\.layers\.(\d+)\.", name)
        if not name.startswith("post_layernorm.") and not (block and int(block[1]) >= config.num_hidden_layers):
            kept[name] = tensor
    check_fit(kept, dict(module.model.state_dict()), path)
    module.model.load_state_dict({k: v.float() for k, v in kept.items()}, assign=True)
    return _eva_tower(module, config, path, norm)


def load_tower(settings: Vision) -> VisionTower:
    """Load the frozen tower that a recipe names.

    Raises ModelError or CheckpointError naming what does not fit.
    """
    if settings.kind == "mobilenet_v2":
        module = MobileNetV2()
        stored = {k: v for k, v in load_tensors(_folded_weights(settings)).items() if not k.startswith("head.")}
        check_fit(stored, dict(module.state_dict()), str(settings.path))
        module.load_state_dict(stored)
        module.to(memory_format=torch.channels_last)  # depthwise convolutions: 31 against 72 CPU-ms an image
        return _mobilenet_tower(module, settings)
    if settings.kind == "eva_vit":
        config = _eva_config(settings, meta=False)
        tensors = _eva_tensors(settings.path)
        norm = _norm(settings) or (None if _is_file(settings.path) else _stored_norm(settings.path)) or CLIP_NORM
        return eva_tower_from_tensors(config, tensors, str(settings.path), norm)
    config = _hf_config(settings, meta=False)
    if settings.kind == "clip_vit":
        config = hf_vision.clip_config(config, settings.blocks, str(settings.path))
        return _hf_tower(hf_vision.load_clip(config, settings.path), config, settings, meta=False)
    return _hf_tower(hf_vision.load_hf(config, settings.path), config, settings, meta=False)


def build_tower_on_meta(settings: Vision) -> VisionTower:
    """The same tower on torch's meta device: every shape, no weights.  For dry runs.

    Where `path` is absent, the sizes are those of `vision.architecture` or `vision.config`, and, for the lack of a processor, CLIP's pixel
    norm stands in for the true one.  Raises ModelError when nothing tells the sizes.
    """
    with torch.device("meta"):
        if settings.kind == "mobilenet_v2":
            return _mobilenet_tower(MobileNetV2(), settings)
        if settings.kind == "eva_vit":
            config = _eva_config(settings, meta=True)
            return _eva_tower(eva_vit(config), config, str(settings.path), _norm(settings) or CLIP_NORM)
        config = _hf_config(settings, meta=True)
        if settings.kind == "clip_vit":
            config = hf_vision.clip_config(config, settings.blocks, str(settings.path))
            return _hf_tower(hf_vision.ClipViT(CLIPVisionModel(config)), config, settings, meta=True)
        return _hf_tower(hf_vision.hf_from_config(config, str(settings.path)), config, settings, meta=True)


def _folded_weights(settings: Vision) -> Path:
    path = Path(settings.path)
    return path if path.is_file() else path / "model.safetensors"


def _mobilenet_tower(module: nn.Module, settings: Vision) -> VisionTower:
    image_size = settings.image_size or 224
    side = -(-image_size // 32)
    norm = _norm(settings) or PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return VisionTower(module, 1280, side * side, image_size, norm, str(settings.path))


def _eva_tower(module: nn.Module, config: Blip2VisionConfig, path: str, norm: PixelNorm) -> VisionTower:
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    tower = VisionTower(module, config.hidden_size, tokens, config.image_size, norm, path)
    tower.layer_norm_eps = config.layer_norm_eps
    return tower


def _eva_config(settings: Vision, meta: bool) -> Blip2VisionConfig:
    """From the folder's config.json or a file's shapes; on the meta device, where neither is there, from the recipe."""
    path, given = settings.path, _given_sizes(settings)
    if isinstance(path, Path) and path.is_file():
        config = _config_of_file(path, given or {})
    elif meta and given and not _is_folder(path):
        config = Blip2VisionConfig(**given)
    elif meta and isinstance(path, Path) and path.suffix in WEIGHT_SUFFIXES and not path.exists():
        config = eva_vit_g_config()  # the one tower that BLIP-2 has in a file of its own
    else:
        config = _stored_eva_config(path)
    _check_given(given, config, path)
    _check_image_size(settings, config.image_size)
    return config


def _config_of_file(path: Path, given: dict[str, Any]) -> Blip2VisionConfig:
    """The sizes that the shapes in a .pth file tell, and what they do not tell from the recipe."""
    fields = describe_source(path).vision
    if fields is None:
        raise ModelError(
            f"vision.path: expected a file with EVA-CLIP's ViT, found none in {path}; LAVIS's blip2_pretrained files hold no ViT, "
            "give eva_vit_g.pth or a BLIP-2 folder"
        )
    fields |= {k: v for k, v in given.items() if k in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
    if fields["num_attention_heads"] is None:
        raise ModelError(
            f"vision.config: expected num_attention_heads, which the shapes in {path} do not tell, got nothing; "
            "give the sizes of the tower in vision.config"
        )
    return Blip2VisionConfig(**fields)


def _stored_eva_config(path: Path | str) -> Blip2VisionConfig:
    """The vision part of a BLIP-2 config.json, or a config.json of the tower alone."""
    try:
        with hf_vision.quiet():
            values: dict[str, Any] = PreTrainedConfig.get_config_dict(str(path))[0]
        if not values:
            raise ValueError("it has no config.json")
        if values.get("model_type", "blip_2_vision_model") not in ("blip-2", "blip_2_vision_model"):
            raise ValueError(f"its config.json is of a {values['model_type']!r}")
        return Blip2VisionConfig.from_dict(values.get("vision_config", values))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            "vision.path: expected a BLIP-2 folder or hub id, a folder with a ViT's config.json and model.safetensors, or a .pth file, "
            f"got {str(path)!r}: {error}"
        ) from error


def _eva_tensors(path: Path | str) -> Mapping[str, Tensor]:
    """Of the tower alone (`embeddings.*`, as `pretrain vision` writes it), or the vision part of a larger source."""
    if _is_folder(path) and (Path(path) / "model.safetensors").is_file():
        stored = load_tensors(Path(path) / "model.safetensors")
        if any(name.startswith("embeddings.") for name in stored):
            return stored
    return read_source(path, parts=("vision",))[0]["vision"]


def _hf_config(settings: Vision, meta: bool) -> PreTrainedConfig:
    """From the folder or hub id; on the meta device from the recipe's sizes where it gives them and there is no folder."""
    given = _given_sizes(settings)
    if meta and given and not _is_folder(settings.path):
        if settings.kind == "clip_vit":
            return CLIPVisionConfig(**given)
        try:
            return hf_vision.vision_part(AutoConfig.for_model(**given))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"vision.config: expected model_type and sizes of a transformers config: {error}"
            ) from error
    config = hf_vision.read_config(settings.path)
    _check_given(given, config, settings.path)
    return config


def _hf_tower(module: nn.Module, config: PreTrainedConfig, settings: Vision, meta: bool) -> VisionTower:
    path, is_clip = str(settings.path), settings.kind == "clip_vit"
    read = not meta or _is_folder(settings.path)
    processor = hf_vision.read_processor(settings.path) if read else {}
    norm = _norm(settings) or hf_vision.processor_norm(processor, path) or (CLIP_NORM if is_clip or not read else None)
    if norm is None:
        raise ModelError(
            f"vision.mean, vision.std: expected the pixel norm of {path!r}, because it has no preprocessor_config.json that tells it; "
            "add that file or set both"
        )
    stored = hf_vision.square_side(getattr(config, "image_size", None))
    if is_clip:
        _check_image_size(settings, stored)
        image_size = stored
    else:
        image_size = settings.image_size or hf_vision.processor_side(processor) or stored
    if image_size is None:
        raise ModelError(
            f"vision.image_size: expected pixels a side, because neither config nor processor of {path!r} says"
        )
    tokens, width = hf_vision.probe(module, image_size, path)
    return VisionTower(module, width, tokens, image_size, norm, path)


def _is_file(path: Path | str) -> bool:
    return isinstance(path, Path) and path.is_file()


def _stored_norm(path: Path | str) -> PixelNorm | None:
    """That of the folder's image processor, where it has one."""
    return hf_vision.processor_norm(hf_vision.read_processor(path), str(path))


def _given_sizes(settings: Vision) -> dict[str, Any] | None:
    """The sizes that the recipe itself tells, by name or one by one."""
    if settings.architecture is not None:
        return _EVA_VIT_G if settings.architecture == "eva_vit_g" else _CLIP_VIT_L
    return settings.config


def _check_given(given: dict[str, Any] | None, stored: PreTrainedConfig, path: Path | str) -> None:
    """A dry run from the recipe's sizes must be a dry run of what is then loaded."""
    for name, value in (given or {}).items():
        found = getattr(stored, name, None)
        if (isinstance(value, int) or name == "model_type") and found != value:
            raise ModelError(
                f"vision.architecture, vision.config: expected {name} {found!r} as in {str(path)!r}, got {value!r}; "
                "correct it or choose another path"
            )


def _check_image_size(settings: Vision, stored: int) -> None:
    if settings.image_size not in (None, stored):
        raise ModelError(
            f"vision.image_size: expected {stored}, the size the tower was trained with, got {settings.image_size}"
        )


def _norm(settings: Vision) -> PixelNorm | None:
    return PixelNorm(settings.mean, settings.std) if settings.mean and settings.std else None


def _is_folder(path: Path | str) -> bool:
    return isinstance(path, Path) and path.is_dir()
