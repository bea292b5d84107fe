"""The start-up table of savings: each one of the engine's, whether it is on in this run, whether it is exact, and why.

Savings without a recipe switch are exact and cost nothing, so nobody would turn them off; the table says "always on".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.image_decode import image_decode_unsupported_reason
from .kernel_choice import Choice
from .models.vlm import VisionLanguageModel
from .prompt_cache import prompt_cache_rows
from .recipe import TransferRecipe


@dataclass(frozen=True)
class Saving:
    """on: None where a stage decides when it begins; exact: whether results stay the same within rounding while it is on."""

    name: str
    on: bool | None
    exact: bool
    why: str


def savings(recipe: TransferRecipe, model: VisionLanguageModel, choices: list[Choice]) -> list[Saving]:
    """All rows, in the order of the data's way through the model; choices: of kernels, compiled regions and graphs."""
    return [
        *_of_images(recipe, model),
        *_of_rows(recipe, model),
        Saving(
            "nothing stored for frozen weights", True, True,
            "always on: a frozen linear keeps no input, a frozen norm what its input's gradient needs",
        ),
        Saving(
            "one token mean over the update", recipe.loss_mean == "global", True,
            f"loss_mean is {recipe.loss_mean}; gradients are summed over micro-batches and ranks, once an update",
        ),
        Saving(
            "no wait for the device", True, True,
            f"always on, but for the log every {recipe.output.log_every_updates} updates and what a cache stores",
        ),
        *(Saving(c.title, c.on, c.exact, c.why) for c in choices),
    ]  # fmt: skip


def _of_images(recipe: TransferRecipe, model: VisionLanguageModel) -> list[Saving]:
    data = recipe.data
    augmented = data.transform == "train"
    decoder_missing = image_decode_unsupported_reason() if data.decode == "fast" else None
    trained = any(stage.trains == "vpg_and_projector" for stage in recipe.stages)
    drops = model.vpg.config.dropout > 0 and (trained or any(stage.frozen_dropout for stage in recipe.stages))
    shared = [w for w, is_so in (("view", augmented), ("dropout mask", drops)) if is_so]
    why = f"captions_per_image={data.captions_per_image}"
    return [
        Saving(
            "scaled JPEG decoding", data.decode == "fast" and decoder_missing is None, False,
            f"data.decode is {data.decode}" + (f"; {decoder_missing}" if decoder_missing else ""),
        ),
        Saving(
            "vision cache", data.vision_cache, not augmented and data.cache_precision == "compute",
            f"{data.views} stored view(s), {data.cache_precision} precision" if data.vision_cache else "data.vision_cache is off",
        ),
        *(Saving(*row) for row in prompt_cache_rows(recipe)),
        Saving(
            "one image, one encoding", data.captions_per_image != 1, not shared,
            why + (f"; the captions of an image share one {' and one '.join(shared)}" if shared else ""),
        ),
    ]  # fmt: skip


def _of_rows(recipe: TransferRecipe, model: VisionLanguageModel) -> list[Saving]:
    data = recipe.data
    positions = Saving("only supervised positions reach the head", True, True, "always on")
    if model.llm.is_encoder_decoder:
        budget = data.row_tokens * data.rows_per_micro_batch
        return [
            Saving("shared visual prefix", False, True, "an encoder-decoder reads visual tokens and text together"),
            Saving("no padding", False, True, f"pairs padded to their longest, {budget} tokens at a time"),
            positions,
        ]
    grouped = data.captions_per_image != 1
    drops = any(stage.frozen_dropout for stage in recipe.stages) and model.llm.has_dropout
    why = "one prefix an image and row; each caption sees it and itself" if grouped else "captions_per_image=1"
    return [
        Saving(
            "shared visual prefix", grouped, not drops,
            why + ("; the captions of an image share its dropout mask" if grouped and drops else ""),
        ),
        Saving("no padding", True, True, f"always on: rows of {data.row_tokens} tokens (data.row_tokens), best fit"),
        positions,
    ]  # fmt: skip
