"""Recipes: typed, closed, and checked before anything heavy is imported.

A recipe is one YAML file; `section.key=value` on the command line overrides it (list items by index: `stages.0.learning_rate=1e-4`).
Relative paths in a file are relative to that file, those of an override to the working directory, so a recipe runs from anywhere.
`kind` says what the recipe makes: `transfer` (a vision-language model, the default) or one of the parts, `lm`, `vision` and `vpg`.
This package imports neither torch nor transformers, so that a mistake is reported in well under a second.
"""

from .data import ImageData, TransferData
from .models import Converter, QFormerConfig, Source, Target, Vision
from .pretrain import LMRecipe, PairedData, PretrainSchedule, TextData, TrainTokenizer, VisionRecipe, VPGRecipe
from .reading import KINDS, Recipe, load_recipe, missing_files, save_recipe
from .training import Distribution, Evaluation, Generation, Guards, Initialise, Kernels, Optimizer, Output, Stage, Step
from .transfer import TransferRecipe
from .values import WEIGHT_SUFFIXES, RecipeError, told

__all__ = [
    "KINDS",
    "WEIGHT_SUFFIXES",
    "Converter",
    "Distribution",
    "Evaluation",
    "Generation",
    "Guards",
    "ImageData",
    "Initialise",
    "Kernels",
    "LMRecipe",
    "Optimizer",
    "Output",
    "PairedData",
    "PretrainSchedule",
    "QFormerConfig",
    "Recipe",
    "RecipeError",
    "Source",
    "Stage",
    "Step",
    "Target",
    "TextData",
    "TrainTokenizer",
    "TransferData",
    "TransferRecipe",
    "VPGRecipe",
    "Vision",
    "VisionRecipe",
    "load_recipe",
    "missing_files",
    "save_recipe",
    "told",
]  # fmt: skip
