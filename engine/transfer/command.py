"""`vpgtrans convert`: the word converter of a recipe on its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ..checkpoint import CheckpointError, readable, write_json
from ..models.opening import read_projector
from ..models.sources import describe_source
from ..outcome import converter_table
from ..recipe import RecipeError, TransferRecipe
from ..runlog import console
from .converter import ConverterReport
from .initialise import fitted_converter
from .merge import merge


def convert(recipe: TransferRecipe, out: str | None) -> ConverterReport:
    """Fit, print the quality on held-out tokens, and with `out` write the merged projector and the report.

    Raises RecipeError when the recipe has no source to convert from.
    """
    if recipe.source.vlm is None:
        raise RecipeError("source.vlm: expected the run whose projector is to be converted, got nothing")
    info = describe_source(recipe.source.vlm, recipe.source.files)
    if info.projector_shape is None:
        raise CheckpointError(
            f"source.vlm: expected a model with a projector, found none in {recipe.source.vlm}; name a finished run"
        )
    width, hidden = info.projector_shape
    converter, report, _ = fitted_converter(recipe, width)
    console.print(converter_table(report))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        projector, _ = read_projector(recipe.source.vlm, hidden, recipe.source.files)
        merged = merge(projector, converter)
        save_file({"weight": merged.weight.detach(), "bias": merged.bias.detach()}, folder / "projector.safetensors")
        readable(folder / "projector.safetensors")
        write_json(folder / "converter.json", report.to_dict())
        console.print(
            f"wrote {folder}/projector.safetensors ({merged.in_features} -> {merged.out_features}) and converter.json"
        )
    return report
