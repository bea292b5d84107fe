"""Where the parts that will train come from: the paper's five arms are choices of `initialise` and of the stages.

VPGTrans                 vpg: vlm,  projector: converter, stages warm_up + direct
VPGTrans w/o converter   vpg: vlm,  projector: random,    stages warm_up + direct
VPGInherit               vpg: vlm,  projector: random,    stage direct
projector only           vpg: vlm,  projector: converter or random, a stage that trains the projector
TFS                      vpg: vpg,  projector: random,    stage direct
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import CheckpointError, check_fit
from ..models.llm import LanguageModel, load_language_model
from ..models.vision import VisionTower
from ..models.vlm import VisionLanguageModel
from ..models.vpg import VPG, load_vpg, read_parts
from ..recipe import QFormerConfig, TransferRecipe
from .converter import ConverterReport, WordConverter, fit_converter
from .merge import merge


@dataclass
class Origins:
    """Where each part came from, for the freeze table and the model card; and what was measured of the converter."""

    vpg: str
    projector: str
    llm: str
    tower: str
    converter: ConverterReport | None = None
    source_projector: nn.Linear | None = field(default=None, repr=False)
    source_words: torch.Tensor | None = field(default=None, repr=False)


def build_model(
    recipe: TransferRecipe, tower: VisionTower, dtype: torch.dtype = torch.float32
) -> tuple[VisionLanguageModel, Origins]:
    """The vision-language model of a recipe, before its first stage, on the CPU: what trains in float32, the language model in `dtype`.

    Raises ModelError or CheckpointError, before any training, when a part is missing or does not fit.
    """
    llm = load_language_model(recipe.target.llm, dtype)
    vpg, vpg_origin = _build_vpg(recipe, tower.width)
    origins = Origins(vpg_origin, "", llm.path, tower.path)
    projector = _build_projector(recipe, vpg, llm, origins)
    return VisionLanguageModel(vpg, projector, llm), origins


def _build_vpg(recipe: TransferRecipe, image_width: int) -> tuple[VPG, str]:
    if recipe.initialise.vpg == "random":
        assert recipe.qformer is not None  # checked by the recipe
        return VPG(recipe.qformer, image_width), "random"
    folder = recipe.source.vlm if recipe.initialise.vpg == "vlm" else recipe.source.vpg
    assert folder is not None
    vpg = load_vpg(folder, image_width)
    if recipe.qformer is not None and recipe.qformer.dropout != vpg.config.dropout:
        vpg = _with_dropout(vpg, recipe.qformer.dropout)
    return vpg, str(folder)


def _with_dropout(vpg: VPG, dropout: float) -> VPG:
    """The same weights with another dropout, which is a setting of the run rather than of the weights."""
    fresh = VPG(QFormerConfig(**{**vpg.config.model_dump(), "dropout": dropout}), vpg.image_width)
    fresh.load_state_dict(vpg.state_dict())
    return fresh


def _build_projector(recipe: TransferRecipe, vpg: VPG, llm: LanguageModel, origins: Origins) -> nn.Linear:
    width = vpg.config.hidden_size
    choice = recipe.initialise.projector
    if choice == "random":
        origins.projector = "random"
        return nn.Linear(width, llm.hidden_width)
    assert recipe.source.vlm is not None
    projector = load_projector(recipe.source.vlm, width)
    if choice == "vlm":
        if projector.out_features != llm.hidden_width:
            raise CheckpointError(
                f"{recipe.source.vlm}: expected a projector to width {llm.hidden_width} of {llm.path!r}, found one to {projector.out_features}; "
                "set initialise.projector to converter or random"
            )
        origins.projector = f"{recipe.source.vlm}"
        return projector
    converter, origins.converter, source_llm = fitted_converter(recipe, llm)
    origins.source_projector, origins.source_words = projector, source_llm.word_embeddings()
    origins.projector = f"{recipe.source.vlm}, merged with the {origins.converter.method} word converter"
    return merge(projector, converter)


def load_projector(folder: Path, width: int) -> nn.Linear:
    """The projector of a finished run; CheckpointError when it has none, or one from another width."""
    parts = read_parts(folder)[1]
    if "projector" not in parts:
        raise CheckpointError(
            f"{folder}: expected a vision-language model with a projector, found only {sorted(parts)}; name a finished run"
        )
    stored = parts["projector"]
    projector = nn.Linear(stored["weight"].shape[1], stored["weight"].shape[0])
    check_fit(stored, dict(projector.state_dict()), f"{folder}: projector")
    if projector.in_features != width:
        raise CheckpointError(
            f"{folder}: expected a projector from width {width}, found one from {projector.in_features}"
        )
    projector.load_state_dict(stored)
    return projector


def fitted_converter(
    recipe: TransferRecipe, llm: LanguageModel
) -> tuple[WordConverter | None, ConverterReport, LanguageModel]:
    """The converter of a recipe from its source's language model, which is returned too."""
    assert recipe.source.vlm is not None
    source_llm = load_language_model(str(read_parts(recipe.source.vlm)[0]["llm"]))
    return *fit_converter(source_llm, llm, recipe.converter, recipe.seed), source_llm
