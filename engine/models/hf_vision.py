"""Vision models of transformers as modules images (B, 3, side, side) -> (B, tokens, width): CLIP cut to its first blocks, and any other.

Weights come through `from_pretrained`, so shards, hub ids and older key layouts are transformers' business; only the vision part of a
two-tower model (CLIPModel, SiglipModel) is built and read.  Remote code never runs.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from .llm import ModelError
from .tower import PixelNorm

_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    pickle.PickleError,
)


class ClipViT(nn.Module):
    """transformers' CLIP ViT: embeddings, `pre_layrnorm` and its blocks; no final norm, because `ln_vision` follows."""

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.model = model
        getattr(model, "vision_model", model).post_layernorm = nn.Identity()  # before transformers 5 one level deeper

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, 1 + patches, width), CLS first."""
        return self.model(pixel_values=images).last_hidden_state


class SequenceOrGrid(nn.Module):
    """The last hidden state of any transformers vision model, after its own final norm; the pooler, which nobody reads, is taken off.

    A grid (B, width, h, w) becomes (B, h*w, width).  CLS is kept; register tokens, which hold no part of the image, are dropped.
    Raises ModelError when the model yields neither a sequence nor a grid.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        self.registers = int(getattr(model.config, "num_register_tokens", 0) or 0)

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images)
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise ModelError(f"expected a last_hidden_state, got {type(output).__name__} without one")
        if hidden.ndim == 4 and hidden.shape[2] == hidden.shape[3]:
            hidden = hidden.flatten(2).transpose(1, 2)
        if hidden.ndim != 3 or hidden.shape[0] != images.shape[0]:
            raise ModelError(
                f"expected (B, tokens, width) or a square grid (B, width, h, w) for {images.shape[0]} images, "
                f"got {tuple(hidden.shape)}"
            )
        if self.registers:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + self.registers :]], 1)
        return hidden


def read_config(path: Path | str) -> PreTrainedConfig:
    """The config of the vision model in a folder or hub id; of a two-tower model, its vision part.

    Raises ModelError when there is none.
    """
    if isinstance(path, Path) and not path.is_dir():
        raise ModelError(f"vision.path: expected a folder with config.json and weights, or a hub id, got {str(path)!r}")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"vision.path: expected a vision model's folder or hub id (a folder is written ./{path} or in full), got {str(path)!r}: {error}"
        ) from error
    return vision_part(config)


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config.vision_config` where there is one, else `config`."""
    part = getattr(config, "vision_config", config)
    if hasattr(part, "vision_use_head"):
        part.vision_use_head = False  # SigLIP's pooling head: 15 M parameters that no feature passes through
    return part


def clip_config(config: PreTrainedConfig, blocks: int | None, path: str) -> CLIPVisionConfig:
    """`config` with its first `blocks` blocks; by default all but the last, as BLIP-2 does (arXiv 2301.12597, section 3.4).

    Raises ModelError for another model type or a number of blocks that it does not have.
    """
    if not isinstance(config, CLIPVisionConfig):
        raise ModelError(
            f"vision.path: expected a CLIP vision model for kind clip_vit, got {config.model_type!r} at {path!r}; use kind hf"
        )
    stored = config.num_hidden_layers
    blocks = max(1, stored - 1) if blocks is None else blocks
    if blocks > stored:
        raise ModelError(f"vision.blocks: expected at most {stored}, the blocks of {path!r}, got {blocks}")
    return CLIPVisionConfig.from_dict({**config.to_dict(), "num_hidden_layers": blocks})


def load_clip(config: CLIPVisionConfig, path: Path | str) -> nn.Module:
    """The first `config.num_hidden_layers` blocks of a stored CLIP, float32.  Raises ModelError for missing tensors."""
    return ClipViT(_pretrained(CLIPVisionModel, config, path, unused="post_layernorm"))


def load_hf(config: PreTrainedConfig, path: Path | str) -> nn.Module:
    """Any vision model that AutoModel knows, float32.  Raises ModelError when it takes no pixels or tensors are missing."""
    check_takes_pixels(config, str(path))
    return SequenceOrGrid(_pretrained(AutoModel, config, path, unused="pooler"))


def hf_from_config(config: PreTrainedConfig, path: str) -> nn.Module:
    """As `load_hf` with random weights, on the device that is in force."""
    check_takes_pixels(config, path)
    return SequenceOrGrid(AutoModel.from_config(config))


def check_takes_pixels(config: PreTrainedConfig, path: str) -> None:
    """Raise ModelError, before any weight is read, for a model that AutoModel does not know or that takes no pixels."""
    if config.model_type == "blip_2_vision_model":
        raise ModelError(f"vision.kind: expected eva_vit for the BLIP-2 tower of {path!r}, got hf")
    model = MODEL_MAPPING.get(type(config), None)
    takes = getattr(model, "main_input_name", None)
    if takes != "pixel_values":
        what = "AutoModel does not know it" if model is None else f"its input is {takes!r}"
        raise ModelError(
            f"vision.path: expected a model whose input is 'pixel_values', got {config.model_type!r} at {path!r}: {what}"
        )


@torch.no_grad()
def probe(module: nn.Module, image_size: int, path: str) -> tuple[int, int]:
    """(tokens, width) of a tower, found by one forward of two black images on the device of its weights.

    Raises ModelError with the reason when that forward fails or gives features of another shape.
    """
    device = next(module.parameters()).device
    module.eval()
    try:
        features = module(torch.zeros(2, 3, image_size, image_size, device=device))
    except Exception as error:  # a stranger's forward may raise anything
        raise ModelError(
            f"vision.path: {path!r} gives no features for images of {image_size} x {image_size} pixels: {error}; "
            "set vision.image_size, or choose a model that yields a sequence or a grid"
        ) from error
    return features.shape[1], features.shape[2]


def read_processor(path: Path | str) -> dict[str, Any]:
    """preprocessor_config.json (or its part of processor_config.json) of a folder or hub id; empty where there is none."""
    try:
        with quiet():
            return dict(ImageProcessingMixin.get_image_processor_dict(str(path))[0])
    except OSError:
        return {}


def processor_norm(processor: dict[str, Any], path: str) -> PixelNorm | None:
    """The processor's mean and deviation for pixels scaled to 0..1; None when it names none.

    Raises ModelError when it scales pixels otherwise.
    """
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-3:
        raise ModelError(
            f"vision.path: expected a processor with rescale_factor 1/255, got {scale} at {path!r}; set vision.mean and vision.std"
        )
    if not processor.get("do_normalize", True):
        return PixelNorm((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return PixelNorm(tuple(mean), tuple(std)) if mean and std else None


def processor_side(processor: dict[str, Any]) -> int | None:
    """Pixels a side of the square that the processor hands over, from crop_size or size; None when it does not say."""
    cropped = "crop_size" in processor and processor.get("do_center_crop", True)
    return square_side(processor.get("crop_size" if cropped else "size"))


def square_side(size: Any) -> int | None:
    """224, [224, 224], {"height": 224, "width": 224} and {"shortest_edge": 224} -> 224; None for anything else."""
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")] if "height" in size else size.get("shortest_edge")
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if isinstance(size, int) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of unused tensors and its progress bars: what is missing is checked and raised here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _pretrained(model: Any, config: PreTrainedConfig, path: Path | str, unused: str) -> nn.Module:
    """`from_pretrained` in float32; tensors missing from the file are an error, unless `unused` is a part of their name."""
    try:
        with quiet():
            loaded, info = model.from_pretrained(
                str(path), config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"vision.path: expected the weights of a {config.model_type!r}, got {str(path)!r}: {error}"
        ) from error
    missing = sorted(k for k in info["missing_keys"] if unused not in k.split("."))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(
            f"vision.path: {str(path)!r} lacks tensors of its {config.model_type!r}: {shown}; "
            "copy the weights again or choose another model"
        )
    return loaded
