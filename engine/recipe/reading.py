"""From a YAML file and overrides to a recipe: `extends`, variables, closed keys, and messages that say what was expected."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .pretrain import LMRecipe, VisionRecipe, VPGRecipe
from .training import RecipeOfAnyKind
from .transfer import TransferRecipe
from .values import FromFile, RecipeError

Recipe = TransferRecipe | LMRecipe | VisionRecipe | VPGRecipe
KINDS: dict[str, type[RecipeOfAnyKind]] = {
    "transfer": TransferRecipe,
    "lm": LMRecipe,
    "vision": VisionRecipe,
    "vpg": VPGRecipe,
}


def load_recipe(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    kinds: tuple[str, ...] | None = None,
    check_files: bool = True,
    keep_unset_variables: bool = False,
) -> Recipe:
    """Read, override and validate a recipe, and check that every file that it names as an input exists.

    overrides: `section.key=value`, values in YAML.  kinds: the kinds that the caller can run.  check_files: false for a plan whose inputs are
    still to be made.  keep_unset_variables: `${NAME}` of an unset variable stays as text, for a dry run, which opens no file.
    Raises RecipeError with one message: the key, what was expected, what came, and the nearest valid key.
    """
    values = _read_yaml(Path(path))
    if "kind" not in values and {"parts", "arms"} <= values.keys():
        raise RecipeError(f"{path}: expected a recipe, got a plan of parts and arms; use `vpgtrans demo --plan {path}`")
    for override in overrides:
        _apply(values, override)
    kind = values.get("kind", "transfer")
    if kind not in KINDS or (kinds and kind not in kinds):
        expected = ", ".join(kinds or tuple(KINDS))
        use = (
            "; use `vpgtrans train`"
            if kind == "transfer"
            else f"; use `vpgtrans pretrain {kind}`"
            if kind in KINDS
            else ""
        )
        raise RecipeError(f"{path}: kind: expected one of {expected}, got {kind!r}{use}")
    try:
        recipe = KINDS[kind].model_validate(_expand(values, "", keep_unset_variables))
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "\n".join(_explain(e, KINDS[kind]) for e in error.errors())) from None
    if check_files:
        _check_files(recipe, str(path))
    return recipe  # type: ignore[return-value]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default included, as YAML that `load_recipe` reads back."""
    temporary = path.with_name(f".{path.name}.tmp")  # other ranks, and runs that follow, read it at any time
    temporary.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    temporary.replace(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1
        )
        raise RecipeError(
            f"{path}: expected a recipe file, found none" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: expected YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping of sections at the top, got {type(values).__name__}")
    values = _mark(values, path.parent)
    if "extends" in values:
        base = path.parent / str(values.pop("extends"))
        return _merge(_read_yaml(base), values)
    return values


def _mark(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _mark(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_mark(v, folder) for v in value]
    if isinstance(value, str):
        marked = FromFile(value)
        marked.folder = folder.absolute()
        return marked
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if key == "target" and isinstance(value, dict) and "llm" in value and isinstance(merged.get(key), dict):
            merged[key] = {k: v for k, v in merged[key].items() if k != "config"}  # sizes of another model
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: expected a YAML value: {error}") from None
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    node: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"override {override!r}: {where} holds {node!r}, which has no keys inside")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value
        if key == "target.llm":  # its sizes were those of another model
            node.pop("config", None)


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(
            f"override {where}: expected the place of one of {len(items)} items, counted from 0, got {part!r}"
        )
    return int(part)


def _expand(value: Any, where: str, keep_unset: bool = False) -> Any:
    """`${NAME}` in strings becomes the environment variable NAME; unset ones stay as they are where `keep_unset`."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}".lstrip("."), keep_unset) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{where}.{i}", keep_unset) for i, v in enumerate(value)]
    if isinstance(value, str):
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name not in os.environ:
                if keep_unset:
                    continue
                raise RecipeError(
                    f"{where}: expected the environment variable {name} (in {value!r}), which is not set; set it or override {where}"
                )
            expanded = value.replace(f"${{{name}}}", os.environ[name])
            if isinstance(value, FromFile):
                expanded = FromFile(expanded)
                expanded.folder = value.folder
            value = expanded
    return value


def _explain(error: Any, model: type[BaseModel]) -> str:
    location = [
        p
        for p in error["loc"]
        if not isinstance(p, str) or p not in ("TrainTokenizer", "path", "constrained-int") or p == error["loc"][0]
    ]
    key = ".".join(str(p) for p in location)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: expected a value, got nothing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {error['input']!r}"


def _keys_at(model: Any, location: list[Any]) -> list[str]:
    """The field names of the section that `location` leads to."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        sections = [] if field is None else list(sections_of(field.annotation))
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def sections_of(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    """The sections that an annotation names, inside lists and unions too."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from sections_of(inner)


def _check_files(recipe: Any, where: str) -> None:
    """Every path that names an input must exist now, not an hour into the run."""
    for key, value in missing_files(recipe):
        near = difflib.get_close_matches(
            value.name, [p.name for p in value.parent.iterdir()] if value.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {value.parent / near[0]}?" if near else ""
        if recipe.inputs_from:
            hint = f"; make it with `{recipe.inputs_from}`"
        raise RecipeError(f"{where}: {key}: expected an existing file or folder, found none at {str(value)!r}{hint}")


def missing_files(recipe: Any) -> list[tuple[str, Path]]:
    """The inputs of a recipe that are not on this machine: (key, path)."""
    return [(k, path) for k, path in _paths(recipe, "") if not k.startswith("output.") and not path.exists()]


def _paths(section: Any, where: str) -> typing.Iterator[tuple[str, Path]]:
    if isinstance(section, Path):
        yield where, section
    elif isinstance(section, BaseModel):
        for name in type(section).model_fields:
            yield from _paths(getattr(section, name), f"{where}.{name}".lstrip("."))
    elif isinstance(section, str) and where in ("target.llm", "source.llm") and section.startswith("/"):
        yield where, Path(section)
    elif isinstance(section, (list, tuple)):
        for index, item in enumerate(section):
            yield from _paths(item, f"{where}.{index}")
