"""`vpgtrans convert`: the word converter of a recipe on its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ..checkpoint import write_json
from ..models.llm import load_language_model
from ..models.sources import describe_source
from ..outcome import converter_table
from ..recipe import RecipeError, TransferRecipe
from ..runlog import console
from .converter import ConverterReport
from .initialise import fitted_converter, read_projector
from .merge import merge


def convert(recipe: TransferRecipe, out: str | None) -> ConverterReport:
    """Fit, print the quality on held-out tokens, and with `out` write the merged projector and the report.

    Raises RecipeError when the recipe has no source to convert from.
    """
    if recipe.source.vlm is None:
        raise RecipeError("source.vlm: expected the run whose projector is to be converted, got nothing")
    target = load_language_model(recipe.target.llm)
    converter, report, _ = fitted_converter(recipe, target)
    console.print(converter_table(report))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        info = describe_source(recipe.source.vlm, recipe.source.files)
        assert info.projector_shape is not None  # the converter was fitted for it
        projector, _ = read_projector(recipe.source.vlm, info.projector_shape[1], recipe.source.files)
        merged = merge(projector, converter)
        save_file({"weight": merged.weight.detach(), "bias": merged.bias.detach()}, folder / "projector.safetensors")
        write_json(folder / "converter.json", report.to_dict())
        console.print(
            f"wrote {folder}/projector.safetensors ({merged.in_features} -> {merged.out_features}) and converter.json"
        )
    return report
