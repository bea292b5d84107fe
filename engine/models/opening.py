"""Open a finished vision-language model for use: a run, an export, or any Hugging Face BLIP-2 folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from ..checkpoint import CheckpointError
from ..data.images import load_pixels, normalise
from ..recipe import Vision
from .llm import LOAD_ERRORS, LanguageModel, ModelError, attention_of, check_complete, load_language_model, wrap
from .sources import LoadReport, SourceInfo, describe_source, read_source
from .tower import VisionTower
from .vision import load_tower
from .vlm import VisionLanguageModel
from .vpg import VPG, read_parts


@dataclass
class Opened:
    """A model in eval mode on its device, its tower, and where both came from."""

    path: str
    name: str
    model: VisionLanguageModel
    tower: VisionTower
    weights: Path  # the folder whose weight files are the model, for its hash
    run: dict[str, Any] | None  # vl_config.json of a run

    @property
    def device(self) -> torch.device:
        return self.model.projector.weight.device

    @torch.no_grad()
    def soft_prompts(self, images: list[Path]) -> Tensor:
        """Image files -> (images, queries, LLM width), with the eval transform."""
        side, norm = self.tower.image_size, self.tower.norm
        pixels = normalise(torch.stack([load_pixels(image, side) for image in images]), norm.mean, norm.std)
        first = next(self.tower.parameters())
        features = self.tower.features(pixels.to(first.device, first.dtype))
        return self.model.soft_prompts(features.to(self.model.projector.weight.dtype))


def open_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
) -> Opened:
    """The model at `path`, whole, in eval mode; `dtype` is that of the language model and the tower, `auto` what is stored.

    A Hugging Face folder keeps its own LayerNorm eps and its own end tokens, so that it gives what transformers gives.
    Raises CheckpointError or ModelError when it is no vision-language model, or a part of it is missing.
    """
    info = describe_source(path)
    if info.format == "lavis":
        raise CheckpointError(
            f"{path}: expected a run, an export or a Hugging Face BLIP-2, got a LAVIS checkpoint, which has no language model; "
            "train from it as source.vlm, or export a run"
        )
    opened = _open_run(Path(path), info, dtype) if info.format == "run" else _open_hugging_face(str(path), info, dtype)
    opened.model.llm.to(device)
    opened.tower.to(device, torch.float32 if dtype == "auto" else dtype)
    opened.model.vpg.to(device)
    opened.model.projector.to(device)
    opened.model.requires_grad_(False).eval()
    return opened


def _open_run(path: Path, info: SourceInfo, dtype: torch.dtype | Literal["auto"]) -> Opened:
    config, _ = read_parts(path)
    folder = path if (path / "vl_config.json").is_file() else path / "model"
    if info.llm is None or info.projector_shape is None:
        raise CheckpointError(
            f"{path}: expected a finished vision-language run, got a VPG without a language model; name a run"
        )
    tower = load_tower(Vision.model_validate(config["vision"]))
    llm = load_language_model(info.llm, dtype)
    name = str(config.get("recipe") or path.name)
    return Opened(str(path), name, _assemble(path, tower.width, llm), tower, folder, config)


def _assemble(path: Path | str, width: int, llm: LanguageModel) -> VisionLanguageModel:
    vpg, _ = read_vpg(path, width)
    projector, _ = read_projector(path, vpg.config.hidden_size)
    if projector.out_features != llm.hidden_width:
        raise CheckpointError(
            f"{path}: expected a projector to width {llm.hidden_width} of {llm.path!r}, found one to {projector.out_features}; "
            "the language model is not the one that it was trained with"
        )
    return VisionLanguageModel(vpg, projector, llm)


def read_vpg(place: Path | str, image_width: int, files: Sequence[Path] = ()) -> tuple[VPG, LoadReport]:
    """The VPG of any source, in float32, and what was read.

    Raises CheckpointError when it was trained on features of another width, or does not fit; every tensor is named.
    """
    info = describe_source(place, files)
    if info.image_width is not None and info.image_width != image_width:
        raise CheckpointError(
            f"{place}: expected a VPG for image tokens of width {image_width}, got one for {info.image_width}; use its own tower"
        )
    parts, report = read_source(place, ("vpg",), files)
    assert info.qformer is not None  # read_source has found it complete
    vpg = VPG(info.qformer, image_width)
    vpg.load_state_dict(parts["vpg"])
    return vpg, report


def read_projector(place: Path | str, width: int, files: Sequence[Path] = ()) -> tuple[nn.Linear, LoadReport]:
    """The projector of any source, in float32, and what was read; CheckpointError when it has none, or one from another width."""
    parts, report = read_source(place, ("projector",), files)
    stored = parts["projector"]
    projector = nn.Linear(stored["weight"].shape[1], stored["weight"].shape[0])
    if projector.in_features != width:
        raise CheckpointError(
            f"{place}: expected a projector from width {width}, found one from {projector.in_features}"
        )
    projector.load_state_dict(stored)
    return projector, report


def _open_hugging_face(path: str, info: SourceInfo, dtype: torch.dtype | Literal["auto"]) -> Opened:
    tower = load_tower(Vision.model_validate({"kind": "eva_vit", "path": path}))
    if info.llm_inside:
        try:
            disable_progress_bar()
            whole, report = Blip2ForConditionalGeneration.from_pretrained(path, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except LOAD_ERRORS as error:
            raise ModelError(f"{path}: expected a BLIP-2 folder or hub id that transformers loads: {error}") from error
        check_complete(report, path)
        ends = whole.language_model.generation_config.eos_token_id  # what transformers' BLIP-2 generates with
        llm = wrap(whole.language_model, tokenizer, path)
        llm.model.set_attn_implementation(attention_of(llm.model.config))
        if ends is not None:
            llm.ends = sorted(ends) if isinstance(ends, list) else [ends]
    elif info.llm:
        llm = load_language_model(info.llm, dtype)
    else:
        raise CheckpointError(
            f"{path}: expected a language model inside, or the name of one in text_config, found neither"
        )
    model = _assemble(path, tower.width, llm)
    model.vpg.ln_vision.eps = tower.layer_norm_eps or model.vpg.ln_vision.eps
    return Opened(path, Path(path).name, model, tower, info.files[0].parent, None)
