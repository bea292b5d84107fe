"""What can be known to go wrong before it costs anything: what this machine lacks, rows that no caption fits into, scores of other data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .back_ends import check_back_ends
from .data.ffcv_loader import check_ffcv
from .data.packing import DataError, JoinedCaptions, TokenisedCaptions
from .data.scenes import attributes_right
from .data.token_table import TokenTable
from .kernel_choice import unsupported_kernels
from .models.llm import LanguageModel
from .recipe import RecipeError, TransferData, TransferRecipe
from .regions import unsupported_steps
from .runtime import device_kind


def run_device(recipe: TransferRecipe) -> torch.device:
    """The kind of device that a run takes on this machine."""
    return torch.device(device_kind(recipe.device))


def machine_problems(recipe: TransferRecipe) -> list[str]:
    """What the recipe asks for by name and this machine cannot do, one line each; loads nothing (of the target, its config
    where `attention` names a back end)."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        return ["device: expected a CUDA GPU, found none; set device=cpu or device=auto"]
    device = run_device(recipe)
    lines = [
        f"kernels.{name}: expected auto or torch here, got kernel: {reason}"
        for name, reason in unsupported_kernels(recipe.kernels, device).items()
    ]
    lines += [
        f"step.{name}: expected auto or false here, got true: {reason}"
        for name, reason in unsupported_steps(recipe.step, device).items()
    ]
    for check in [lambda: check_back_ends(recipe)] + [lambda: check_ffcv(recipe.data)] * (recipe.data.loader == "ffcv"):
        try:
            check()
        except RecipeError as error:
            lines.append(str(error))
    return lines


def check_machine(recipe: TransferRecipe) -> None:
    """Raises RecipeError with every line of `machine_problems`."""
    if lines := machine_problems(recipe):
        raise RecipeError("\n".join(lines))


def check_rows(sets: Sequence[TokenisedCaptions], llm: LanguageModel, queries: int, layout: TransferData) -> None:
    """Raises DataError where the longest caption of a set does not fit into a row behind its visual tokens, or a pair into a micro-batch."""
    for captions in itertools.chain.from_iterable(s.sets if isinstance(s, JoinedCaptions) else [s] for s in sets):
        lead = len(captions.lead(0))
        longest = longest_caption(captions)
        if llm.is_encoder_decoder:
            needed, given = queries + longest + 2, layout.row_tokens * layout.rows_per_micro_batch
            name, shape = "data.row_tokens x data.rows_per_micro_batch", f"a caption of {longest} and two end tokens"
        else:
            needed, given, name = lead + queries + longest, layout.row_tokens, "data.row_tokens"
            shape = f"a caption of {longest}" + (f", {lead} tokens before the image" if lead else "")
        if needed > given:
            raise DataError(
                f"{name}: expected at least {needed}, because {captions.name!r} has one of {queries} visual tokens and {shape}, got {given}; "
                "raise it, or lower data.max_text_tokens"
            )


def longest_caption(captions: TokenisedCaptions) -> int:
    """Tokens of the longest caption of a set."""
    if isinstance(captions, TokenTable):
        return captions.longest_caption
    return max(map(len, itertools.chain.from_iterable(captions.ids)), default=0)


def check_attributes(captions: TokenTable, images: int) -> None:
    """Raises RecipeError where `evaluation.attributes` is asked for and a caption to be scored describes no scene of the miniature world."""
    for record in captions.records[:images]:
        try:
            attributes_right("", record.captions)
        except ValueError:
            raise RecipeError(
                f"evaluation.attributes: expected false, because image {record.image_id} of {captions.name!r} is no scene of the miniature "
                f"world, got true; its captions begin with {record.captions[:1]!r}"
            ) from None
