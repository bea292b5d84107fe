"""Types of a recipe's values: numbers in a range, and paths, which start at the recipe's own folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]


class FromFile(str):
    """A string of a recipe file, which remembers the folder that relative paths start from."""

    folder: Path


def resolve(value: Any) -> Any:
    return Path(os.path.normpath(value.folder / value)) if isinstance(value, FromFile) else value


def resolve_or_hub(value: Any) -> Any:
    """A path when it is written as one (`./`, `../`, `/`), otherwise a hub id."""
    if not isinstance(value, str) or not value.startswith((".", "/")):
        return value
    return os.path.abspath(resolve(value))


def resolve_existing_or_hub(value: Any) -> Any:
    """A path, unless it reads as `owner/name`, names no weight file and is not there: then a hub id."""
    if not isinstance(value, str):
        return value
    local = Path(resolve(value)).absolute()
    reads_as_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and local.suffix not in WEIGHT_SUFFIXES
    return str(value) if reads_as_id and not local.exists() else local


WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
RecipePath = Annotated[Path, BeforeValidator(resolve)]


def told(error: Exception) -> str:
    """A mistake in what was given as one line: "recipe error: ...", "data error: ..."; of other people's errors their own name."""
    name = type(error).__name__
    is_ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return f"{re.sub('(Error|Refused)$', '', name).lower()} error: {error}" if is_ours else f"{name}: {error}"


class RecipeError(ValueError):
    """A recipe that cannot be used; the command line prints the message and exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def resolve_pattern(value: Any) -> Any:
    """A path, or a string where the name is a pattern (`{00000..00010}.tar`, `*.tar`), which no single file has to match."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected a file, a folder or a pattern, got {value!r}")
    path = Path(resolve(value))
    return str(path) if set(value) & set("{*?[") and not path.exists() else path


SourcePath = Annotated[Path | str, BeforeValidator(resolve_existing_or_hub)]
