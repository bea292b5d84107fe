"""Other people's implementations that a recipe names (`attention`, `optimizer.implementation`): whether they can run, before anything is loaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from .models.attention_back_ends import back_end_unsupported_reason
from .models.llm import LOAD_ERRORS, attention_of
from .optim import apex_unsupported_reason
from .recipe import LMRecipe, Recipe, RecipeError, TransferRecipe, VisionRecipe, VPGRecipe
from .runtime import device_kind


def check_back_ends(recipe: Recipe) -> None:
    """Raises RecipeError, with the remedy, where an implementation that the recipe names is not installed or cannot run here."""
    device = torch.device(device_kind(recipe.device))
    if isinstance(recipe, TransferRecipe):
        optimizers = {f"stages.{i}.optimizer": stage.optimizer for i, stage in enumerate(recipe.stages)}
        if recipe.attention not in ("auto", "sdpa"):
            _check_attention(recipe, device)
    else:
        assert isinstance(recipe, LMRecipe | VisionRecipe | VPGRecipe)
        optimizers = {"schedule.optimizer": recipe.schedule.optimizer}
    for key, optimizer in optimizers.items():
        if optimizer.implementation == "apex" and (reason := apex_unsupported_reason(device)):
            raise RecipeError(f"{key}.implementation: expected fused here, got apex: {reason}")


def _check_attention(recipe: TransferRecipe, device: torch.device) -> None:
    in_half = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    reason = _model_reason(recipe.target.llm) or back_end_unsupported_reason(
        recipe.attention, device, torch.bfloat16 if in_half else torch.float32
    )
    if reason:
        raise RecipeError(f"attention: expected auto or sdpa here, got {recipe.attention}: {reason}")


def _model_reason(path: str) -> str | None:
    """Why the attention of a model cannot be chosen, from its config; None where it can, or where loading it will say what is wrong."""
    try:
        config = AutoConfig.from_pretrained(path)
    except LOAD_ERRORS:
        return None
    if config.is_encoder_decoder:
        return f"{path!r} is an encoder-decoder ({config.model_type}), which has no packed rows and keeps its own attention"
    if attention_of(config) != "sdpa":
        return f"{path!r} ({config.model_type}) soft-caps its scores, which is left to its own attention"
    return None
