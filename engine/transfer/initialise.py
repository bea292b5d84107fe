"""Where the parts that will train come from: the paper's five arms are choices of `initialise` and of the stages.

VPGTrans                 vpg: vlm,  projector: converter, stages warm_up + direct
VPGTrans w/o converter   vpg: vlm,  projector: random,    stages warm_up + direct
VPGInherit               vpg: vlm,  projector: random,    stage direct
projector only           vpg: vlm,  projector: converter or random, a stage that trains the projector
TFS                      vpg: vpg,  projector: random,    stage direct
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoint import CheckpointError
from ..models.llm import LanguageModel, load_language_model
from ..models.opening import read_projector, read_vpg
from ..models.sources import LoadReport, describe_source
from ..models.tower import VisionTower
from ..models.vlm import VisionLanguageModel
from ..models.vpg import VPG
from ..models.words import HasWords, load_words
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
    loaded: list[LoadReport] = field(default_factory=list, repr=False)
    converter: ConverterReport | None = None
    source_projector: nn.Linear | None = field(default=None, repr=False)
    source_words: torch.Tensor | None = field(default=None, repr=False)


def build_model(
    recipe: TransferRecipe,
    tower: VisionTower,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resumes: bool = False,
) -> tuple[VisionLanguageModel, Origins]:
    """The vision-language model of a recipe, before its first stage, on the CPU: what trains in float32, the language model in `dtype`.

    device: where the word converter is fitted.  resumes: a checkpoint will bring the projector, so no converter is fitted.
    Raises ModelError or CheckpointError, before any training, when a part is missing or does not fit.
    """
    llm = load_language_model(recipe.target.llm, dtype)
    origins = Origins("", "", llm.path, tower.path)
    vpg = build_vpg(recipe, tower.width, origins)
    projector = _build_projector(recipe, vpg, llm, origins, device, resumes)
    return VisionLanguageModel(vpg, projector, llm), origins


def build_vpg(recipe: TransferRecipe, image_width: int, origins: Origins) -> VPG:
    """The VPG of a recipe before its first stage, on the CPU in float32; raises as `build_model`."""
    if recipe.initialise.vpg == "random":
        assert recipe.qformer is not None  # checked by the recipe
        origins.vpg = "random"
        return VPG(recipe.qformer, image_width)
    place = recipe.source.vlm if recipe.initialise.vpg == "vlm" else recipe.source.vpg
    files = recipe.source.files if recipe.initialise.vpg == "vlm" else []
    assert place is not None
    vpg, report = read_vpg(place, image_width, files)
    origins.vpg = str(place)
    origins.loaded.append(report)
    if recipe.qformer is not None and recipe.qformer.dropout != vpg.config.dropout:
        vpg = _with_dropout(vpg, recipe.qformer.dropout)
    return vpg


def _with_dropout(vpg: VPG, dropout: float) -> VPG:
    """The same weights with another dropout, which is a setting of the run rather than of the weights."""
    fresh = VPG(QFormerConfig(**{**vpg.config.model_dump(), "dropout": dropout}), vpg.image_width)
    fresh.load_state_dict(vpg.state_dict())
    return fresh


def _build_projector(
    recipe: TransferRecipe, vpg: VPG, llm: LanguageModel, origins: Origins, device: torch.device | str, resumes: bool
) -> nn.Linear:
    width = vpg.config.hidden_size
    choice = recipe.initialise.projector
    if choice == "random" or resumes:
        origins.projector = "the checkpoint" if resumes else "random"
        return nn.Linear(width, llm.hidden_width)
    assert recipe.source.vlm is not None
    projector, report = read_projector(recipe.source.vlm, width, recipe.source.files)
    origins.loaded.append(report)
    if choice == "vlm":
        if projector.out_features != llm.hidden_width:
            raise CheckpointError(
                f"{recipe.source.vlm}: expected a projector to width {llm.hidden_width} of {llm.path!r}, found one to {projector.out_features}; "
                "set initialise.projector to converter or random"
            )
        origins.projector = f"{recipe.source.vlm}"
        return projector
    converter, origins.converter, words = fitted_converter(recipe, projector.out_features, device)
    origins.source_projector, origins.source_words = projector, words.word_embeddings()
    origins.projector = f"{recipe.source.vlm}, merged with the {origins.converter.method} word converter"
    return merge(projector, converter)


def fitted_converter(
    recipe: TransferRecipe, source_width: int, device: torch.device | str = "cpu"
) -> tuple[WordConverter | None, ConverterReport, HasWords]:
    """The converter of a recipe, from the words of its source's language model (returned too) to those of the target, as they are stored.

    source_width: of the projector that it will be merged into.  Raises ModelError or CheckpointError when the source's language model is not
    known, or has another width.
    """
    assert recipe.source.vlm is not None
    name = recipe.source.llm
    if name is None:
        info = describe_source(recipe.source.vlm, recipe.source.files)
        name = str(recipe.source.vlm) if info.llm_inside else info.llm
    if name is None:
        raise CheckpointError(
            f"source.llm: expected the language model that {recipe.source.vlm} was trained with, because it names none; got nothing"
        )
    words = load_words(name)
    if words.hidden_width != source_width:
        raise CheckpointError(
            f"source.llm: expected a language model of width {source_width}, as the projector of {recipe.source.vlm} has, "
            f"got {words.path!r} of width {words.hidden_width}; name the language model that it was trained with"
        )
    return *fit_converter(words, load_words(recipe.target.llm), recipe.converter, recipe.seed, device), words
